"""docs/moving.md is true: the service that it shows publishes and listens as it says."""

import logging
import re
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import JetStreamClient, Relay, Settings
from outbox.contracts import MerchantIdentifiers
from outbox.telemetry import Step
from tests.faults import Watch

MOVING = Path(__file__).parents[2] / "docs" / "moving.md"
MERCHANT = MerchantIdentifiers(
    merchant_id=uuid4(), platform_name="shopify", platform_shop_id="1", domain="tea.example"
)


class Base(DeclarativeBase):
    """The tables of the service that moves."""


class Grant(Base):
    __tablename__ = "grants"

    id: Mapped[int] = mapped_column(primary_key=True)
    merchant_id: Mapped[UUID]
    amount: Mapped[float]


class Mail(Base):
    __tablename__ = "mails"

    id: Mapped[int] = mapped_column(primary_key=True)
    recipient: Mapped[str]
    text: Mapped[str]


@pytest.fixture
def service() -> dict[str, Any]:
    """What the page's code defines, one block after the other."""
    blocks = re.findall(r"```python\n(.*?)```", MOVING.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {"Grant": Grant, "Mail": Mail, "__name__": "service"}
    for block in blocks:
        exec(compile(block, str(MOVING), "exec"), names)  # noqa: S102 - the page's own code
    return names


@pytest.mark.parametrize("handler", ["SendWelcome", "SendWelcomeTyped"])
async def test_moved_service_grants_and_welcomes_once(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    service: dict[str, Any],
    handler: str,
) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with sessionmaker() as session:
        await service["grant_trial"](session, MERCHANT, 50.0)
    settings, watch = Settings.defaults(stream=stream), Watch()
    given = (js_client, logging.getLogger("mail"), sessionmaker)
    more = {"settings": settings, "observer": watch}
    if handler == "SendWelcome":
        made = service["make_listener"](*given)
        assert made.identity == "notification-service-welcome"
        listener = service[handler](*given, **more)
    else:
        listener = service[handler](js_client, sessionmaker, **more)
    async with Relay(engine, js_client, settings=settings), listener:
        await watch.until(Step.ACKED)
    async with sessionmaker() as session:
        assert [mail.text for mail in await session.scalars(select(Mail))] == ["50.0 credits"]
        assert [grant.amount for grant in await session.scalars(select(Grant))] == [50.0]
