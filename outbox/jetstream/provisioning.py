"""Streams and consumers: checked against what we need, created when asked, never overwritten.

Raw JSON throughout: nats-py's dataclasses drop fields that they do not know.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from outbox.errors import ConfigurationError
from outbox.jetstream.api import Api, ApiError

log = logging.getLogger(__name__)

API_LEVEL_ATOMIC = 2  # nats-server 2.12 knows allow_atomic
MAX_AGE = timedelta(hours=24)
DUPLICATE_WINDOW = timedelta(minutes=5)
STREAM_NOT_FOUND = 10059
_LAST_BYTES = 1_048_576  # with less room than this a stream counts as full
CONSUMER_NOT_FOUND = 10014
_STREAM_EXISTS = 10058
_CONSUMER_EXISTS = 10148
_CONSUMER_NAME_TAKEN = 10013
_NAME = re.compile(r"[A-Za-z0-9_-]{1,255}")
_DURATIONS = frozenset({"max_age", "duplicate_window", "subject_delete_marker_ttl"})
_WATCHED = ("storage", "retention", "discard", "allow_direct", "allow_atomic", "duplicate_window")


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """A stream as it is: its raw configuration and state, and how it differs from our advice."""

    name: str
    config: Mapping[str, Any]
    state: Mapping[str, Any]
    created: str
    drift: tuple[str, ...] = ()
    made: bool = False

    @property
    def limits_subjects(self) -> bool:
        """True when one subject may be full while the others are not."""
        per_subject = int(self.config.get("max_msgs_per_subject") or 0)
        return per_subject > 0 and bool(self.config.get("discard_new_per_subject"))

    @property
    def is_full(self) -> bool:
        """True when the stream as a whole takes nothing more, or hardly anything."""
        messages, size = (
            int(self.config.get("max_msgs") or 0),
            int(self.config.get("max_bytes") or 0),
        )
        return (0 < messages <= int(self.state.get("messages") or 0)) or (
            0 < size <= int(self.state.get("bytes") or 0) + _LAST_BYTES
        )

    @property
    def max_age(self) -> timedelta | None:
        """How long messages are kept; None is for ever."""
        return _from_nanoseconds(self.config.get("max_age", 0))

    @property
    def duplicate_window(self) -> timedelta:
        """How long the stream remembers `Nats-Msg-Id`."""
        return _from_nanoseconds(self.config.get("duplicate_window", 0)) or timedelta(0)


async def api_level(client: Api) -> int:
    """Return the server's JetStream API level; 0 before nats-server 2.11."""
    info = await client.api("INFO")
    return int(info.get("api", {}).get("level", 0))


def recommended_stream(
    name: str, subjects: Sequence[str], api_level: int, **overrides: Any
) -> dict[str, Any]:
    """Return the configuration that we advise, as raw JSON; durations become nanoseconds.

    Raises:
        ConfigurationError: the name is no stream name, or a duration is none.
    """
    config: dict[str, Any] = {
        "name": _checked(name, "stream"),
        "subjects": list(subjects),
        "storage": "file",
        "retention": "limits",
        "discard": "new",  # a full stream pushes back into the outbox and drops nothing unread
        "max_age": MAX_AGE,
        "allow_direct": True,
        "num_replicas": 1,
    }
    if api_level >= API_LEVEL_ATOMIC:
        config["allow_atomic"] = True
    config |= overrides
    for field in _DURATIONS & config.keys():
        config[field] = _nanoseconds(field, config[field])
    # The server refuses a window beyond max_age; a max_age of 0 is for ever.
    window = _nanoseconds("duplicate_window", DUPLICATE_WINDOW)
    config.setdefault("duplicate_window", min(window, config["max_age"] or window))
    return config


async def ensure_stream(
    client: Api, name: str, subjects: Sequence[str], **overrides: Any
) -> StreamFacts:
    """Create the stream when it is missing; one that exists stays as it is.

    Raises:
        ConfigurationError: it exists without taking `subjects`, or the server refused it.
    """
    _checked(name, "stream")
    try:
        return await check_stream(client, name, subjects, **overrides)
    except StreamMissing:
        pass
    config = recommended_stream(name, subjects, await api_level(client), **overrides)
    try:
        info = await client.api(f"STREAM.CREATE.{name}", config)
    except ApiError as error:
        if error.err_code == _STREAM_EXISTS:  # somebody else made it a moment ago
            return await check_stream(client, name, subjects, **overrides)
        raise ConfigurationError(f"stream {name} cannot be created: {error}") from error
    log.info("created a stream", extra={"stream": name, "subjects": list(subjects)})
    return StreamFacts(name, info["config"], info["state"], str(info["created"]), made=True)


class StreamMissing(ConfigurationError):  # noqa: N818 - a state, like the public errors
    """The stream does not exist."""

    def __init__(self, name: str, subjects: Sequence[str]) -> None:
        super().__init__(
            f"stream {name} does not exist; create it: nats stream add {name} "
            f"--subjects '{','.join(subjects)}' --storage file --retention limits "
            f"--discard new --dupe-window 5m --allow-direct --defaults"
            f" (or set OUTBOX_CREATE_STREAM=true)"
        )


async def check_stream(
    client: Api, name: str, subjects: Sequence[str], **overrides: Any
) -> StreamFacts:
    """Return the facts of a stream that takes `subjects`; nothing is changed.

    Raises:
        StreamMissing: a ConfigurationError that says how to create it.
        ConfigurationError: it does not take all of `subjects`; says what to run.
    """
    _checked(name, "stream")
    try:
        info = await client.api(f"STREAM.INFO.{name}")
    except ApiError as error:
        if error.err_code == STREAM_NOT_FOUND:
            raise StreamMissing(name, subjects) from error
        raise
    config = info["config"]
    taken = [str(subject) for subject in config.get("subjects") or ()]
    missing = [subject for subject in subjects if not any(covers(t, subject) for t in taken)]
    if missing:
        kept = [t for t in taken if not any(covers(m, t) for m in missing)]
        raise ConfigurationError(
            f"stream {name} takes {', '.join(taken) or 'nothing'} but not {', '.join(missing)}; "
            f"run: nats stream edit {name} --subjects '{','.join([*kept, *missing])}'"
        )
    wanted = recommended_stream(name, subjects, API_LEVEL_ATOMIC, **overrides)
    drift = tuple(_drift(config, wanted, [*_WATCHED, *overrides]))
    if drift:
        log.warning(
            "the stream differs from what is recommended",
            extra={"stream": name, "drift": list(drift)},
        )
    return StreamFacts(name, config, info["state"], str(info["created"]), drift)


async def delete_stream(client: Api, name: str) -> bool:
    """Delete a stream with its messages; return False when there was none."""
    try:
        await client.api(f"STREAM.DELETE.{_checked(name, 'stream')}")
    except ApiError as error:
        if error.err_code == STREAM_NOT_FOUND:
            return False
        raise
    return True


async def streams_for(client: Api, subject: str) -> list[str]:
    """Return the names of the streams that take `subject`, which may hold wildcards."""
    answer = await client.api("STREAM.NAMES", {"subject": subject})
    return [str(name) for name in answer.get("streams") or ()]


async def ensure_consumer(
    client: Api,
    *,
    stream: str,
    durable: str,
    filter_subject: str,
    ack_wait: timedelta,
    max_ack_pending: int,
) -> dict[str, Any]:
    """Return the consumer's info; make the durable when it is missing, change nothing else.

    Raises:
        StreamMissing: a ConfigurationError that says how to create the stream.
        ConfigurationError: the durable exists with another filter, max_deliver, ack policy or
            deliver policy; names the difference and the command that mends it.
    """
    _checked(stream, "stream")
    wanted = {
        "durable_name": _checked(durable, "consumer"),
        "filter_subject": filter_subject,
        "deliver_policy": "all",
        "ack_policy": "explicit",
        "max_deliver": -1,  # giving up is ours: the server would do it silently
        "ack_wait": _nanoseconds("ack_wait", ack_wait),
        "max_ack_pending": max_ack_pending,
    }
    info = await consumer_info(client, stream, durable)
    if info is None:
        info = await _create_consumer(client, stream, durable, wanted)
    _check_consumer(stream, durable, info["config"], wanted)
    return info


async def consumer_info(client: Api, stream: str, durable: str) -> dict[str, Any] | None:
    """Return what the server tells about a consumer; None when it does not exist.

    Raises:
        StreamMissing: its stream does not exist either.
    """
    try:
        return await client.api(f"CONSUMER.INFO.{stream}.{durable}")
    except ApiError as error:
        if error.err_code == CONSUMER_NOT_FOUND:
            return None
        if error.err_code == STREAM_NOT_FOUND:
            raise StreamMissing(stream, ["evt.>", "cmd.>", "dlq.>"]) from error
        raise


async def _create_consumer(
    client: Api, stream: str, durable: str, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    request = {"stream_name": stream, "config": dict(wanted), "action": "create"}
    try:
        info = await client.api(f"CONSUMER.DURABLE.CREATE.{stream}.{durable}", request)
    except ApiError as error:
        if error.err_code not in {_CONSUMER_EXISTS, _CONSUMER_NAME_TAKEN}:
            raise ConfigurationError(f"consumer {durable} cannot be created: {error}") from error
        found = await consumer_info(client, stream, durable)  # somebody else was faster
        if found is None:
            raise
        return found
    log.info("created a consumer", extra={"stream": stream, "consumer": durable})
    return info


def _check_consumer(
    stream: str, durable: str, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    filters = found.get("filter_subjects") or [found.get("filter_subject") or ">"]
    if list(filters) != [wanted["filter_subject"]]:
        raise ConfigurationError(
            f"consumer {durable} of stream {stream} filters {', '.join(filters)} and not "
            f"{wanted['filter_subject']}: two listeners with one service and queue group must have "
            f"one subject. Give one another queue_group, or, if its subject was changed, run: "
            f"nats consumer edit {stream} {durable} --filter '{wanted['filter_subject']}'"
        )
    if found.get("max_deliver", -1) != -1:
        raise ConfigurationError(
            f"consumer {durable} of stream {stream} gives up silently after "
            f"{found['max_deliver']} deliveries; run: "
            f"nats consumer edit {stream} {durable} --max-deliver=-1"
        )
    if found.get("deliver_subject"):
        raise ConfigurationError(_replaced(stream, durable, "is a push consumer"))
    if found.get("ack_policy") != wanted["ack_policy"]:
        raise ConfigurationError(
            _replaced(stream, durable, f"has ack policy {found.get('ack_policy')}, not explicit")
        )
    drift = _drift(found, wanted, ["deliver_policy", "ack_wait", "max_ack_pending"])
    if drift:
        log.warning(
            "the consumer differs from what the listener asks for",
            extra={"consumer": durable, "drift": drift},
        )


def _replaced(stream: str, durable: str, what: str) -> str:
    return (
        f"consumer {durable} of stream {stream} {what}, which cannot be changed; run: nats "
        f"consumer rm {stream} {durable} -f (it is made again, the inbox absorbs repeats)"
    )


def covers(pattern: str, subject: str) -> bool:
    """Return whether every subject that `subject` stands for is taken by `pattern`."""
    parts, wanted = pattern.split("."), subject.split(".")
    for index, part in enumerate(parts):
        if part == ">":
            return len(wanted) > index
        if index >= len(wanted) or wanted[index] == ">":
            return False
        if part not in {"*", wanted[index]}:
            return False
    return len(parts) == len(wanted)


def _drift(found: Mapping[str, Any], wanted: Mapping[str, Any], fields: list[str]) -> list[str]:
    return [
        f"{field} is {found.get(field)!r}, not {wanted[field]!r}"
        for field in dict.fromkeys(fields)
        if field in wanted and (found.get(field) or 0) != (wanted[field] or 0)
    ]


def _checked(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{name!r} is no {what} name: letters, digits, - and _ only")
    return name


def _nanoseconds(field: str, value: object) -> int:
    """Return a timedelta, or a number of seconds, as nanoseconds."""
    if isinstance(value, timedelta):
        return value // timedelta(microseconds=1) * 1000
    if isinstance(value, int | float) and not isinstance(value, bool):
        return int(value * 1_000_000_000)
    raise ConfigurationError(f"{field} must be a timedelta or a number of seconds")


def _from_nanoseconds(value: int) -> timedelta | None:
    return timedelta(microseconds=value / 1000) if value else None
