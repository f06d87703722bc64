"""What all services told and did, compared: the table, and whether it is right. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from outbox.jetstream.provisioning import covers

COLUMNS = ("committed", "published", "handled", "duplicates absorbed", "dead letters")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is in one service's database at the end; ids are the events'."""

    told: Sequence[tuple[str, str]]  # id and subject of what it committed
    effects: Sequence[tuple[str, str]]  # id and listener of what it handled
    dead: Sequence[tuple[str, str]] = ()  # id and listener of what it gave up
    unpublished: int = 0  # rows left in its outbox
    duplicates: int = 0  # deliveries that an inbox knew already


@dataclass(frozen=True, slots=True)
class Verdict:
    """Everything that was found; `faults` judges it."""

    services: Mapping[str, Evidence]
    stored: Counter[str]  # how often the stream holds each event, copies on purpose left out
    listeners: Mapping[str, str]  # identity: the subjects it listens to
    poison: Sequence[str]  # identities, one for each dead letter that is meant to be
    _subjects: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for evidence in self.services.values():
            self._subjects.update(evidence.told)

    def faults(self) -> list[str]:
        """Return what is wrong; nothing when each commit had exactly its effects."""
        committed = [event_id for each in self.services.values() for event_id, _ in each.told]
        left = sum(each.unpublished for each in self.services.values())
        dead = [listener for each in self.services.values() for _, listener in each.dead]
        found = [
            *_counted("events committed more than once", _repeats(committed)),
            *_counted("events left in an outbox", left),
            *_counted("committed, not on the stream", len(set(committed) - self.stored.keys())),
            *_counted("on the stream, not committed", len(self.stored.keys() - set(committed))),
            *_counted("stored more than once", sum(n > 1 for n in self.stored.values())),
        ]
        if sorted(dead) != sorted(self.poison):
            found.append(f"dead letters of {sorted(dead)}, not of {sorted(self.poison)}")
        for listener, pattern in sorted(self.listeners.items()):
            found += self._faults_of(listener, pattern)
        return found

    def _faults_of(self, listener: str, pattern: str) -> Iterable[str]:
        wanted = {each for each, subject in self._subjects.items() if covers(pattern, subject)}
        dead = {e for each in self.services.values() for e, who in each.dead if who == listener}
        seen = Counter(
            event_id
            for each in self.services.values()
            for event_id, who in each.effects
            if who == listener
        )
        yield from _counted(f"{listener}: without an effect", len(wanted - dead - seen.keys()))
        yield from _counted(f"{listener}: more than one effect", sum(n > 1 for n in seen.values()))
        yield from _counted(f"{listener}: effects of nothing", len(seen.keys() - wanted))
        yield from _counted(f"{listener}: given up and handled", len(seen.keys() & dead))

    def rows(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the lines of the table, one for each service and one for all."""
        rows = [(name, self._row(each)) for name, each in self.services.items()]
        return [
            *rows,
            ("all", tuple(map(sum, zip(*(numbers for _, numbers in rows), strict=True)))),
        ]

    def _row(self, each: Evidence) -> tuple[int, ...]:
        published = sum(event_id in self.stored for event_id, _ in each.told)
        return len(each.told), published, len(each.effects), each.duplicates, len(each.dead)


def _counted(what: str, number: int) -> list[str]:
    return [f"{number} {what}"] if number else []


def _repeats(ids: Sequence[str]) -> int:
    return len(ids) - len(set(ids))
