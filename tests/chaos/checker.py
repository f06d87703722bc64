"""The invariants, from the databases and, independently, from the stream.

The ledger is the truth: a row of it is written in the business transaction of its event. C is the
set of committed events, S what the stream holds, H the effects of a listener, D its dead letters.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tests.chaos import witness
from tests.chaos.acks import Acks
from tests.chaos.shared import CANARY, digest
from tests.chaos.stream import Stored

EXPECTED_DEAD = {"reject", "commits", "swallows"}  # the kinds that a listener may give up
SHOWN = 5  # examples of each violation


class Event(NamedTuple):
    """A committed event."""

    event_id: str
    subject: str
    key: str | None
    key_seq: int | None
    digest: str
    kind: str


class Effect(NamedTuple):
    """A row that a handler wrote."""

    listener: str
    event_id: str
    key: str | None
    key_seq: int | None
    digest: str
    failed: bool


@dataclass(frozen=True, slots=True)
class Database:
    """What one database holds at the end."""

    ledger: list[Event]
    left: list[str]  # in pending and waiting
    archive: list[tuple[str, int]]  # event id, sequence
    dead: list[Mapping[str, Any]]
    inbox: list[tuple[str, str, str]]  # listener, event id, outcome
    effects: list[Effect]
    held: int
    repaired: set[str]  # lost by the broker, and sent again
    replayed: set[str]  # sent again on purpose
    violations: Sequence[tuple[str, str]]  # of an invariant; what the triggers saw


@dataclass(slots=True)
class Report:
    """What was found."""

    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    figures: dict[str, int] = field(default_factory=dict)

    def add(self, invariant: str, what: str) -> None:
        """Note a violation."""
        self.found[invariant].append(what)

    def lines(self) -> Iterator[str]:
        """Return the violations, of each invariant a few."""
        for invariant, each in sorted(self.found.items()):
            yield f"{invariant}: {len(each)}"
            yield from (f"    {one}" for one in each[:SHOWN])


async def load(url: str, *, listens: bool) -> Database:
    """Read one database."""
    engine = create_async_engine(url)
    try:
        left = "SELECT event_id FROM outbox.pending UNION ALL SELECT event_id FROM outbox.waiting"
        dead = (
            "SELECT id, side, listener, CAST(event_id AS text) AS event_id, subject, reason,"
            " stream, sequence, error, state, attempts FROM outbox.dead_letter"
            " WHERE side = 'listener' OR state <> 'requeued'"
        )
        effects = "SELECT listener, event_id, key, key_seq, digest, failed FROM effects ORDER BY id"
        archive = "SELECT event_id, sequence FROM outbox.archive WHERE sequence > 0"
        inbox = "SELECT listener, event_id, outcome FROM outbox.inbox WHERE listener <> 'gone'"
        return Database(
            [
                Event(str(row[0]), *row[1:])
                for row in await _rows(
                    engine, "SELECT event_id, subject, key, key_seq, digest, kind FROM ledger"
                )
            ],
            [str(row[0]) for row in await _rows(engine, left)],
            [(str(row[0]), row[1]) for row in await _rows(engine, archive)],
            [row._mapping for row in await _rows(engine, dead)],
            [(row[0], str(row[1]), row[2]) for row in await _rows(engine, inbox)],
            [
                Effect(row[0], str(row[1]), *row[2:])
                for row in (await _rows(engine, effects) if listens else ())
            ],
            (await _rows(engine, "SELECT count(*) FROM outbox.held"))[0][0],
            await witness.sent_again(engine, "repaired"),
            await witness.sent_again(engine, "replayed"),
            await witness.seen(engine),
        )
    finally:
        await engine.dispose()


async def _rows(engine: AsyncEngine, sql: str) -> Sequence[Any]:
    async with engine.connect() as connection:
        return (await connection.execute(text(sql))).all()


@dataclass
class Checker:
    """Asserts the invariants of one run at its end, after it has healed and drained."""

    shop: Database
    warehouse: Database
    stored: list[Stored]
    subjects: Mapping[str, str]  # listener: the beginning of its subjects
    journal: Sequence[Mapping[str, Any]]
    acks: Acks
    report: Report = field(default_factory=Report)

    def check(self) -> Report:
        """Return every violation that there is."""
        for part in (
            self._published,
            self._copies,
            self._archived,
            self._handled,
            self._conserved,
            self._recorded,
            self._in_order,
            self._given_up,
            self._noted,
        ):
            part()
        self._count()
        return self.report

    @cached_property
    def committed(self) -> dict[str, Event]:
        """C."""
        return {each.event_id: each for each in (*self.shop.ledger, *self.warehouse.ledger)}

    @cached_property
    def refused(self) -> set[str]:
        """What the relays gave up: kept, not published."""
        both = (*self.shop.dead, *self.warehouse.dead)
        return {each["event_id"] for each in both if each["side"] == "relay"}

    @cached_property
    def repaired(self) -> set[str]:
        """What the broker had acknowledged and lost, and the relays sent again."""
        return self.shop.repaired | self.warehouse.repaired

    def _published(self) -> None:
        """S1, S2, S7, S13 and L1, from the stream."""
        committed, refused = self.committed, self.refused
        events = [each for each in self.stored if not each.subject.startswith("dlq.")]
        stored = {each.event_id for each in events}
        left = {*self.shop.left, *self.warehouse.left}
        safe = stored | left | refused
        for known in committed.values():
            if known.event_id not in safe:
                self.report.add("S1 lost", f"{known}")
        for each in events:
            event = committed.get(each.event_id)
            if event is None:
                self.report.add("S2 ghost", f"{each.event_id} {each.data}")
            elif (each.subject, each.key) != (event.subject, event.key):
                self.report.add("S7 changed on the stream", f"{each} {event}")
            elif digest(each.data | {"mark": each.mark}) != event.digest:
                self.report.add("S7 changed on the stream", f"{each.event_id}")
            if each.data.get("kind") in {"failed", "ghost"}:
                self.report.add("S13 event of a failed attempt", f"{each.event_id}")
        for event_id in left:
            self.report.add("L1 not drained", event_id)

    def _copies(self) -> None:
        """S16: an event is stored twice only where it was sent again: repaired, or replayed."""
        again = self.repaired | self.shop.replayed | self.warehouse.replayed
        copies: dict[str, list[str]] = defaultdict(list)
        for each in self.stored:
            copies[each.event_id].append(each.message_id)
        for event_id, ids in copies.items():
            if len(ids) > 1 and event_id not in again:
                self.report.add("S16 copies without a cause", f"{event_id}: {ids}")
        self.report.figures["stored more than once"] = sum(len(ids) > 1 for ids in copies.values())

    def _archived(self) -> None:
        """S8: what counts as published is at the sequence that the archive names."""
        at = {each.sequence: each.event_id for each in self.stored}
        archived: Counter[str] = Counter()
        for event_id, sequence in (*self.shop.archive, *self.warehouse.archive):
            archived[event_id] += 1
            if at.get(sequence) != event_id:
                self.report.add("S8 published without evidence", f"{event_id} at {sequence}")
        for each in self.stored:
            if not archived[each.event_id]:
                self.report.add("S8 published, not archived", f"{each.event_id}")

    def _handled(self) -> None:
        """S3, S7 and S13, of each effect."""
        committed = self.committed
        done = Counter((effect.listener, effect.event_id) for effect in self.warehouse.effects)
        for effect in self.warehouse.effects:
            event = committed.get(effect.event_id)
            if effect.failed:
                self.report.add("S13 effect of a failed attempt", f"{effect}")
            if event is None or event.digest != effect.digest:
                self.report.add("S7 changed when handled", f"{effect}")
        for where, number in done.items():
            if number > 1:
                self.report.add("S3 two effects", f"{where}: {number}")

    def _conserved(self) -> None:
        """S5: each listener has handled or given up, once, whatever it was to have."""
        for listener, beginning in self.subjects.items():
            dead = {each["event_id"] for each in self._dead_of(listener)}
            done = {e.event_id for e in self.warehouse.effects if e.listener == listener}
            for event in self.committed.values():
                if event.event_id in self.refused or not event.subject.startswith(beginning):
                    continue
                ends = (event.event_id in done) + (event.event_id in dead)
                if ends != 1:
                    self.report.add("S5 not handled once", f"{listener} {event}: {ends} ends")

    def _dead_of(self, listener: str) -> list[Mapping[str, Any]]:
        return [
            each
            for each in self.warehouse.dead
            if each["listener"] == listener and each["state"] != "handled"
        ]

    def _recorded(self) -> None:
        """S4: the inbox says handled exactly where there is an effect."""
        handled = {
            (name, each) for name, each, outcome in self.warehouse.inbox if outcome == "handled"
        }
        effects = {(each.listener, each.event_id) for each in self.warehouse.effects}
        for listener, event_id in handled - effects:
            self.report.add("S4 inbox without an effect", f"{listener} {event_id}")
        for listener, event_id in effects - handled:
            self.report.add("S4 effect without the inbox", f"{listener} {event_id}")
        if self.warehouse.held:
            self.report.add("L1 not drained", f"{self.warehouse.held} held")

    def _in_order(self) -> None:
        """S6: of each key, first copies on the stream, and effects of the ordered listener.

        A key of which an event was repaired is left out: order is not promised across a loss.
        """
        repaired = {each.key for each in self.stored if each.event_id in self.repaired}
        committed = self.committed
        first: dict[str, int] = {}
        for each in self.stored:
            first.setdefault(each.event_id, each.sequence)
        by_key: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for event_id, sequence in first.items():
            event = committed.get(event_id)
            if event is not None and event.key is not None and event.key not in repaired:
                by_key[event.key].append((sequence, int(event.key_seq or 0)))
        self.report.figures["keys whose order was checked"] = len(by_key)
        for key, places in by_key.items():
            numbers = [number for _, number in sorted(places)]
            if numbers != sorted(numbers):
                self.report.add("S6 out of order on the stream", f"{key}: {numbers}")
        handled: dict[str, list[int]] = defaultdict(list)
        requeued = {each["event_id"] for each in self.warehouse.dead if each["state"] == "handled"}
        for effect in self.warehouse.effects:
            if effect.listener == "warehouse-ordered" and effect.event_id not in requeued:
                handled[effect.key or ""].append(int(effect.key_seq or 0))
        for key, numbers in handled.items():
            if key not in repaired and numbers != sorted(numbers):
                self.report.add("S6 handled out of order", f"{key}: {numbers}")

    def _given_up(self) -> None:
        """S12, and that nothing was given up for what was nobody's failure."""
        committed = self.committed
        letters = {
            each.data["dead_letter_id"]: each.data
            for each in self.stored
            if each.subject.startswith("dlq.")
        }
        for each in (*self.shop.dead, *self.warehouse.dead):
            event = committed.get(each["event_id"])
            wanted = {"big"} if each["side"] == "relay" else EXPECTED_DEAD
            if event is None or event.kind not in wanted:
                what = f"{each['side']} {each['listener']} {each['reason']} {each['error']} {event}"
                self.report.add("S12 given up without a reason", what)
            said = letters.get(each["id"], {})
            if each["side"] == "listener" and not _original(each).items() <= said.items():
                self.report.add("S12 no event tells of a dead letter", f"{each} {said}")
        twice = Counter((each["listener"], each["event_id"]) for each in self.warehouse.dead)
        for where, number in twice.items():
            if number > 1:
                self.report.add("S12 two dead letters", f"{where}: {number}")

    def _noted(self) -> None:
        """S9, S10, S14 and S15 as the triggers saw them, S11, and what processes noted."""
        for invariant, what in (*self.shop.violations, *self.warehouse.violations):
            self.report.add(invariant, what)
        for what in self.acks.found:
            self.report.add("S11 acked before it was committed", what)
        if not self.acks.looked_at:
            self.report.add("S11 acked before it was committed", "nobody has looked")
        for line in self.journal:
            if line["what"] == "below_floor":
                self.report.add("floor", f"{line['rows']} rows were found below it")

    def _count(self) -> None:
        self.report.figures |= {
            "committed": len(self.committed),
            "stored": len(self.stored),
            "effects": len(self.warehouse.effects),
            "dead letters": len(self.warehouse.dead) + len(self.shop.dead),
            "acked, looked at": self.acks.looked_at,
            "repaired": sum(
                int(line["count"]) for line in self.journal if line["what"] == "step:repaired"
            ),
        }


def _original(letter: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a `dlq.` event must say of its dead letter."""
    names = {"listener": "listener", "subject": "original_subject", "stream": "stream"}
    names |= {"event_id": "original_event_id", "sequence": "sequence", "reason": "reason"}
    return {name: letter[column] for column, name in names.items()}


def leaks(folder: Path) -> list[str]:
    """S17: return the logs that show a payload or a password."""
    return [
        path.name for path in sorted(folder.glob("*.log")) if CANARY.encode() in path.read_bytes()
    ]
