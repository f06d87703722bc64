"""A service that takes orders and mails about them: API, relay and listener in one process.

OUTBOX_DATABASE_URL and OUTBOX_NATS_URL name the servers (`outbox dev` prints both). Then:

    outbox migrate
    uvicorn app:app
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, Field
from sqlalchemy import Column, MetaData, Table, Text, Uuid, insert, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from typing_extensions import override

from outbox import EventEnvelope, JetStreamClient, Listener, Outbox, Relay, Settings

ORDERED = "evt.shop.ordered.v1"
metadata = MetaData()
orders = Table(
    "orders", metadata, Column("id", Uuid, primary_key=True), Column("email", Text, nullable=False)
)
mails = Table("mails", metadata, Column("order_id", Uuid), Column("email", Text, nullable=False))
outbox = Outbox("shop")


class Order(BaseModel):
    """What a customer sends."""

    id: UUID
    email: str = Field(min_length=3)


class Mailer(Listener[Order]):
    """Mails once for each order that was committed."""

    subject = ORDERED
    queue_group = "mailer"
    service_name = "shop"

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope[Order]) -> None:
        order = event.payload
        await session.execute(insert(mails), {"order_id": order.id, "email": order.email})


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Run relay and listener beside the API; stop both before the engine goes."""
    settings = Settings.from_environment(create_stream=True)
    engine = create_async_engine(settings.database_url.get_secret_value())
    app.state.sessions = sessions = async_sessionmaker(engine, expire_on_commit=False)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    async with JetStreamClient.from_settings(settings) as client:
        subjects = [*(f"{prefix}>" for prefix in settings.subject_prefixes), "dlq.>"]
        await client.ensure_stream(settings.stream, subjects)
        async with (
            Relay(engine, client, settings=settings),
            Mailer(client, sessions, settings=settings),
        ):
            yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


async def transaction(request: Request) -> AsyncIterator[AsyncSession]:
    """Lend a session; commit when the route has returned, roll back when it has raised."""
    async with request.app.state.sessions.begin() as session:
        yield session


# "function": the commit comes before the response, so a client never sees an order that is lost.
Session = Annotated[AsyncSession, Depends(transaction, scope="function")]


@app.post("/orders", status_code=201)
async def create_order(order: Order, session: Session) -> dict[str, str]:
    """Write the order and its event in one transaction."""
    await session.execute(insert(orders), {"id": order.id, "email": order.email})
    event_id = outbox.add(session, ORDERED, order, key=str(order.id))
    if order.email.endswith("@blocked.example"):
        raise HTTPException(403, "this customer is blocked")  # no order, no event, no mail
    return {"event_id": event_id}


@app.get("/mails")
async def list_mails(session: Session) -> list[str]:
    """Return the addresses that were mailed."""
    return list(await session.scalars(select(mails.c.email).order_by(mails.c.email)))
