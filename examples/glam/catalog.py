"""Catalog service: reads a new merchant's catalog. One merchant's catalog is poison."""

import asyncio
from uuid import NAMESPACE_DNS, uuid5

from sqlalchemy import Column, MetaData, Table, Text, Uuid, insert, update
from sqlalchemy.ext.asyncio import AsyncSession

from examples.glam.service import GlamListener, run, tell
from outbox import EventEnvelope
from outbox.contracts import (
    CatalogSyncCompletedPayload,
    CatalogSyncFailedPayload,
    CatalogSyncStartedPayload,
    MerchantCreatedPayload,
    Subjects,
)

POISON = "13"  # this shop's catalog cannot be read, however often it is tried
BROKEN = 20  # one catalog in so many is refused by the platform
sync = Table(
    "sync",
    MetaData(),
    Column("id", Uuid, primary_key=True),
    Column("merchant_id", Uuid),
    Column("status", Text),
)


class StartSync(GlamListener[MerchantCreatedPayload]):
    """A new merchant's catalog is read."""

    subject = Subjects.MERCHANT_CREATED
    queue_group = "start-sync"
    service_name = "catalog-service"

    async def on_message(
        self, session: AsyncSession, event: EventEnvelope[MerchantCreatedPayload]
    ) -> None:
        who = event.payload.identifiers
        sync_id = uuid5(NAMESPACE_DNS, f"sync.{who.domain}")
        row = {"id": sync_id, "merchant_id": who.merchant_id, "status": "started"}
        await session.execute(insert(sync), row)
        items = int(who.platform_shop_id) % 60
        started = CatalogSyncStartedPayload(
            identifiers=who, sync_id=sync_id, total_items=items, status="started"
        )
        await tell(session, started)


class Sync(GlamListener[CatalogSyncStartedPayload]):
    """The work itself: completed, refused by the platform, or poison."""

    subject = Subjects.CATALOG_SYNC_STARTED
    queue_group = "sync"
    service_name = "catalog-service"
    max_attempts = 4

    async def on_message(
        self, session: AsyncSession, event: EventEnvelope[CatalogSyncStartedPayload]
    ) -> None:
        started, who = event.payload, event.payload.identifiers
        if who.platform_shop_id == POISON:
            raise ValueError("the catalog holds bytes that nothing can read")
        refused = int(who.platform_shop_id) % BROKEN == BROKEN - 1
        status = "failed" if refused else "completed"
        done = update(sync).where(sync.c.id == started.sync_id).values(status=status)
        await session.execute(done)
        if refused:
            failed = CatalogSyncFailedPayload(
                identifiers=who,
                sync_id=started.sync_id,
                error_code="PLATFORM",
                error_message="the platform refused",
                failed_operation="sync",
            )
            await tell(session, failed)
            return
        completed = CatalogSyncCompletedPayload(
            identifiers=who,
            sync_id=started.sync_id,
            total_items=started.total_items,
            status="completed",
            first_sync=True,
            email=f"owner@{who.domain}",
        )
        await tell(session, completed)


if __name__ == "__main__":
    asyncio.run(run([StartSync, Sync]))
