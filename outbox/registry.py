"""Which payload belongs to which subject: one registry for a process.

```python
@outbox.register("evt.order.placed.v1", key=lambda placed: str(placed.order_id))
class OrderPlaced(BaseModel):
    order_id: UUID
```
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

_SUBJECT = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
P = TypeVar("P", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Registration:
    """One subject and the payload of its events."""

    subject: str
    payload: type[BaseModel]
    key: Callable[[Any], str | None] | None = None  # orders events for which `add` was given none
    deprecated_by: str | None = None  # the later name of the same fact


class Registry:
    """Payloads by subject. A subject has one payload; a payload may serve several subjects."""

    def __init__(self) -> None:
        self._by_subject: dict[str, Registration] = {}

    def register(
        self,
        *subjects: str,
        key: Callable[[Any], str | None] | None = None,
        deprecated_by: str | None = None,
    ) -> Callable[[type[P]], type[P]]:
        """Return a decorator that makes a model the payload of `subjects`.

        The same class from a module that was loaded again replaces the older one.

        Args:
            key: makes the ordering key of an event from its payload; None: the event has none.
            deprecated_by: the subject that newer publishers use for the same fact.

        Raises:
            TypeError: no subject, no pydantic model, or the subject has another payload already.
            ValueError: a subject has wildcards, empty tokens or other characters than letters,
                digits, `-` and `_`.
        """
        if not subjects:
            raise TypeError("register needs at least one subject")
        names = [_plain(subject) for subject in subjects]
        later = None if deprecated_by is None else _plain(deprecated_by)

        def decorate(payload: type[P]) -> type[P]:
            if not (isinstance(payload, type) and issubclass(payload, BaseModel)):
                raise TypeError(f"a payload must be a pydantic model, not {payload!r}")
            for name in names:
                self._refuse_second(name, payload)
            for name in names:
                self._by_subject[name] = Registration(name, payload, key, later)
            return payload

        return decorate

    def of(self, subject: str) -> Registration | None:
        """Return what is registered for exactly this subject."""
        return self._by_subject.get(subject)

    def subjects_of(self, payload: type[BaseModel]) -> tuple[str, ...]:
        """Return the subjects of exactly this class, in the order of their registration."""
        return tuple(each.subject for each in self._by_subject.values() if each.payload is payload)

    def matching(self, pattern: str) -> list[Registration]:
        """Return the registrations whose subject a NATS pattern with `*` and `>` matches."""
        wanted = pattern.split(".")
        return [each for each in self if _matches(wanted, each.subject.split("."))]

    def __iter__(self) -> Iterator[Registration]:
        """Iterate in the order of subjects."""
        return iter(sorted(self._by_subject.values(), key=lambda each: each.subject))

    def __len__(self) -> int:
        return len(self._by_subject)

    def _refuse_second(self, subject: str, payload: type[BaseModel]) -> None:
        known = self._by_subject.get(subject)
        if known is not None and _name(known.payload) != _name(payload):
            raise TypeError(
                f"'{subject}' is registered with {_name(known.payload)} already, "
                f"not with {_name(payload)}"
            )


def _plain(subject: str) -> str:
    """Return a subject, also a member of a StrEnum, as a plain str."""
    if not isinstance(subject, str):
        raise TypeError(f"a subject must be a str, not {type(subject).__name__}")
    if not _SUBJECT.fullmatch(subject):
        raise ValueError(f"a registered subject may hold letters, digits, '-', '_': {subject!r}")
    return str.__str__(subject)


def _name(payload: type[BaseModel]) -> str:
    return f"{payload.__module__}.{payload.__qualname__}"


def _matches(pattern: list[str], tokens: list[str]) -> bool:
    """Return True when a pattern matches; `>` stands for one token or more (NATS, Subjects)."""
    for index, token in enumerate(pattern):
        if token == ">":  # noqa: S105 - of a subject
            return len(tokens) > index
        if index >= len(tokens) or token not in {"*", tokens[index]}:
            return False
    return len(tokens) == len(pattern)


registry = Registry()
register = registry.register
