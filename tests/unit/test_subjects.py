"""Subjects, ids, keys and headers."""

from uuid import uuid4

import pytest

from outbox import subjects
from outbox.errors import InvalidEvent


def test_good_subjects_pass() -> None:
    for subject in ("evt.a.v1", "cmd.order-x.place_d", "evt.A"):
        assert subjects.check_subject(subject, ("evt.", "cmd.")) == subject


@pytest.mark.parametrize(
    ("subject", "rule"),
    [
        ("evt.orders created", "whitespace at position 10"),
        ("evt.\r\nPUB x 0\r\n\r\n", "control character"),
        ("evt.*", "wildcard"),
        ("evt.>", "wildcard"),
        (".evt", "empty token"),
        ("evt.", "empty token"),
        ("evt..a", "empty token"),
        ("", "required"),
        ("evt." + "a" * 4000, "4004 characters"),
        ("evt.\x00", "control character"),
        ("evt.\x7f", "control character"),
        ("evt.é", "another character"),
        ("evt.😀", "another character"),
        ("evt.\ud800", "lone surrogate"),
        ("$JS.API.STREAM.PURGE.EV", "prefix $"),
        ("dlq.x", "prefix dlq."),
        ("orders.created", "must begin with one of evt., cmd."),
        ("evt", "must begin with"),
        ("evt.a$b", "letters, digits"),
        (None, "must be a str"),
        (b"evt.a", "must be a str"),
    ],
)
def test_bad_subjects_are_refused_by_rule(subject: str, rule: str) -> None:
    with pytest.raises(InvalidEvent, match=r"^subject: ") as caught:
        subjects.check_subject(subject, ("evt.", "cmd."))
    assert rule in caught.value.rule
    assert str(caught.value).isascii() or "…" in str(caught.value)
    assert len(str(caught.value)) < 200


def test_dead_letter_subjects() -> None:
    assert subjects.dead_letter_subject("evt.order.created.v1") == "dlq.order.created.v1"
    assert subjects.dead_letter_subject("cmd.order.created.v1") == "dlq.order.created.v1"
    assert subjects.dead_letter_subject("dlq.x") == "dlq.x"


def test_event_ids() -> None:
    one = uuid4()
    assert subjects.check_event_id(one) == subjects.check_event_id(str(one).upper()) == one
    for bad in ("", "abc", one.hex, f"{{{one}}}", one.urn, 17, None, b"x", f"{one}\n"):
        with pytest.raises(InvalidEvent, match="event_id"):
            subjects.check_event_id(bad)  # type: ignore[arg-type]


def test_keys() -> None:
    assert subjects.check_key("m-1") == "m-1"
    for bad in ("", " a", "a b", "é", "a\x00", "\ud800", "k" * 256, 17, "a\n"):
        with pytest.raises(InvalidEvent, match="key"):
            subjects.check_key(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "headers",
    [
        {"a\r\nb": "1"},
        {"a b": "1"},
        {"a:b": "1"},
        {"é": "1"},
        {"": "1"},
        {"x": "\ud800"},
        {"x": "  pad  "},
        {"x": "a\r\nb"},
        {"x": "é"},
        {"x": "a\n"},
        {"Nats-Msg-Id": "1"},
        {"nats-msg-id": "1"},
        {"Nats-Rollup": "all"},
        {"Nats-TTL": "1"},
        {"outbox-key": "1"},
        {"Content-Encoding": "gzip"},
        {f"h{i}": "1" for i in range(65)},
        {"a": "1", "A": "2"},
        {"a": ["1"]},
        {1: "a"},
        [("a", "b")],
        {"a": "x" * 40_000},
    ],
)
def test_bad_headers_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(InvalidEvent, match="headers"):
        subjects.check_headers(headers)


def test_good_headers_pass() -> None:
    subjects.check_headers({"traceparent": "00-a-b-01", "X-Empty": "", "x_y": "a b"})
