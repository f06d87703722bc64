"""Credit service: grants a trial, and says when it runs out."""

import asyncio
from datetime import UTC, datetime, timedelta

from sqlalchemy import Column, Float, MetaData, Table, Uuid, insert, update
from sqlalchemy.ext.asyncio import AsyncSession

from examples.glam.service import GlamListener, run, tell
from outbox import EventEnvelope, Retry
from outbox.contracts import (
    CatalogSyncCompletedPayload,
    CreditBalanceExhaustedPayload,
    CreditBalanceLowPayload,
    CreditTrialGrantedPayload,
    MerchantCreatedPayload,
    Subjects,
)

TRIAL = 50.0
LOW = 20.0
account = Table(
    "account", MetaData(), Column("merchant_id", Uuid, primary_key=True), Column("balance", Float)
)


class GrantTrial(GlamListener[MerchantCreatedPayload]):
    """A new merchant gets credits."""

    subject = Subjects.MERCHANT_CREATED
    queue_group = "grant-trial"
    service_name = "credit-service"

    async def on_message(
        self, session: AsyncSession, event: EventEnvelope[MerchantCreatedPayload]
    ) -> None:
        who, email = event.payload.identifiers, event.payload.email
        row = {"merchant_id": who.merchant_id, "balance": TRIAL}
        await session.execute(insert(account), row)
        await tell(session, CreditTrialGrantedPayload(identifiers=who, amount=TRIAL, email=email))


class Spend(GlamListener[CatalogSyncCompletedPayload]):
    """A synchronised item costs one credit."""

    subject = Subjects.CATALOG_SYNC_COMPLETED
    queue_group = "spend"
    service_name = "credit-service"

    async def on_message(
        self, session: AsyncSession, event: EventEnvelope[CatalogSyncCompletedPayload]
    ) -> None:
        who, cost = event.payload.identifiers, event.payload.total_items
        email = event.payload.email or ""
        spent = (
            update(account)
            .where(account.c.merchant_id == who.merchant_id)
            .values(balance=account.c.balance - cost)
            .returning(account.c.balance)
        )
        balance = (await session.execute(spent)).scalar()
        if balance is None:
            raise Retry("the trial is not granted yet", after=timedelta(seconds=0.5))
        if balance <= 0:
            used_up = CreditBalanceExhaustedPayload(
                identifiers=who, exhausted_at=datetime.now(UTC), email=email
            )
            await tell(session, used_up, Subjects.CREDIT_BALANCE_DEPLETED)
        elif balance < LOW:
            low = CreditBalanceLowPayload(identifiers=who, balance=balance, email=email)
            await tell(session, low)


if __name__ == "__main__":
    asyncio.run(run([GrantTrial, Spend]))
