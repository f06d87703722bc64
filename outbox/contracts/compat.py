"""Listeners of GLAM's older messaging modules, run by ours: thin adapters.

`DataListener` runs handlers of the first generation, `on_message(data)`; `EnvelopeListener` those
of the second, `on_message(envelope)`. Both may also take the session, which new code should do.
"""

import inspect
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from typing_extensions import override

from outbox import context
from outbox.envelope import EventEnvelope
from outbox.jetstream.client import JetStreamClient
from outbox.listener import Disposition, Listener
from outbox.listener.handling import Handling
from outbox.settings import Settings
from outbox.telemetry import Observer

logger = logging.getLogger(__name__)

_DECLARED = ("subject", "queue_group", "service_name", "stream_name", "max_deliver", "ack_wait")


def _read_property(cls: type, name: str) -> None:
    """Replace a property by its value, which older classes compute of nothing but constants."""
    found = vars(cls).get(name)
    if not isinstance(found, property) or found.fget is None:
        return
    try:
        value = found.fget(object.__new__(cls))
    except Exception as error:
        raise TypeError(f"{cls.__name__}.{name} needs an instance: make it an attribute") from error
    setattr(cls, name, value)


def _session_first(handler: Callable[..., Any]) -> bool | None:
    """Return whether a handler takes the session before the event; None: it takes none."""
    names = list(inspect.signature(handler).parameters)[1:]
    if len(names) < 2:  # noqa: PLR2004 - session and event
        return None
    return names[1] != "session"


class OlderListener(Listener):
    """What both adapters share; subclass one of them, not this.

    `on_error(error, data)` gets what `on_message` got; True discards the event, which leaves a row.
    Class attributes may be written as properties, as older classes do: each is read once, when the
    class is made.

    A handler without a session parameter runs inside the listener's transaction all the same:
    `outbox.current_session()` returns it. One that commits a session of its own takes effect at
    least once, not exactly once; that is logged, once for each class.

    Args:
        logger: kept as `self.logger`; default: one named after the subclass's module.
        sessionmaker: of the database that holds this service's inbox. May also come second.

    Raises:
        TypeError: no sessionmaker was given.
    """

    on_message: Any  # of the older forms
    on_error: Any
    _session_first: ClassVar[bool | None] = None  # None: the handler takes no session

    @override
    def __init_subclass__(cls, **keywords: Any) -> None:
        for name in _DECLARED:
            _read_property(cls, name)
        super().__init_subclass__(**keywords)
        if "on_message" in vars(cls):
            cls._session_first = _session_first(cls.on_message)

    def __init__(
        self,
        js_client: JetStreamClient,
        logger: Any = None,
        sessionmaker: Any = None,
        *,
        settings: Settings | None = None,
        observer: Observer | None = None,
    ) -> None:
        if isinstance(logger, async_sessionmaker):
            logger, sessionmaker = sessionmaker, logger
        if sessionmaker is None:
            raise TypeError(f"{type(self).__name__} needs a sessionmaker: its inbox is there")
        self.logger = logger or logging.getLogger(type(self).__module__)
        super().__init__(js_client, sessionmaker, settings=settings, observer=observer)
        _watch_commits()

    def _argument(self, event: EventEnvelope) -> Any:
        """Return what the older handlers get of an event."""
        raise NotImplementedError

    @override
    async def handle(self, session: AsyncSession, event: EventEnvelope) -> None:
        """Call the older `on_message`."""
        connection = (await session.connection()).sync_connection
        token = _inside.set(_Inside(type(self), connection))
        try:
            await self._call(session, self._argument(event))
        finally:
            _inside.reset(token)

    def _call(self, session: AsyncSession, argument: Any) -> Awaitable[None]:
        handler: Callable[..., Awaitable[None]] = self.on_message
        if self._session_first is None:
            return handler(argument)
        return handler(session, argument) if self._session_first else handler(argument, session)

    async def _decided(self, error: Exception, event: EventEnvelope) -> Disposition | bool | None:
        answer = self.on_error(error, self._argument(event))
        decided: Disposition | bool | None = await answer if inspect.isawaitable(answer) else answer
        return decided

    @override
    def make_handling(self, kind: type[Handling] = Handling, **more: Any) -> Handling:
        handling = super().make_handling(kind, **more)
        handling.on_error = self._decided
        return handling


class DataListener(OlderListener):
    """Runs a handler of the first generation: `on_message(self, data: dict)`."""

    @override
    def _argument(self, event: EventEnvelope) -> Any:
        return dict(event.data)


class EnvelopeListener(OlderListener):
    """Runs a handler of the second generation: `on_message(self, envelope)`."""

    @override
    def _argument(self, event: EventEnvelope) -> Any:
        return event


@dataclass(frozen=True, slots=True)
class _Inside:
    """The adapter whose handler runs in this context, and the connection of its transaction."""

    listener: type[OlderListener]
    connection: Connection | None


_inside: ContextVar[_Inside | None] = ContextVar("outbox_older_handler", default=None)
_warned: set[type[OlderListener]] = set()


def _watch_commits() -> None:
    """Notice commits on all engines from now on; done by the first adapter, not by the import."""
    if not event.contains(Engine, "commit", _on_commit):
        event.listen(Engine, "commit", _on_commit)


def _on_commit(connection: Connection) -> None:
    inside, running = _inside.get(), context.running.get()
    if inside is None or running is None or running.session is None:
        return  # no older handler, or a task that has outlived it
    if connection is inside.connection or inside.listener in _warned:
        return
    _warned.add(inside.listener)
    logger.warning(
        "a handler commits a session of its own: its effect is at least once; "
        "use outbox.current_session()",
        extra={"listener_class": inside.listener.__qualname__, "event_id": running.event_id},
    )
