"""What is wrong with a broker, a stream or a consumer as they are set up. Pure."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from outbox.findings import Finding, Severity
from outbox.jetstream.provisioning import covers
from outbox.settings import Settings

SKEW = timedelta(seconds=5)
WINDOW_MIN = timedelta(minutes=2)  # of duplicates; the relay repeats within seconds
MARGIN = timedelta(hours=1)  # of the inbox beyond what may be delivered again
ACK_PENDING_MIN = 16
LIMITS = ("max_msgs", "max_bytes", "max_msgs_per_subject")


def version(found: tuple[int, int, int]) -> Iterator[Finding]:
    """Examine the version of nats-server."""
    needed = {(2, 11): 16, (2, 12): 7}
    if found[:2] < (2, 11) or found[2] < needed.get(found[:2], 0):
        yield Finding(
            Severity.WARNING,
            f"nats-server {'.'.join(map(str, found))} is older than it should be",
            "versions before 2.11.16, 2.12.7 and 2.14.0 have defects that lose messages",
            "upgrade nats-server",
        )


def clock(told: object) -> Iterator[Finding]:
    """Examine the broker's clock, as it was told in an answer a moment ago."""
    if not isinstance(told, str):
        return
    skew = abs(datetime.fromisoformat(told) - datetime.now(UTC))
    if skew > SKEW:
        yield Finding(
            Severity.WARNING,
            f"the broker's clock is {skew.total_seconds():.0f} s off ours",
            "max_age and the duplicate window follow the broker's",
            "synchronise the clocks (NTP)",
        )


def disk(varz: Mapping[str, Any], settings: Settings) -> Iterator[Finding]:
    """Examine how soon the broker's disk has what was acknowledged.

    Args:
        varz: what the server's monitoring endpoint `/varz` says.
    """
    config = (varz.get("jetstream") or {}).get("config") or {}
    if config.get("sync_always"):
        return
    interval = _duration(config.get("sync_interval")) or timedelta(minutes=2)
    mend = "sync_interval: always in the jetstream block, or replicas on machines of their own"
    what = f"the broker's disk has an event up to {interval.total_seconds():.0f} s late"
    archived = settings.archive_retention
    if archived is None:
        why = "a power cut loses acknowledged events, and without an archive nothing repairs that"
        yield Finding(Severity.ERROR, what, why, f"set OUTBOX_ARCHIVE_RETENTION, or {mend}")
    elif archived < 2 * interval:
        why = "a power cut loses acknowledged events, some of which have left the archive"
        more = f"OUTBOX_ARCHIVE_RETENTION={int(2 * interval.total_seconds())}"
        yield Finding(Severity.ERROR, what, why, f"{more}, or {mend}")


def subjects(config: Mapping[str, Any], settings: Settings) -> Iterator[Finding]:
    """Examine whether a stream takes all that a relay publishes."""
    name = config["name"]
    taken = [str(subject) for subject in config.get("subjects") or ()]
    wanted = [f"{prefix}>" for prefix in settings.subject_prefixes]
    lacking = [each for each in wanted if not any(covers(t, each) for t in taken)]
    if lacking:
        mend = f"nats stream edit {name} --subjects '{','.join([*taken, *lacking])}'"
        what, why = f"stream {name} does not take {', '.join(lacking)}", "such events wait for ever"
        yield Finding(Severity.ERROR, what, why, mend)


def stream(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Examine a stream's configuration: how safely it stores, what it drops."""
    name = config["name"]
    edit = f"nats stream edit {name}"
    if config.get("sealed"):
        what, why = f"stream {name} is sealed", "it takes nothing more, and that cannot be undone"
        yield Finding(Severity.ERROR, what, why, "make another, and set OUTBOX_STREAM to it")
    if config.get("no_ack"):
        what, why = f"stream {name} acknowledges nothing", "no event ever counts as published"
        yield Finding(Severity.ERROR, what, why, f"{edit} --ack")
    if config.get("storage") == "memory":
        what, why = f"stream {name} is in memory", "a restart of the broker loses what it stored"
        yield Finding(Severity.ERROR, what, why, "make it anew with --storage file")
    if config.get("retention") != "limits":
        what = f"stream {name} has {config.get('retention')} retention"
        why = "messages may go before every listener has read them, and cannot be verified"
        yield Finding(Severity.ERROR, what, why, "make it anew with --retention limits")
    limits = [each for each in LIMITS if int(config.get(each) or -1) > 0]
    if config.get("discard") == "old" and limits:
        what = f"stream {name} discards old messages at {' and '.join(limits)}"
        why = "listeners that are behind lose unread events silently"
        yield Finding(Severity.ERROR, what, why, f"{edit} --discard new")
    window = _duration(config.get("duplicate_window"))
    if window < WINDOW_MIN:
        what = f"stream {name} forgets duplicates after {window.total_seconds():.0f} s"
        why = "a relay that repeats itself later stores an event twice; inboxes absorb it"
        yield Finding(Severity.WARNING, what, why, f"{edit} --dupe-window 5m")


def retention(config: Mapping[str, Any], settings: Settings) -> Iterator[Finding]:
    """Examine the chain: what may be delivered again must still be known to the inbox.

    A message may be as old as the publisher's archive when it is published once more.
    """
    name = config["name"]
    max_age = _duration(config.get("max_age"))
    archived = settings.archive_retention or timedelta(0)
    if not max_age:
        what = f"stream {name} keeps messages for ever"
        why = "one that is delivered again after the inbox has forgotten it takes effect twice"
        yield Finding(Severity.WARNING, what, why, f"nats stream edit {name} --max-age 24h")
    elif settings.inbox_retention < max_age + archived + MARGIN:
        needed = int((max_age + archived + MARGIN).total_seconds())
        what = "the inbox forgets before stream and archive do"
        why = "an event that is delivered or repaired late takes effect twice"
        yield Finding(Severity.ERROR, what, why, f"OUTBOX_INBOX_RETENTION={needed}")


def consumer(info: Mapping[str, Any]) -> Iterator[Finding]:
    """Examine a listener's consumer, as the broker tells of it."""
    name, config = info["name"], info["config"]
    place = f"{info['stream_name']} {name}"
    edit = f"nats consumer edit {place}"
    anew = f"nats consumer rm {place} -f; restart the listener, which makes it again"
    away = _duration(config.get("inactive_threshold")).total_seconds()
    pending = int(config.get("max_ack_pending") or 0)
    error, warning = Severity.ERROR, Severity.WARNING
    checks = (
        (
            int(config.get("max_deliver") or -1) != -1,
            (error, f"gives up after {config.get('max_deliver')} deliveries"),
            "the broker then drops the event for this listener, silently",
            f"{edit} --max-deliver=-1",
        ),
        (
            config.get("ack_policy") != "explicit",
            (error, f"has ack policy {config.get('ack_policy')}"),
            "an event counts as handled before it is",
            anew,
        ),
        (
            bool(config.get("deliver_subject")),
            (error, "is a push consumer"),
            "the listener can only pull",
            anew,
        ),
        (
            bool(config.get("headers_only")),
            (error, "delivers headers only"),
            "events come without their data",
            f"{edit} --no-headers-only",
        ),
        (
            bool(config.get("mem_storage")),
            (warning, "is in memory"),
            "a restart of the broker forgets its place, and everything is delivered again",
            anew,
        ),
        (
            away > 0,
            (warning, f"is deleted when its listener is away for {away:.0f} s"),
            "it is made again at the stream's beginning, and everything is delivered again",
            f"{edit} --inactive-threshold 0s",
        ),
        (
            config.get("deliver_policy") != "all",
            (warning, f"began with deliver policy {config.get('deliver_policy')}"),
            "events from before were not delivered to this listener",
            anew,
        ),
        (
            config.get("replay_policy") == "original",
            (warning, "replays at the original speed"),
            "a listener that is behind never catches up",
            anew,
        ),
        (
            0 < pending < ACK_PENDING_MIN,
            (warning, f"has at most {pending} events in hand"),
            "a few that wait for a retry hold all others up",
            f"{edit} --max-pending 1000",
        ),
        (
            bool(info.get("paused")),
            (warning, "is paused"),
            "nothing is delivered to this listener",
            f"nats consumer resume {place}",
        ),
    )
    for wrong, (severity, what), why, mend in checks:
        if wrong:
            yield Finding(severity, f"consumer {name} {what}", why, mend)


def gap(info: Mapping[str, Any], taken: Mapping[str, Any]) -> Iterator[Finding]:
    """Examine whether messages were dropped before a consumer read them.

    Args:
        info: of the consumer.
        taken: the info of its stream.
    """
    floor = int(info["ack_floor"]["stream_seq"])
    gone = int(taken["state"]["first_seq"]) - floor - 1
    if gone <= 0 or floor <= 0 or int(info.get("num_pending") or 0) == 0:
        return
    name = info["name"]
    exact = takes_all(info["config"], taken["config"])
    messages = f"{gone} messages left the stream before {name} had read them"
    yield Finding(
        Severity.ERROR if exact else Severity.WARNING,
        messages if exact else f"up to {messages}",
        "they were dropped by max_age or a limit"
        + ("" if exact else "; how many of them were for this listener cannot be told"),
        f"outbox replay --to {name} in each publisher's database",
    )


def takes_all(config: Mapping[str, Any], of_stream: Mapping[str, Any]) -> bool:
    """Return whether a consumer reads every message of its stream."""
    filters = config.get("filter_subjects") or [config.get("filter_subject") or ">"]
    subjects = of_stream.get("subjects") or ()
    return all(any(covers(wide, subject) for wide in filters) for subject in subjects)


def _duration(nanoseconds: object) -> timedelta:
    return timedelta(microseconds=int(str(nanoseconds or 0)) / 1000)
