"""Webhook service: takes the platform's calls and tells of them, in one transaction each."""

import asyncio
import os
from datetime import UTC, datetime
from uuid import NAMESPACE_DNS, uuid5

from sqlalchemy import Column, MetaData, Table, Text, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from examples.glam.service import run, tell
from outbox.contracts import MerchantIdentifiers, WebhookAppUninstalledV1, WebhookReceivedPayload

LEAVES = 10  # one merchant in so many removes the app again
SECONDS = 8.0  # that all calls take together
webhook = Table("webhook", MetaData(), Column("id", Text, primary_key=True), Column("topic", Text))


def merchant(number: int) -> MerchantIdentifiers:
    """Return the identifiers of a merchant of the demo."""
    domain = f"shop-{number}.example"
    return MerchantIdentifiers(
        merchant_id=uuid5(NAMESPACE_DNS, domain),
        platform_name="shopify",
        platform_shop_id=str(number),
        domain=domain,
    )


async def receive(session: AsyncSession, webhook_id: str, topic: str, shop: int) -> None:
    """Take one call of the platform; a call that is repeated has no second effect."""
    new = insert(webhook).values(id=webhook_id, topic=topic).on_conflict_do_nothing()
    if not (await session.execute(new.returning(webhook.c.id))).scalar():
        return
    if topic == "app/uninstalled":
        gone = WebhookAppUninstalledV1(platform_name="shopify", platform_shop_id=str(shop))
        await tell(session, gone)
        return
    received = WebhookReceivedPayload(
        identifiers=merchant(shop),
        webhook_id=webhook_id,
        topic=topic,
        received_at=datetime.now(UTC),
    )
    await tell(session, received)


async def platform(sessions: async_sessionmaker[AsyncSession]) -> None:
    """Call as the platform does, resuming where a killed process stopped."""
    count = int(os.environ["MERCHANTS"])
    async with sessions() as session:
        done = set(await session.scalars(select(webhook.c.id)))
    for shop in range(count):
        calls = ["app/installed"] + ["app/uninstalled"] * (shop % LEAVES == LEAVES - 1)
        for topic in calls:
            webhook_id = f"{topic}/{shop}"
            if webhook_id in done:
                continue
            async with sessions() as session:
                if shop % 7 == 3:  # a transaction that fails: the platform calls again
                    await receive(session, webhook_id, topic, shop)
                    await session.rollback()
                await receive(session, webhook_id, topic, shop)
                await session.commit()
        await asyncio.sleep(SECONDS / count)


if __name__ == "__main__":
    asyncio.run(run([], platform))
