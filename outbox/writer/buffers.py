"""What a transaction has added and not yet written."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter

from sqlalchemy import Connection, Engine

from outbox.errors import InvalidEvent
from outbox.postgres import writing

_order = itertools.count()


@dataclass(eq=False, slots=True, frozen=True)
class Place:
    """Where an `Outbox` writes: the schema, and how a session with several binds finds it."""

    schema: str
    bind_arguments: Mapping[str, object] | None = None


class PendingEvent:
    """One buffered event: what is stored of it, and where. No dataclass: one is made each time."""

    __slots__ = (
        "bind",
        "body",
        "content",
        "deliver_at",
        "event_id",
        "headers",
        "key",
        "order",
        "savepoints",
        "schema",
        "subject",
    )
    schema: str
    bind: Engine | Connection
    savepoints: tuple[str, ...]  # open on the connection at `add`, outermost first

    def __init__(  # noqa: PLR0917 - positional, because one is made for each event
        self,
        event_id: str,
        key: str | None,
        subject: str,
        headers: bytes,
        body: bytes,
        deliver_at: datetime | None = None,
        content: object = None,  # what a repeat of a caller's event id must equal; None: it is ours
    ) -> None:
        self.event_id = event_id
        self.key = key
        self.subject = subject
        self.headers = headers
        self.body = body
        self.deliver_at = deliver_at
        self.content = content
        self.order = next(_order)

    def belongs_to(self, connection: Connection) -> bool:
        """Return True when this event is to be written on `connection`."""
        return self.bind is connection or self.bind is connection.engine


class Share:
    """What one transaction or savepoint owns."""

    __slots__ = ("binds", "items", "known")

    def __init__(self) -> None:
        self.items: list[PendingEvent] = []
        self.known: dict[str, PendingEvent] = {}  # the caller's own ids, also of those written
        self.binds: dict[Place, Engine | Connection] = {}  # places that were checked

    def put(
        self,
        item: PendingEvent,
        schema: str,
        bind: Engine | Connection,
        savepoints: tuple[str, ...],
    ) -> None:
        """Append an event that no open share knows, to be written through `bind`."""
        item.schema = schema
        item.bind = bind
        item.savepoints = savepoints
        self.items.append(item)
        if item.content is not None:
            self.known[item.event_id] = item

    def pour_into(self, other: "Share") -> None:
        """Hand everything over to the enclosing transaction."""
        other.items.extend(self.items)
        other.known.update(self.known)
        self.items, self.known = [], {}

    def roll_back(self, savepoint: str) -> None:
        """Drop what was added inside `savepoint`."""
        self.items = [item for item in self.items if savepoint not in item.savepoints]
        self.known = {
            key: item for key, item in self.known.items() if savepoint not in item.savepoints
        }

    def release(self, savepoint: str) -> None:
        """Count what was added inside `savepoint` to what surrounds it."""
        for item in (*self.items, *self.known.values()):
            if savepoint in item.savepoints:
                item.savepoints = item.savepoints[: item.savepoints.index(savepoint)]


def is_repeat(shares: Iterable[Share], event: PendingEvent) -> bool:
    """Return True when this transaction has added the same event already.

    Raises:
        InvalidEvent: it has added another event with this id.
    """
    for share in shares:
        known = share.known.get(event.event_id)
        if known is None:
            continue
        if known.content == event.content:
            return True
        rule = "was used in this transaction for an event with other content"
        raise InvalidEvent("event_id", rule, event.event_id)
    return False


def write(
    connection: Connection, shares: Iterable[Share], items: list[PendingEvent], *, notify: bool
) -> None:
    """Write `items` of `shares`; they leave the buffers only after the INSERT has returned."""
    items = sorted(items, key=attrgetter("order"))
    for schema in dict.fromkeys(item.schema for item in items):
        events = [item for item in items if item.schema == schema]
        writing.insert(connection, schema, events, notify=notify)
    written = {item.order for item in items}
    for share in shares:
        share.items = [item for item in share.items if item.order not in written]
