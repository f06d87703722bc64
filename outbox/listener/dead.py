"""Giving up an event: inbox row, dead letter and a `dlq.` event, in one transaction."""

import asyncio
import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from uuid import UUID, uuid5

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from outbox.envelope import encode, encode_headers
from outbox.jetstream import provisioning
from outbox.jetstream.client import JetStreamClient
from outbox.jetstream.pulling import Message
from outbox.listener.attempt import DATABASE_SECONDS
from outbox.postgres import attempts, dead_letters, inbox
from outbox.postgres.dead_letters import DeadLetter
from outbox.subjects import HEADER_KEY, HEADER_ORIGINAL_SUBJECT, dead_letter_subject, is_key
from outbox.tracing import TRACE_HEADERS
from outbox.writer import PendingEvent, enqueue

BODY_BYTES_MAX = 64 * 1024  # of the original, in the `dlq.` event; the row keeps all
_NAMESPACE = UUID("7c0e5b6a-57a4-5d1f-9a62-0f6f4f0d5a11")
_DEAD_LETTER = "dlq."
_KEY = HEADER_KEY.lower()
_SUBJECT = re.compile(r"[A-Za-z0-9_.-]{1,255}")
_TRACE = re.compile(r"[\x20-\x7e]{1,512}")
SUBJECTS_MAX = 1000  # remembered; a wildcard may match any number


class DeadReason(StrEnum):
    """Why a listener gave an event up that it could read; `envelope.Malformed` has the others."""

    ATTEMPTS = "attempts"  # its handler failed, or killed its process, as often as allowed
    REJECTED = "rejected"  # the handler raised `Reject`
    ON_ERROR = "on_error"  # `on_error` decided so
    DISCARDED = "discarded"  # `on_error` decided that nobody needs to look
    INVALID_PAYLOAD = "invalid_payload"
    HANDLER_TRANSACTION = "handler_transaction"  # the handler ended the transaction


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Why and what a listener gives up."""

    message: Message
    key: UUID  # of the inbox
    event_text: str | None
    event_key: str | None
    reason: str
    error: str
    attempts: int
    created_at: datetime | None = None
    correlation_id: str | None = None
    discarded: bool = False
    override: bool = False  # the handler had committed the inbox row by itself


@dataclass(slots=True)
class Undertaker:
    """Gives up events of one listener."""

    client: JetStreamClient
    sessionmaker: async_sessionmaker[AsyncSession]
    schema: str
    listener: str
    service: str
    parks: bool  # a key's later events wait until a person has decided
    _captured: dict[str, bool]

    async def bury(self, given: GivenUp) -> bool:
        """Commit everything that giving up means; return False when that was done before.

        Raises:
            BrokerUnavailable: nobody could tell whether a stream takes the `dlq.` subject.
            sqlalchemy.exc.DBAPIError: the database refused; nothing was written.
        """
        subject = await self._dead_letter_subject(given.message.subject)
        async with (
            asyncio.timeout(DATABASE_SECONDS),
            self.sessionmaker() as session,
            session.begin(),
        ):
            await attempts.forget(session, self.schema, listener=self.listener, event_id=given.key)
            if not await inbox.close(
                session,
                self.schema,
                listener=self.listener,
                event_id=given.key,
                outcome="discarded" if given.discarded else "dead",
                override=given.override,
            ):
                return False
            number = await dead_letters.insert(session, self.schema, self._letter(given))
            if subject is not None and not given.discarded:
                event = self._event(given, subject, number)
                enqueue(session, event, schema=self.schema)
        return True

    async def _dead_letter_subject(self, subject: str) -> str | None:
        """Return the `dlq.` subject if a stream takes it: 503 would keep the event for ever."""
        if subject.startswith(_DEAD_LETTER):
            return None
        target = dead_letter_subject(subject)
        if not _SUBJECT.fullmatch(target):
            return None  # NATS takes nearly any bytes; what we publish is plain
        if target not in self._captured:
            if len(self._captured) >= SUBJECTS_MAX:
                self._captured.clear()
            streams = await provisioning.streams_for(self.client, target)
            self._captured[target] = bool(streams)
        return target if self._captured[target] else None

    def _letter(self, given: GivenUp) -> DeadLetter:
        message = given.message
        return DeadLetter(
            listener=self.listener,
            event_id=given.key,
            event_text=given.event_text,
            subject=message.subject,
            key=given.event_key,
            headers=header_bytes(message.headers),
            body=message.body,
            stream=message.stream,
            sequence=message.sequence,
            reason=given.reason,
            error=given.error,
            attempts=given.attempts,
            created_at=given.created_at,
            discarded=given.discarded,
            parks=self.parks and given.event_key is not None and not given.discarded,
        )

    def _event(self, given: GivenUp, subject: str, number: int) -> PendingEvent:
        event_id = uuid5(_NAMESPACE, f"{self.listener}/{given.key}")
        body = given.message.body
        facts = {
            "dead_letter_id": number,
            "listener": self.listener,
            "original_subject": given.message.subject,
            "original_event_id": given.event_text or str(given.key),
            "stream": given.message.stream,
            "sequence": given.message.sequence,
            "reason": given.reason,
            "error": dead_letters.printable(given.error)[:1000],
            "attempts": given.attempts,
            "original_bytes": len(body),
            "original_sha256": sha256(body).hexdigest(),
            "original_base64": base64.b64encode(body[:BODY_BYTES_MAX]).decode(),
        }
        correlation = given.correlation_id or str(event_id)
        finished = encode(
            event_id=str(event_id),
            subject=subject,
            correlation_id=correlation,
            source_service=self.service,
            data=json.dumps(facts).encode(),
            metadata=json.dumps({"causation_id": given.event_text or str(given.key)}).encode(),
        )
        traced = {
            name.lower(): value
            for name, value in given.message.headers.items()
            if name.lower() in TRACE_HEADERS and _TRACE.fullmatch(value)
        }
        original = {HEADER_ORIGINAL_SUBJECT: ascii(given.message.subject)[1:-1]}
        headers = encode_headers(original | traced)
        return PendingEvent(str(event_id), None, subject, headers, finished, None)


def header_key(message: Message) -> str | None:
    """Return the key that a message's header names, None without one that is valid."""
    key = next((v for name, v in message.headers.items() if name.lower() == _KEY), None)
    return key if key is not None and is_key(key) else None


def header_bytes(headers: Mapping[str, str]) -> bytes:
    """Return a message's headers as lines, whatever a stranger has put into them."""
    lines = (f"{name}: {value}\r\n" for name, value in headers.items())
    return "".join(lines).encode("utf-8", "surrogatepass")
