"""What a listener class declares, checked when the class is made."""

import math
import re
import types
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from outbox.registry import registry
from outbox.settings import OnDead

_GROUP = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOKEN = r"(?:[A-Za-z0-9_-]+|\*)"  # noqa: S105 - of a subject
_PATTERN = re.compile(rf"{_TOKEN}(?:\.{_TOKEN})*(?:\.>)?|>")
_TEXTS = frozenset({"subject", "queue_group", "service_name", "stream_name"})
_DURATIONS = frozenset({"timeout", "ack_wait"})
_COUNTS = frozenset({"max_attempts", "max_deliver", "concurrency", "batch_size"})
_REQUIRED = ("subject", "queue_group")


def check(cls: type, *, handler: str) -> None:
    """Check the public attributes of `cls`, and that it declares all if it has a `handler`.

    Names with a leading underscore, callables and descriptors are free.

    Raises:
        TypeError: one is missing, unknown or ill-typed; names the class and the attribute.
    """
    for name, value in list(vars(cls).items()):
        if name.startswith("_") or callable(value) or hasattr(value, "__get__"):
            continue
        _check_one(cls, name, value)
    if "max_deliver" in vars(cls):
        setattr(cls, "max_attempts", cls.max_deliver)  # type: ignore[attr-defined]  # noqa: B010
    for name in _DURATIONS & vars(cls).keys():
        setattr(cls, name, duration(getattr(cls, name)))
    if getattr(cls, "on_dead", None) == OnDead.PARK_KEY and not getattr(cls, "ordered", False):
        raise TypeError(f"{cls.__name__}.on_dead = 'park_key' needs ordered = True")
    if not any(handler in vars(base) for base in cls.__mro__[: _depth(cls, handler)]):
        return
    for name in _REQUIRED:
        if not getattr(cls, name, ""):
            raise TypeError(f"{cls.__name__}.{name} is missing: a listener needs it")


def _depth(cls: type, handler: str) -> int:
    """Return how many classes come before the library's own, which defines `handler` too."""
    owners = [i for i, base in enumerate(cls.__mro__) if handler in vars(base)]
    return owners[-1] if owners else 0


def _check_one(cls: type, name: str, value: object) -> None:
    where = f"{cls.__name__}.{name}"
    if name in _TEXTS:
        _check_text(where, name, value)
    elif name in _DURATIONS:
        _check_duration(where, value)
    elif name in _COUNTS:
        if type(value) is not int or value < 1:
            raise TypeError(f"{where} must be a whole number from 1, not {value!r}")
    elif name == "ordered":
        if not isinstance(value, bool):
            raise TypeError(f"{where} must be True or False, not {value!r}")
    elif name == "on_dead":
        if value not in set(OnDead):
            raise TypeError(f"{where} must be 'continue' or 'park_key', not {value!r}")
    else:
        known = ", ".join(sorted(_TEXTS | _DURATIONS | _COUNTS | {"ordered", "on_dead"}))
        raise TypeError(
            f"{where} is not an attribute of listeners ({known}); "
            "begin the name with an underscore to keep your own"
        )


def _check_text(where: str, name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{where} must be a str, not {type(value).__name__}")
    pattern = _PATTERN if name == "subject" else _GROUP
    if not pattern.fullmatch(value):
        raise TypeError(f"{where} = {value!r} must match {pattern.pattern}")


def _check_duration(where: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | timedelta):
        raise TypeError(f"{where} must be a timedelta or seconds, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{where} must be a finite number of seconds, not {value}")
    if duration(value) <= timedelta(0):
        raise TypeError(f"{where} must be above 0 seconds")


def duration(value: timedelta | float) -> timedelta:
    """Return a timedelta; a number is seconds."""
    return value if isinstance(value, timedelta) else timedelta(seconds=value)


def payload_type(cls: type, generic: type) -> Any:
    """Return what `class C(generic[Payload])` names as its payload; None for plain data."""
    for base in cls.__mro__:
        for declared in getattr(base, "__orig_bases__", ()):
            origin = get_origin(declared)
            if not (isinstance(origin, type) and issubclass(origin, generic)):
                continue
            (payload,) = get_args(declared) or (None,)
            if payload is None or isinstance(payload, TypeVar) or _is_plain(payload):
                continue
            return payload
    return None


def check_registered(cls: type, subject: str, payload: object) -> None:
    """Check that a typed listener takes what is registered for the subjects it matches.

    Raises:
        TypeError: one of them has another payload; names the class, the subject and both payloads.
    """
    if payload is None or payload is Any:
        return
    members = _members(payload)
    for known in registry.matching(subject):
        if not any(isinstance(each, type) and issubclass(known.payload, each) for each in members):
            wanted = " | ".join(getattr(each, "__name__", str(each)) for each in members)
            raise TypeError(
                f"{cls.__name__} takes {wanted}, but {known.subject} is registered with "
                f"{known.payload.__name__}"
            )


def _members(payload: object) -> tuple[object, ...]:
    """Return the members of a union, also of an annotated one; else the payload alone."""
    origin = get_origin(payload)
    if origin is Annotated:
        return _members(get_args(payload)[0])
    if origin in {Union, types.UnionType}:
        return tuple(one for each in get_args(payload) for one in _members(each))
    return (payload,)


def _is_plain(payload: object) -> bool:
    origin = get_origin(payload) or payload
    if isinstance(origin, types.UnionType) or not isinstance(origin, type):
        return False
    return issubclass(origin, Mapping)
