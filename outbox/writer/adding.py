"""`Outbox`: checks and encodes an event, and puts it into the caller's transaction."""

from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any, TypeAlias, overload
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from outbox import context, subjects, tracing
from outbox.envelope import (
    check_source_service,
    encode,
    encode_headers,
    encode_payload,
    uuid7_text,
)
from outbox.errors import InvalidEvent, InvalidSession
from outbox.registry import registry
from outbox.settings import Settings
from outbox.writer import connections, internals, registered, sessions
from outbox.writer.buffers import PendingEvent, Place, Share, is_repeat

AnySession: TypeAlias = (
    AsyncSession
    | Session
    | AsyncConnection
    | Connection
    | async_scoped_session[AsyncSession]
    | scoped_session[Session]
)
_SESSIONS = (AsyncSession, Session, AsyncConnection, Connection)
_NO_METADATA = b"{}"


SUBJECTS_KEPT_MAX = 1000  # checked subjects that one Outbox remembers


class Outbox:
    """Adds events of one service to transactions.

    Args:
        source_service: name of the service, in every envelope. Default: the settings' one, else
            that of the listener whose handler is running.
        settings: None means defaults, never the environment.
        bind_arguments: what names the connection, as in `Session.get_bind`, for sessions with
            several binds.

    Raises:
        InvalidEvent: `source_service` is not 1 to 255 printable characters.
    """

    def __init__(
        self,
        source_service: str | None = None,
        *,
        settings: Settings | None = None,
        bind_arguments: Mapping[str, object] | None = None,
    ) -> None:
        self.settings = Settings.defaults() if settings is None else settings
        name = self.settings.source_service if source_service is None else source_service
        self.source_service = None if name is None else check_source_service(name)
        self._place = Place(self.settings.schema_name, bind_arguments)
        self._prefixes = self.settings.subject_prefixes
        self._subjects: set[str] = set()  # those that were checked
        self._bytes_max = self.settings.event_bytes_max

    @overload
    def add(
        self,
        session: AnySession,
        subject: BaseModel,
        *,
        key: str | None = None,
        correlation_id: str | None = None,
        event_id: str | UUID | None = None,
        headers: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        deliver_at: datetime | None = None,
    ) -> str: ...
    @overload
    def add(
        self,
        session: AnySession,
        subject: str,
        payload: BaseModel | Mapping[str, Any],
        *,
        key: str | None = None,
        correlation_id: str | None = None,
        event_id: str | UUID | None = None,
        headers: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        deliver_at: datetime | None = None,
    ) -> str: ...
    def add(
        self,
        session: AnySession,
        subject: str | BaseModel,
        payload: BaseModel | Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        correlation_id: str | None = None,
        event_id: str | UUID | None = None,
        headers: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        deliver_at: datetime | None = None,
    ) -> str:
        """Add an event to the session's transaction; return its id.

        It is checked and encoded now and written just before COMMIT; without COMMIT it is gone.
        A transaction is begun when there is none. Later changes of `payload` have no effect.

        Args:
            subject: may be left out when `payload` is registered for one subject.
            payload: of a registered subject it is that model, or a mapping that it validates.
            key: events of one key are published in the order in which they were added. Default:
                what the payload's registration makes of it.
            event_id: a UUID of the caller's; a repeat in this transaction is dropped.
            deliver_at: not before this time, within a year.

        Raises:
            InvalidEvent: names the field and the rule; the transaction stays usable.
            InvalidSession: the session cannot carry events; nothing was changed.
            TypeError: the subject was left out, and the payload has none or several.
        """
        event = self._prepared(
            subject, payload, key, correlation_id, event_id, headers, metadata, deliver_at
        )
        _buffer(session, event, self._place)
        return event.event_id

    def _prepared(  # noqa: PLR0917 - positional, because it is called for each event
        self,
        subject: str | BaseModel,
        payload: BaseModel | Mapping[str, Any] | None,
        key: str | None,
        correlation_id: str | None,
        event_id: str | UUID | None,
        headers: Mapping[str, str] | None,
        metadata: Mapping[str, Any] | None,
        deliver_at: datetime | None,
    ) -> PendingEvent:
        """Return the event as it will be stored, checked in all its parts."""
        name: Any = subject
        content: object = payload
        if payload is None and isinstance(subject, BaseModel):
            name, content = registered.subject_of(subject), subject
        if type(name) is not str or name not in self._subjects:
            name = self._checked(name)
        known = registry.of(name)
        if known is not None or type(content) is not dict:
            content, key = registered.fitted(name, known, content, key)
        return self._finished(
            name, content, key, correlation_id, event_id, headers, metadata, deliver_at
        )

    def _finished(  # noqa: PLR0917 - as above
        self,
        subject: str,
        payload: object,
        key: str | None,
        correlation_id: str | None,
        event_id: str | UUID | None,
        headers: Mapping[str, str] | None,
        metadata: Mapping[str, Any] | None,
        deliver_at: datetime | None,
    ) -> PendingEvent:
        """Return the event as it will be stored; its subject was checked."""
        text = uuid7_text() if event_id is None else str(subjects.check_event_id(event_id))
        if key is not None:
            key = subjects.check_key(key)
        if deliver_at is not None:
            deliver_at = subjects.check_deliver_at(deliver_at)
        running = context.running.get()
        correlation = _correlation(correlation_id, running, text)
        lines = _header_lines(key, headers) if headers is not None or key is not None else b""
        data = encode_payload(payload)
        more = _metadata(metadata) if metadata is not None or running else _NO_METADATA
        body = encode(
            event_id=text,
            subject=subject,
            correlation_id=correlation,
            source_service=self.source_service or self._service(),
            data=data,
            metadata=more,
        )
        plain = lines  # a repeat may come from another span
        if tracing.installed is not None and not _has_trace(headers):
            lines += tracing.installed.header_lines()
        if len(lines) + len(body) > self._bytes_max:
            size = f"{len(lines) + len(body)} bytes, at most {self._bytes_max}"
            raise InvalidEvent("payload", f"headers and body have {size}")
        given = None
        if event_id is not None:
            given = (subject, key, plain, data, more, correlation, deliver_at)
        return PendingEvent(text, key, subject, lines, body, deliver_at, given)

    async def flush(self, session: AnySession) -> None:
        """Write now what the current transaction or savepoint has added; rarely needed.

        The order of a key is then the order of these writes. Events added before a savepoint that
        is still open on the connection stay buffered until COMMIT.

        Raises:
            sqlalchemy.exc.DBAPIError: passed through; the transaction can only be rolled back.
        """
        found = _unwrapped(session)
        if isinstance(found, AsyncSession):
            await found.run_sync(lambda each: sessions.write_now(each, last=False))
        elif isinstance(found, AsyncConnection):
            await found.run_sync(connections.write_early)
        elif isinstance(found, Session):
            sessions.write_now(found, last=False)
        else:
            connections.write_early(found)

    def _checked(self, given: object) -> str:
        subject = subjects.check_subject(given, self._prefixes)
        if len(self._subjects) < SUBJECTS_KEPT_MAX:
            self._subjects.add(subject)
        return subject

    def _service(self) -> str:
        running = context.running.get()
        return check_source_service(None if running is None else running.service)


class EnvironmentOutbox(Outbox):
    """The outbox of the `OUTBOX_*` variables, which are read at its first use.

    Raises:
        ConfigurationError: at the first use, when a variable is wrong.
    """

    def __init__(self) -> None:
        """Leave all attributes to the first use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        super().__init__(settings=Settings.from_environment())
        return object.__getattribute__(self, name)


environment_outbox = EnvironmentOutbox()


def add_dead_letter(
    events: Outbox,
    session: AnySession,
    original_subject: str,
    payload: BaseModel | Mapping[str, Any],
    *,
    correlation_id: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Add an event on the `dlq.` subject of `original_subject`; return its id.

    It has no key, so that it never waits behind others. Without a stream that takes `dlq.` subjects
    it stays in the outbox.

    Raises:
        InvalidEvent: names the field and the rule; the transaction stays usable.
        InvalidSession: the session cannot carry events; nothing was changed.
    """
    original = subjects.check_subject(original_subject, events.settings.subject_prefixes)
    event = events._finished(  # noqa: SLF001 - the one other way in, for reserved subjects
        subjects.dead_letter_subject(original),
        payload,
        None,
        correlation_id,
        None,
        None,
        metadata,
        None,
    )
    event.headers += encode_headers({subjects.HEADER_ORIGINAL_SUBJECT: original})
    _buffer(session, event, events._place)  # noqa: SLF001 - as above
    return event.event_id


def prepared(
    events: Outbox,
    subject: str | BaseModel,
    payload: BaseModel | Mapping[str, Any] | None = None,
    *,
    key: str | None = None,
    correlation_id: str | None = None,
    event_id: str | UUID | None = None,
    headers: Mapping[str, str] | None = None,
) -> PendingEvent:
    """Return the event that `add` would buffer, in no transaction.

    Raises:
        InvalidEvent: names the field and the rule.
        TypeError: the subject was left out, and the payload has none or several.
    """
    return events._prepared(  # noqa: SLF001 - for `outbox.testing`
        subject, payload, key, correlation_id, event_id, headers, None, None
    )


def held_by(session: AnySession) -> list[PendingEvent]:
    """Return what was added to the session's transaction, in the order of `add`.

    What was written early is among it only where `Ledger.keep_written` is set.
    """
    found = _unwrapped(session)
    if isinstance(found, AsyncSession):
        found = found.sync_session
    if isinstance(found, AsyncConnection):
        found = _started(found)
    held = sessions.held_by(found) if isinstance(found, Session) else connections.held_by(found)
    return sorted({event.order: event for event in held}.values(), key=attrgetter("order"))


def enqueue(session: AnySession, event: PendingEvent, *, schema: str) -> None:
    """Buffer a finished event of the library itself; little about it is checked.

    Raises:
        InvalidEvent: subject or key hold a line break, which would shift the INSERT's columns.
        InvalidSession: the session cannot carry events.
    """
    if "\n" in event.subject or "\n" in (event.key or ""):
        raise InvalidEvent("subject or key", "may not hold a line break", event.subject)
    _buffer(session, event, _place(schema))


def write_buffered(session: Session) -> int:
    """Write what the transaction has buffered, as `commit` would; return how many events.

    For a caller that commits right after, and wants to know that moment.
    """
    return sessions.write_now(session, last=True)


@lru_cache(maxsize=64)
def _place(schema: str) -> Place:
    return Place(schema)


def _correlation(given: str | None, running: context.Running | None, event_id: str) -> str:
    if given is not None:
        return subjects.check_text("correlation_id", given)
    by_hand = context.correlation_id.get()
    if by_hand is not None:
        return by_hand
    return event_id if running is None else running.correlation_id


def _header_lines(key: str | None, headers: Mapping[str, str] | None) -> bytes:
    if headers is not None:
        subjects.check_headers(headers)
        own = {} if key is None else {subjects.HEADER_KEY: key}
        return encode_headers(own | dict(headers))
    return b"" if key is None else f"{subjects.HEADER_KEY}: {key}\r\n".encode()


def _has_trace(headers: Mapping[str, str] | None) -> bool:
    """Return whether the caller has given a trace context."""
    return headers is not None and any(name.lower() in tracing.TRACE_HEADERS for name in headers)


def _metadata(given: Mapping[str, Any] | None) -> bytes:
    running = context.running.get()
    if given is not None and not isinstance(given, Mapping):
        raise InvalidEvent("metadata", f"must be a mapping, not {type(given).__name__}")
    cause = {} if running is None else {"causation_id": running.event_id}
    return encode_payload(cause | dict(given or {}), "metadata")


def _unwrapped(session: AnySession) -> AsyncSession | Session | AsyncConnection | Connection:
    if isinstance(session, _SESSIONS):
        return session
    if isinstance(session, async_scoped_session | scoped_session):
        return session.registry()
    kind = type(session).__name__
    raise InvalidSession(
        f"session must be an AsyncSession, Session, AsyncConnection or Connection, not {kind}"
    )


def _buffer(session: AnySession, event: PendingEvent, place: Place) -> None:
    found = session if isinstance(session, AsyncSession) else _unwrapped(session)
    if isinstance(found, AsyncSession):
        _buffer_in_session(found.sync_session, event, place, asynchronous=True)
    elif isinstance(found, Session):
        _buffer_in_session(found, event, place, asynchronous=False)
    elif isinstance(found, AsyncConnection):
        _buffer_in_connection(_started(found), event, place, asynchronous=True)
    else:
        _buffer_in_connection(found, event, place, asynchronous=False)


def _started(connection: AsyncConnection) -> Connection:
    try:
        found = connection.sync_connection
    except SQLAlchemyError as error:
        raise InvalidSession(f"the connection cannot be used: {error}") from error
    if found is None:
        raise InvalidSession("the connection was not started: use `async with` or await it")
    return found


def _buffer_in_session(
    session: Session, event: PendingEvent, place: Place, *, asynchronous: bool
) -> None:
    share, bind, savepoints, buffer = sessions.open_share(session, place, asynchronous=asynchronous)
    if event.content is None or not is_repeat(_known_to(bind, buffer), event):
        share.put(event, place.schema, bind, savepoints)


def _known_to(bind: object, buffer: sessions.Buffer) -> list[Share]:
    shares = buffer.open_shares()
    if isinstance(bind, Connection):
        shares.append(connections.ledger_of(bind).share)
    return shares


def _buffer_in_connection(
    connection: Connection, event: PendingEvent, place: Place, *, asynchronous: bool
) -> None:
    share = connections.open_share(connection, place, asynchronous=asynchronous)
    if event.content is None or not is_repeat([share], event):
        share.put(event, place.schema, connection, internals.savepoints(connection))
