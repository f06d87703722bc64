"""Merchant service: knows who has the app."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Column, MetaData, Table, Text, Uuid, insert, update
from sqlalchemy.ext.asyncio import AsyncSession

from examples.glam import webhook
from examples.glam.service import GlamListener, run, tell
from outbox import EventEnvelope, Retry
from outbox.contracts import (
    MerchantCreatedPayload,
    MerchantStatus,
    MerchantStatusChangedPayload,
    MerchantUninstalledPayload,
    Subjects,
    WebhookAppUninstalledV1,
    WebhookReceivedPayload,
)

merchant = Table(
    "merchant",
    MetaData(),
    Column("id", Uuid, primary_key=True),
    Column("shop_id", Text),
    Column("status", Text),
)
PROFILE: dict[str, Any] = {
    "primary_domain": None,
    "currency": "EUR",
    "country": "DE",
    "platform_version": None,
    "scopes": "read_products",
}


class Install(GlamListener[WebhookReceivedPayload]):
    """A merchant is created by its first webhook."""

    subject = Subjects.WEBHOOK_RECEIVED
    queue_group = "install"
    service_name = "merchant-service"

    async def on_message(
        self, session: AsyncSession, event: EventEnvelope[WebhookReceivedPayload]
    ) -> None:
        who = event.payload.identifiers
        row = {"id": who.merchant_id, "shop_id": who.platform_shop_id, "status": "ACTIVE"}
        await session.execute(insert(merchant), row)
        email = f"owner@{who.domain}"
        created = MerchantCreatedPayload(identifiers=who, name=who.domain, email=email, **PROFILE)
        await tell(session, created)


class Uninstall(GlamListener[WebhookAppUninstalledV1]):
    """A merchant that leaves may overtake its own creation: they have no key in common."""

    subject = Subjects.WEBHOOK_APP_UNINSTALLED
    queue_group = "uninstall"
    service_name = "merchant-service"

    async def on_message(
        self, session: AsyncSession, event: EventEnvelope[WebhookAppUninstalledV1]
    ) -> None:
        shop_id = event.payload.platform_shop_id
        gone = update(merchant).where(merchant.c.shop_id == shop_id).values(status="UNINSTALLED")
        found = (await session.execute(gone.returning(merchant.c.id))).scalar()
        if found is None:
            raise Retry("the merchant is not known yet", after=timedelta(seconds=0.5))
        now, who = datetime.now(UTC), webhook.merchant(int(shop_id))
        await tell(session, MerchantUninstalledPayload(identifiers=who, updated_at=now))
        changed = MerchantStatusChangedPayload(
            identifiers=who,
            name=who.domain,
            email=f"owner@{who.domain}",
            status=MerchantStatus.UNINSTALLED,
            from_status=MerchantStatus.ACTIVE,
            to_status=MerchantStatus.UNINSTALLED,
            last_synced_at=None,
            created_at=now,
            updated_at=now,
            **PROFILE,
        )
        await tell(session, changed)


if __name__ == "__main__":
    asyncio.run(run([Install, Uninstall]))
