"""The envelope: what is written to the stream, and what is read from it."""

import json
import os
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256
from math import isfinite
from typing import Any, Generic, NoReturn
from uuid import UUID, uuid5

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError, to_json
from typing_extensions import TypeVar

from outbox.errors import InvalidEvent, OutboxError, shorten
from outbox.registry import registry
from outbox.subjects import check_text

DEPTH_MAX = 100  # Python 3.11's json gives up at about 1,000 levels, 3.13's much later
BODY_BYTES_MAX = 64 * 1_048_576  # NATS servers cannot be configured above this payload
ID_CHARACTERS_MAX = 1024
_INTEGER_MIN, _INTEGER_MAX = -(2**63), 2**63 - 1
_LONG_NUMBER = re.compile(rb"\d{19}")
_EVENT_NAMESPACE = UUID("b6b1d9a2-5c53-5f0e-9b4f-2f5c86f0a7d1")
_FOREIGN_NAMESPACE = UUID("0d1c6c3e-8d4a-5be1-8a55-6d7f5b1f2a90")
_FALLBACK_NAMESPACE = UUID("5f9a7e04-1f38-5d0d-a4f1-3f2e0c9b6d77")
_CANONICAL_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")
_ENCODINGS = ("", "identity", "utf-8")

P_co = TypeVar("P_co", covariant=True, default=Mapping[str, Any])


@dataclass(frozen=True, slots=True)
class Delivery:
    """Where and how often a message was delivered."""

    attempt: int
    stream: str
    sequence: int
    redelivered: bool


@dataclass(frozen=True)
class EventEnvelope(Generic[P_co]):
    """An event as a handler sees it."""

    event_id: str
    event_type: str
    correlation_id: str
    source_service: str
    timestamp: datetime
    data: Mapping[str, Any]
    payload: P_co
    delivery: Delivery
    metadata: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Malformed(StrEnum):
    """Why a message is no event."""

    MALFORMED = "malformed"
    MISSING_FIELD = "missing_field"
    IDENTITY_MISMATCH = "identity_mismatch"
    WRONG_EVENT_TYPE = "wrong_event_type"
    UNSUPPORTED_ENCODING = "unsupported_encoding"


class MalformedMessage(OutboxError):  # noqa: N818 - named like what it is about
    """A message that is no event; it becomes a dead letter, never an ack alone."""

    def __init__(self, reason: Malformed, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


# ---- ids -------------------------------------------------------------------------------------

_tick = 0  # milliseconds and 12 more bits of the last id
_head = (0, "")  # a millisecond, and the characters that it gives an id
# Ids must be unique, not secret. A generator of our own, which `random.seed` does not reach, seeded
# by the system, and again in each forked child.
_random = random.Random()  # noqa: S311 - see above
os.register_at_fork(after_in_child=_random.seed)


def uuid7_text() -> str:
    """Return a UUID of version 7 as text, above all before it in this process (RFC 9562, 6.2).

    Text, because making a `UUID` and printing it again would be a fifth of the time of `add`.
    """
    global _tick, _head  # noqa: PLW0603 - one counter for the process
    tick = time.time_ns() // 1_000_000 << 12
    if tick <= _tick:
        tick = _tick + 1
    _tick = tick
    head = _head
    if head[0] != tick >> 12:
        digits = f"{tick >> 12:012x}"
        head = _head = (tick >> 12, f"{digits[:8]}-{digits[8:]}-7")
    tail = f"{_random.getrandbits(62) | 1 << 63:x}"
    return f"{head[1]}{tick & 0xFFF:03x}-{tail[:4]}-{tail[4:]}"


def added_at(event_id: str) -> float | None:
    """Return when an id of version 7 was made, in POSIX seconds; None for ids of other versions."""
    if event_id[14:15] != "7":
        return None
    return int(event_id[:8] + event_id[9:13], 16) / 1000


def uuid7() -> UUID:
    """Return a UUID of version 7, above all before it in this process."""
    return UUID(uuid7_text())


def event_id_for(source_service: str, subject: str, natural_key: str) -> str:
    """Return the one event id of this service, subject and natural key, the same for ever."""
    return str(uuid5(_EVENT_NAMESPACE, json.dumps([source_service, subject, natural_key])))


def inbox_key(event_id: str) -> UUID:
    """Return the inbox's key of an event id: the UUID itself, else a uuid5 of its characters."""
    if _CANONICAL_UUID.fullmatch(event_id):
        return UUID(event_id)
    return _uuid5(_FOREIGN_NAMESPACE, event_id.encode("utf-8", "surrogatepass"))


def fallback_key(stream: str, created: str, sequence: int, time: str, body: bytes) -> UUID:
    """Return a key for a message without a usable event id.

    The sequence alone would be used again after the stream lost its tail, hence the times.
    """
    parts = json.dumps([stream, created, sequence, time, sha256(body).hexdigest()])
    return _uuid5(_FALLBACK_NAMESPACE, parts.encode())


def _uuid5(namespace: UUID, name: bytes) -> UUID:
    """Return a uuid5 of bytes; the standard library's takes text only, and no lone surrogates."""
    return uuid5(namespace, name.decode("latin-1"))


# ---- writing ---------------------------------------------------------------------------------


def encode(
    *,
    event_id: str,
    subject: str,
    correlation_id: str,
    source_service: str,
    data: bytes,
    metadata: bytes = b"{}",
) -> bytes:
    """Return the finished body; `data` and `metadata` come from `encode_payload`, time is now.

    `event_id` and `subject` were checked, so neither needs escaping.
    """
    correlation = f'"{event_id}"' if correlation_id is event_id else _quote(correlation_id)
    head = (
        f'{{"event_id":"{event_id}","event_type":"{subject}",'
        f'"correlation_id":{correlation},"source_service":{_quote(source_service)},'
        f'"timestamp":"{_now()}","data":'
    )
    return b'%b%b,"metadata":%b}' % (head.encode(), data, metadata)


_second = ("", "")


def _now() -> str:
    """Return the time as RFC 3339; the text of its second is made once."""
    global _second  # noqa: PLW0603 - a cache of one entry
    digits = str(time.time_ns())
    cached = _second
    if cached[0] != digits[:-9]:
        second = datetime.fromtimestamp(int(digits[:-9]), UTC)
        cached = _second = (digits[:-9], second.isoformat()[:19])
    return f"{cached[1]}.{digits[-9:-3]}+00:00"


_quote = json.encoder.encode_basestring_ascii  # the C function behind json.dumps(str)


def encode_payload(payload: object, what: str = "payload") -> bytes:
    """Return a model or mapping as the bytes of a JSON object that every reader can read.

    Raises:
        InvalidEvent: names the path and the rule, and shows a shortened value.
    """
    plain = payload
    if type(payload) is not dict or not _is_plain(payload, 1):
        if isinstance(payload, BaseModel):
            return _encode_model(payload, what)
        if not isinstance(payload, Mapping):
            kind = type(payload).__name__
            raise InvalidEvent(what, f"must be a pydantic model or a mapping, not {kind}")
        plain = _normal(payload, what, "$", ())
    try:
        body = to_json(plain)
    except (PydanticSerializationError, ValueError):  # a lone surrogate
        _normal(plain, what, "$", ())
        raise InvalidEvent(what, "cannot be written as JSON") from None
    if b"\\u0000" in body:  # or a backslash before it, which is allowed
        _normal(plain, what, "$", ())
    return body


def _is_plain(value: dict[Any, Any], depth: int) -> bool:
    """Return True when nothing needs a closer look. Surrogates and NUL are seen in the bytes."""
    for key, item in value.items():
        if type(key) is not str:
            return False
        kind = type(item)
        if kind is str:
            continue
        if kind not in _PLAIN_KINDS:
            return False
        if kind is int:
            if not _INTEGER_MIN <= item <= _INTEGER_MAX:
                return False
        elif kind is float:
            if not isfinite(item):
                return False
        elif (kind is dict or kind is list) and not _is_plain_inside(item, depth + 1):
            return False
    return True


def _is_plain_inside(value: dict[Any, Any] | list[Any], depth: int) -> bool:
    if depth > DEPTH_MAX:
        return False
    if isinstance(value, dict):
        return _is_plain(value, depth)
    return all(_is_plain({"": item}, depth) for item in value)


_PLAIN_KINDS = frozenset((int, float, bool, type(None), dict, list))


def _normal(value: object, what: str, path: str, above: tuple[int, ...]) -> Any:
    """Return `value` in JSON's own types, or raise the error that names its path."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _normal_text(value, what, path)
    if isinstance(value, int | float):
        return _normal_number(value, what, path)
    if not isinstance(value, Mapping | list | tuple):
        kind = type(value).__name__
        rule = f"{kind} at {path} is not JSON; convert it, or use a pydantic model"
        raise InvalidEvent(what, rule)
    if id(value) in above:
        raise InvalidEvent(what, f"circular reference at {path[:80]}")
    if len(above) >= DEPTH_MAX:
        raise InvalidEvent(what, f"is deeper than {DEPTH_MAX} levels", path)
    above = (*above, id(value))
    if isinstance(value, Mapping):
        return {
            _normal_name(name, what, path): _normal(item, what, _step(path, name), above)
            for name, item in value.items()
        }
    return [_normal(item, what, f"{path}[{i}]", above) for i, item in enumerate(value)]


def _normal_number(value: float, what: str, path: str) -> float:
    if isinstance(value, int):
        if not _INTEGER_MIN <= value <= _INTEGER_MAX:
            raise InvalidEvent(what, f"integer at {path} has more than 64 bits; send it as text")
        return int(value)
    if not isfinite(value):
        raise InvalidEvent(what, f"NaN and Infinity are not JSON, at {path}", repr(value))
    return float(value)


def _step(path: str, name: object) -> str:
    return f"{path}.{shorten(name)}"


def _normal_name(name: object, what: str, path: str) -> str:
    if not isinstance(name, str):
        raise InvalidEvent(what, f"keys must be str at {path}, not {type(name).__name__}", name)
    return _normal_text(name, what, path)


def _normal_text(text: str, what: str, path: str) -> str:
    if "\x00" in text:
        raise InvalidEvent(what, f"NUL is not allowed in text, at {path}", text)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidEvent(what, f"lone surrogate at {path}", text) from None
    return str.__str__(text)


def _encode_model(model: BaseModel, what: str) -> bytes:
    name = type(model).__name__
    try:
        body = model.model_dump_json(warnings="error").encode()
    except Exception as error:  # noqa: BLE001 - the user's serializer may raise anything
        kind = type(error).__name__
        # `from None`, because pydantic's message shows the values
        raise InvalidEvent(what, f"{name} could not be serialised ({kind})") from None
    if not body.startswith(b"{"):
        raise InvalidEvent(what, f"{name} must serialise to a JSON object")
    if b"null" in body and _holds_nan(model.model_dump(), 0):  # pydantic writes NaN as null
        raise InvalidEvent(what, f"NaN and Infinity are not JSON, in {name}")
    if _is_suspicious(body):
        try:
            _normal(_load(body), what, "$", ())
        except ValueError as error:
            rule = str(error) if isinstance(error, InvalidEvent) else "is not strict JSON"
            raise InvalidEvent(what, f"{name}: {rule.removeprefix(f'{what}: ')}") from None
    return body


def _holds_nan(value: object, depth: int) -> bool:
    if isinstance(value, float):
        return not isfinite(value)
    if depth > DEPTH_MAX:
        return False
    if isinstance(value, Mapping):
        return any(_holds_nan(item, depth + 1) for item in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(_holds_nan(item, depth + 1) for item in value)
    return False


def _is_suspicious(body: bytes) -> bool:
    """Return True when a closer look is needed; true JSON text may be suspicious too."""
    return (
        b"\\u0000" in body
        or b"NaN" in body
        or b"Infinity" in body
        or body.count(b"{") + body.count(b"[") > DEPTH_MAX
        or _LONG_NUMBER.search(body) is not None
    )


def encode_headers(headers: Mapping[str, str]) -> bytes:
    """Return the finished lines `Name: value` of checked headers, each with its CRLF."""
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()


def decode_headers(lines: bytes) -> dict[str, str]:
    """Return the headers of finished lines."""
    pairs = (
        line.partition(":") for line in lines.decode(errors="surrogatepass").split("\r\n") if line
    )
    return {name: value.strip() for name, _, value in pairs}


# ---- reading ---------------------------------------------------------------------------------


def parse(
    body: bytes, *, subject: str, headers: Mapping[str, str], delivery: Delivery
) -> EventEnvelope[Mapping[str, Any]]:
    """Return the event that a message carries; unknown fields are ignored.

    Raises:
        MalformedMessage: it carries none; the reason says why.
    """
    found = {name.lower(): value for name, value in headers.items()}
    encoding = found.get("content-encoding", "").strip().lower()
    if encoding not in _ENCODINGS:
        raise MalformedMessage(Malformed.UNSUPPORTED_ENCODING, shorten(encoding))
    fields = _fields(body)
    event_id = _text(fields, "event_id")
    event_type = _text(fields, "event_type")
    _check_identity(event_id, found.get("nats-msg-id"))
    if event_type != subject:
        detail = f"'{shorten(event_type)}' on subject '{shorten(subject)}'"
        raise MalformedMessage(Malformed.WRONG_EVENT_TYPE, detail)
    data = _object(fields, "data", required=True)
    return EventEnvelope(
        event_id=event_id,
        event_type=event_type,
        correlation_id=_text(fields, "correlation_id", default=event_id),
        source_service=_text(fields, "source_service"),
        timestamp=_time(fields),
        data=data,
        payload=data,
        delivery=delivery,
        metadata=_object(fields, "metadata", required=False),
        key=found.get("outbox-key"),
        headers=dict(headers),
    )


def with_registered_payload(event: EventEnvelope[Any]) -> EventEnvelope[Any]:
    """Return the event with its payload as the model that is registered for its subject, if any.

    Validated as JSON, where strict models take text for times and ids too.

    Raises:
        pydantic.ValidationError: the data does not fit.
    """
    known = registry.of(event.event_type)
    if known is None:
        return event
    return replace(event, payload=known.payload.model_validate_json(to_json(event.data)))


def _fields(body: bytes) -> dict[str, Any]:
    if len(body) > BODY_BYTES_MAX:
        raise MalformedMessage(Malformed.MALFORMED, f"{len(body)} bytes, at most {BODY_BYTES_MAX}")
    try:
        loaded = _load(body)
        if not isinstance(loaded, dict):
            raise ValueError("not a JSON object")  # noqa: TRY301, TRY004 - told as the others are
        if body.count(b"{") + body.count(b"[") > DEPTH_MAX and _depth(loaded) > DEPTH_MAX:
            raise ValueError(f"deeper than {DEPTH_MAX} levels")  # noqa: TRY301 - as above
    except (ValueError, RecursionError) as error:
        detail = "too deep" if isinstance(error, RecursionError) else shorten(_message(error))
        raise MalformedMessage(Malformed.MALFORMED, detail) from None
    return loaded


def _message(error: Exception) -> str:
    """Return what the parser says, without the text that it was given."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _load(body: bytes) -> object:
    """Return what `body` says, strictly.

    Raises:
        ValueError: no JSON, NaN, Infinity, a number that is too large, or a repeated name.
    """
    return _decoder.decode(body.decode())


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError("a number is too large")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name is repeated")
    return names


_decoder = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
)


def _depth(value: object) -> int:
    """Return how deep containers are nested, without recursion."""
    deepest = 0
    level: list[Any] = [value]
    while level:
        level = [x for x in level if isinstance(x, dict | list)]
        deepest += bool(level)
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    return deepest


def _text(fields: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise MalformedMessage(Malformed.MISSING_FIELD, name)
    if not isinstance(value, str) or not 0 < len(value) <= ID_CHARACTERS_MAX:
        rule = f"{name} must be 1 to {ID_CHARACTERS_MAX} characters of text"
        raise MalformedMessage(Malformed.MALFORMED, rule)
    return value


def _object(fields: Mapping[str, Any], name: str, *, required: bool) -> Mapping[str, Any]:
    value = fields.get(name)
    if value is None and not required:
        return {}
    if value is None:
        raise MalformedMessage(Malformed.MISSING_FIELD, name)
    if not isinstance(value, dict):
        raise MalformedMessage(Malformed.MALFORMED, f"{name} must be an object")
    return value


def _time(fields: Mapping[str, Any]) -> datetime:
    text = _text(fields, "timestamp")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise MalformedMessage(Malformed.MALFORMED, "timestamp must be RFC 3339") from None
    # Older publishers wrote UTC without saying so.
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _check_identity(event_id: str, message_id: str | None) -> None:
    """Compare with `Nats-Msg-Id`: absent, equal, or a re-publication `<id>~rN`."""
    if message_id is None or message_id == event_id or message_id.startswith(event_id + "~"):
        return
    detail = f"event_id '{shorten(event_id)}' but Nats-Msg-Id '{shorten(message_id)}'"
    raise MalformedMessage(Malformed.IDENTITY_MISMATCH, detail)


def check_source_service(name: str | None) -> str:
    """Return `name`.

    Raises:
        InvalidEvent: it is missing, or not 1 to 255 printable characters.
    """
    if name is None:
        rule = "is required: Outbox(source_service=...) or OUTBOX_SOURCE_SERVICE"
        raise InvalidEvent("source_service", rule)
    return check_text("source_service", name)
