"""Notification service: decides on mails, and sends them."""

import asyncio
from uuid import UUID, uuid5

from sqlalchemy import Column, MetaData, Table, Text, Uuid, insert
from sqlalchemy.ext.asyncio import AsyncSession

from examples.glam.service import GlamListener, run, tell
from outbox import EventEnvelope
from outbox.contracts import (
    CreditBalanceExhaustedPayload,
    CreditBalanceGrantedPayload,
    CreditBalanceLowPayload,
    CreditTrialGrantedPayload,
    EmailSendPayload,
    EmailSentPayload,
    Subjects,
)

Balance = CreditBalanceLowPayload | CreditBalanceExhaustedPayload | CreditBalanceGrantedPayload
mail = Table(
    "mail",
    MetaData(),
    Column("id", Uuid, primary_key=True),
    Column("template", Text),
    Column("recipient", Text),
)


async def ask_for_mail(
    session: AsyncSession, event: EventEnvelope[Balance | CreditTrialGrantedPayload], template: str
) -> None:
    """Add the command to send a mail; its id comes from the event's, so it is one mail."""
    command = EmailSendPayload(
        identifiers=event.payload.identifiers,
        notification_id=uuid5(UUID(event.event_id), template),
        template_type=template,
        recipient_email=event.payload.email,
    )
    await tell(session, command)


class Welcome(GlamListener[CreditTrialGrantedPayload]):
    """Whoever has a trial is welcomed."""

    subject = Subjects.CREDIT_TRIAL_GRANTED
    queue_group = "welcome"
    service_name = "notification-service"

    async def on_message(
        self, session: AsyncSession, event: EventEnvelope[CreditTrialGrantedPayload]
    ) -> None:
        await ask_for_mail(session, event, "welcome")


class WarnOfBalance(GlamListener[Balance]):
    """One listener for all that happens to a balance."""

    subject = "evt.credit.balance.*.v1"
    queue_group = "balance"
    service_name = "notification-service"

    async def on_message(self, session: AsyncSession, event: EventEnvelope[Balance]) -> None:
        await ask_for_mail(session, event, event.event_type.split(".")[3])


class SendMail(GlamListener[EmailSendPayload]):
    """Sends each mail once: its row and its event are one transaction."""

    subject = Subjects.NOTIFICATION_EMAIL_SEND
    queue_group = "send-mail"
    service_name = "notification-service"

    async def on_message(
        self, session: AsyncSession, event: EventEnvelope[EmailSendPayload]
    ) -> None:
        wanted = event.payload
        row = {
            "id": wanted.notification_id,
            "template": wanted.template_type,
            "recipient": wanted.recipient_email,
        }
        await session.execute(insert(mail), row)
        sent = EmailSentPayload(
            identifiers=wanted.identifiers,
            notification_id=wanted.notification_id,
            template_type=wanted.template_type,
            recipient_email=wanted.recipient_email,
            provider="demo",
            provider_message_id=str(wanted.notification_id),
        )
        await tell(session, sent)


if __name__ == "__main__":
    asyncio.run(run([Welcome, WarnOfBalance, SendMail]))
