"""The envelope: encoding, the strict parser, ids."""

import json
from datetime import UTC
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import envelope
from outbox.envelope import Delivery, Malformed, MalformedMessage

DELIVERY = Delivery(1, "EVENTS", 7, redelivered=False)
SUBJECT = "evt.a.v1"
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\x00")
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(CHARACTERS),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(CHARACTERS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


def body(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "event_id": "e1",
        "event_type": SUBJECT,
        "correlation_id": "c1",
        "source_service": "s",
        "timestamp": "2026-01-01T00:00:00Z",
        "data": {"a": 1},
    }
    fields |= changes
    return json.dumps({k: v for k, v in fields.items() if v is not ...}).encode()


def parse(data: bytes, **headers: str) -> envelope.EventEnvelope:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return envelope.parse(data, subject=SUBJECT, headers=named, delivery=DELIVERY)


@given(
    st.dictionaries(
        st.text(CHARACTERS),
        PLAIN,
        max_size=4,
    ),
    st.text(min_size=1, max_size=50).filter(str.isprintable),
)
def test_what_is_encoded_parses_to_the_same(data: dict[str, Any], service: str) -> None:
    event_id = envelope.uuid7_text()
    encoded = envelope.encode(
        event_id=event_id,
        subject=SUBJECT,
        correlation_id=service,
        source_service=service,
        data=envelope.encode_payload(data),
    )
    event = parse(encoded, Nats_Msg_Id=event_id)
    assert event.data == event.payload == data
    assert (event.event_id, event.event_type) == (event_id, SUBJECT)
    assert event.source_service == event.correlation_id == service
    assert event.timestamp.tzinfo is not None
    assert event.metadata == {}


def test_older_publishers_are_read() -> None:
    event = parse(body(extra=1, timestamp="2026-01-01T00:00:00"), Outbox_Key="k")
    assert (event.event_id, event.key, event.timestamp.tzinfo) == ("e1", "k", UTC)
    assert parse(body(metadata=None)).metadata == {}
    assert parse(body(metadata={"causation_id": "x"})).metadata == {"causation_id": "x"}


@pytest.mark.parametrize("header", ["e1", "e1~r2"])
def test_republications_agree_with_their_id(header: str) -> None:
    assert parse(body(), Nats_Msg_Id=header).event_id == "e1"


@pytest.mark.parametrize(
    ("data", "headers", "reason"),
    [
        (b"", {}, Malformed.MALFORMED),
        (b"{", {}, Malformed.MALFORMED),
        (b"\xff", {}, Malformed.MALFORMED),
        (b"\xef\xbb\xbf{}", {}, Malformed.MALFORMED),
        (b"[]", {}, Malformed.MALFORMED),
        (b"{} x", {}, Malformed.MALFORMED),
        (body(data={"a": float("nan")}), {}, Malformed.MALFORMED),
        (body().replace(b"1}", b"1e400}"), {}, Malformed.MALFORMED),
        (body().replace(b'{"a": 1}', b'{"a": 1, "a": 2}'), {}, Malformed.MALFORMED),
        (b'{"data":' + b"[" * 100_000, {}, Malformed.MALFORMED),
        (body().replace(b"1}", b"[" * 101 + b"]" * 101 + b"}"), {}, Malformed.MALFORMED),
        (b"1" * 5000, {}, Malformed.MALFORMED),
        (body(event_id=17), {}, Malformed.MALFORMED),
        (body(event_id=""), {}, Malformed.MALFORMED),
        (body(data=[1]), {}, Malformed.MALFORMED),
        (body(timestamp="yesterday"), {}, Malformed.MALFORMED),
        (body(event_id=...), {}, Malformed.MISSING_FIELD),
        (body(data=...), {}, Malformed.MISSING_FIELD),
        (body(source_service=None), {}, Malformed.MISSING_FIELD),
        (body(event_type="evt.b"), {}, Malformed.WRONG_EVENT_TYPE),
        (body(), {"Nats-Msg-Id": "e2"}, Malformed.IDENTITY_MISMATCH),
        (body(), {"Nats-Msg-Id": "e1r2"}, Malformed.IDENTITY_MISMATCH),
        (body(), {"content-encoding": "gzip"}, Malformed.UNSUPPORTED_ENCODING),
    ],
)
def test_what_is_no_event_is_told_why(
    data: bytes, headers: dict[str, str], reason: Malformed
) -> None:
    with pytest.raises(MalformedMessage) as caught:
        envelope.parse(data, subject=SUBJECT, headers=headers, delivery=DELIVERY)
    assert caught.value.reason is reason


def test_uuid7_is_valid_and_rises() -> None:
    made = [envelope.uuid7() for _ in range(10_000)]
    assert all(a < b for a, b in pairwise(made))
    assert {(each.version, each.variant) for each in made} == {(7, "specified in RFC 4122")}


def test_ids_are_stable() -> None:
    one = envelope.event_id_for("s", SUBJECT, "order-1")
    assert one == envelope.event_id_for("s", SUBJECT, "order-1")
    assert one != envelope.event_id_for("s", "evt.b", "order-1")
    own = uuid4()
    assert envelope.inbox_key(str(own)) == own
    keys = {envelope.inbox_key(x) for x in (str(own).upper(), "a", "é", "\ud800", "\x00", own.hex)}
    assert len(keys) == 6
    assert isinstance(envelope.fallback_key("s", "c", 1, "t", b"x"), UUID)


def test_headers_round_trip() -> None:
    headers = {"Outbox-Key": "k", "a": "b: c", "empty": ""}
    assert envelope.decode_headers(envelope.encode_headers(headers)) == headers
    assert envelope.decode_headers(b"") == {}
