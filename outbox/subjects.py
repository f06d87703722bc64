"""What subjects, event ids, keys and headers may look like; all of it pure."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from uuid import UUID

from outbox.errors import InvalidEvent

SUBJECT_CHARACTERS_MAX = 255
KEY_CHARACTERS_MAX = 255
TEXT_CHARACTERS_MAX = 255
HEADERS_MAX = 64
HEADER_BYTES_MAX = 32_768  # the server refuses a header block above 64 KiB (NATS error 10097)
SCHEDULE_MAX = timedelta(days=365)
DEAD_LETTER_PREFIX = "dlq."
HEADER_KEY = "Outbox-Key"
HEADER_ORIGINAL_SUBJECT = "Outbox-Original-Subject"

_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
_SUBJECT = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)+")
_HEADER_NAME = re.compile(r"[!-9;-~]+")  # visible ASCII without the colon
_HEADER_VALUE = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?")
_KEY = re.compile(r"[!-~]{1,255}")
_UUID = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")
# Control headers of the server, our own, and one that would change how the body is read.
_RESERVED_HEADERS = ("nats-", "outbox-", "content-encoding")


def check_subject(subject: object, prefixes: Sequence[str] = ("evt.", "cmd.")) -> str:
    """Return `subject` as a plain str.

    Raises:
        InvalidEvent: it has wildcards, empty tokens, other characters than letters, digits, `-`
            and `_`, more than 255 characters, or begins with none of `prefixes`.
    """
    if not isinstance(subject, str):
        raise InvalidEvent("subject", f"must be a str, not {type(subject).__name__}")
    return _checked_subject(str.__str__(subject), tuple(prefixes))


@lru_cache(maxsize=2048)
def _checked_subject(subject: str, prefixes: tuple[str, ...]) -> str:
    if not subject:
        raise InvalidEvent("subject", "is required")
    if len(subject) > SUBJECT_CHARACTERS_MAX:
        length = len(subject)
        raise InvalidEvent(
            "subject", f"has {length} characters, at most {SUBJECT_CHARACTERS_MAX}", subject
        )
    for position, character in enumerate(subject):
        if (rule := _subject_character_rule(character)) is not None:
            raise InvalidEvent("subject", f"{rule} at position {position}", subject)
    if not all(subject.split(".")):
        raise InvalidEvent("subject", "has an empty token", subject)
    if subject.startswith("$"):
        raise InvalidEvent("subject", "the prefix $ is reserved", subject)
    if subject.startswith(DEAD_LETTER_PREFIX):
        raise InvalidEvent("subject", "the prefix dlq. is reserved for dead letters", subject)
    if not subject.startswith(prefixes):
        raise InvalidEvent("subject", f"must begin with one of {', '.join(prefixes)}", subject)
    if not _SUBJECT.fullmatch(subject):
        raise InvalidEvent("subject", "may hold letters, digits, '-' and '_' only", subject)
    return subject


def _subject_character_rule(character: str) -> str | None:
    """Return what is wrong with one character of a subject; `$` is judged as a prefix."""
    if character in ".$" or _TOKEN.fullmatch(character):
        return None
    if "\ud800" <= character <= "\udfff":
        return "lone surrogate"
    if unicodedata.category(character) == "Zs":
        return "whitespace"
    if unicodedata.category(character) == "Cc":
        return "control character"
    return "wildcard" if character in "*>" else "another character than letters, digits, '-', '_'"


def dead_letter_subject(subject: str) -> str:
    """Return the subject that a dead letter of `subject` is published on.

    `evt.order.created.v1` and `cmd.order.created.v1` share `dlq.order.created.v1`; a dead letter
    of a dead letter stays where it is.
    """
    if subject.startswith(DEAD_LETTER_PREFIX):
        return subject
    _, _, rest = subject.partition(".")
    return DEAD_LETTER_PREFIX + (rest or subject)


def check_event_id(event_id: str | UUID) -> UUID:
    """Return `event_id` as a UUID.

    Raises:
        InvalidEvent: it is neither a UUID nor one's canonical text.
    """
    if isinstance(event_id, UUID):
        return event_id
    if not isinstance(event_id, str):
        raise InvalidEvent("event_id", f"must be a UUID, not {type(event_id).__name__}")
    if not _UUID.fullmatch(event_id):
        hint = "must be a UUID; event_id_for(...) makes one of a natural key"
        raise InvalidEvent("event_id", hint, event_id)
    return UUID(event_id)


def check_key(key: str) -> str:
    """Return `key` as a plain str.

    Raises:
        InvalidEvent: it is not 1 to 255 visible ASCII characters.
    """
    if not isinstance(key, str):
        raise InvalidEvent("key", f"must be a str, not {type(key).__name__}")
    if not _KEY.fullmatch(key):
        rule = f"must be 1 to {KEY_CHARACTERS_MAX} visible ASCII characters"
        raise InvalidEvent("key", rule, key)
    return str.__str__(key)


def is_key(text: str) -> bool:
    """Return whether `text` is a key that `add` would take."""
    return _KEY.fullmatch(text) is not None


def check_text(field: str, text: str) -> str:
    """Return `text`, a correlation id or a service name, as a plain str.

    Raises:
        InvalidEvent: it is not 1 to 255 printable characters.
    """
    if not isinstance(text, str):
        raise InvalidEvent(field, f"must be a str, not {type(text).__name__}")
    if not 0 < len(text) <= TEXT_CHARACTERS_MAX or not text.isprintable():
        rule = f"must be 1 to {TEXT_CHARACTERS_MAX} printable characters"
        raise InvalidEvent(field, rule, text)
    return str.__str__(text)


def check_headers(headers: Mapping[str, str]) -> None:
    """Check a user's headers.

    Raises:
        InvalidEvent: a name is reserved, empty, repeated in another case or not visible ASCII; a
            value is not ASCII, or has control characters or space around it; or there are too many.
    """
    if not isinstance(headers, Mapping):
        rule = f"must be a mapping of str to str, not {type(headers).__name__}"
        raise InvalidEvent("headers", rule)
    if len(headers) > HEADERS_MAX:
        raise InvalidEvent("headers", f"has {len(headers)} entries, at most {HEADERS_MAX}")
    seen: set[str] = set()
    size = 0
    for name, value in headers.items():
        _check_header(name, value)
        if name.lower() in seen:
            raise InvalidEvent("headers", "name is repeated in another case", name)
        seen.add(name.lower())
        size += len(name) + len(value) + 4
    if size > HEADER_BYTES_MAX:
        raise InvalidEvent("headers", f"have {size} bytes, at most {HEADER_BYTES_MAX}")


def _check_header(name: object, value: object) -> None:
    if not isinstance(name, str) or not isinstance(value, str):
        kinds = f"{type(name).__name__} to {type(value).__name__}"
        raise InvalidEvent("headers", f"must be a mapping of str to str, not of {kinds}")
    if not name:
        raise InvalidEvent("headers", "name is empty")
    if not _HEADER_NAME.fullmatch(name):
        raise InvalidEvent("headers", "name may hold visible ASCII without ':' only", name)
    if name.lower().startswith(_RESERVED_HEADERS):
        raise InvalidEvent("headers", "name is reserved", name)
    if _HEADER_VALUE.fullmatch(value):
        return
    if value != value.strip():
        raise InvalidEvent(f"headers[{name}]", "may not have space around it", value)
    raise InvalidEvent(f"headers[{name}]", "may hold printable ASCII only", value)


def check_deliver_at(deliver_at: datetime) -> datetime:
    """Return `deliver_at`.

    Raises:
        InvalidEvent: it is naive, or further than 365 days from now.
    """
    if not isinstance(deliver_at, datetime):
        raise InvalidEvent("deliver_at", f"must be a datetime, not {type(deliver_at).__name__}")
    if deliver_at.tzinfo is None or deliver_at.utcoffset() is None:
        raise InvalidEvent("deliver_at", "must have a time zone", deliver_at.isoformat())
    try:
        distance = abs(deliver_at - datetime.now(UTC))
    except OverflowError:
        distance = timedelta.max
    if distance > SCHEDULE_MAX:
        days = SCHEDULE_MAX.days
        raise InvalidEvent("deliver_at", f"must be within {days} days", deliver_at.isoformat())
    return deliver_at
