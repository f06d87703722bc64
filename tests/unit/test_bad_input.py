"""The bad-input corpus of `add`: refused at the call, by name and rule, before any SQL."""

import collections
import types
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Any
from uuid import uuid4

import pytest
from pydantic import BaseModel, RootModel, field_serializer
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from outbox import context
from outbox.envelope import encode_payload
from outbox.errors import InvalidEvent
from outbox.settings import Settings
from outbox.writer import Outbox

SUBJECT = "evt.a.v1"
deep: dict[str, Any] = {}
inner = deep
for _ in range(10_000):
    inner["a"] = inner = {}
cycle: list[Any] = []
cycle.append(cycle)


class Secretive(BaseModel):
    secret: str

    @field_serializer("secret")
    def fail(self, value: str) -> str:
        raise RuntimeError(value)


class Number(BaseModel):
    x: float = 0.0
    big: int = 0
    text: str = ""
    maybe: int | None = None


@pytest.fixture
def session() -> Any:
    engine = create_engine("postgresql+psycopg://nowhere.invalid/x")  # a connect would fail
    with Session(engine) as made:
        yield made
    engine.dispose()


@pytest.mark.parametrize(
    ("payload", "rule"),
    [
        ({"a": {"b": float("nan")}}, "$.a.b"),
        ({"a": [1, float("inf")]}, "$.a[1]"),
        ({"a": {1, 2}}, "set at $.a"),
        ({"a": datetime.now(UTC)}, "datetime at $.a"),
        ({"a": Decimal(1)}, "Decimal at $.a"),
        ({"a": uuid4()}, "UUID at $.a"),
        ({"a": object()}, "object at $.a"),
        ({"a": b"x"}, "bytes at $.a"),
        ({"a": cycle}, "circular reference"),
        (deep, "deeper than 100"),
        ({"a": "\x00"}, "NUL"),
        ({"\x00": 1}, "NUL"),
        ({"a": ["\ud800"]}, "lone surrogate at $.a[0]"),
        ({"\ud800": 1}, "lone surrogate"),
        ({"a": 10**5000}, "64 bits"),
        ({"a": 2**63}, "64 bits"),
        ({1: 1, "1": 2}, "keys must be str at $"),
        ({"a": {None: 1}}, "keys must be str at $.a"),
        (None, "NoneType"),
        ("{}", "str"),
        ([1], "list"),
        (b"{}", "bytes"),
        (Number(x=float("nan")), "NaN"),
        (Number(big=2**63), "64 bits"),
        (Number(text="\x00"), "NUL"),
        (RootModel[list[int]]([1]), "JSON object"),
    ],
)
def test_bad_payloads_are_refused_by_rule(session: Any, payload: Any, rule: str) -> None:
    with pytest.raises(InvalidEvent, match=r"^payload: ") as caught:
        Outbox("s").add(session, SUBJECT, payload)
    assert rule in caught.value.rule
    assert len(str(caught.value)) < 400
    assert not session.in_transaction()


def test_failing_serializer_names_the_model_without_values(session: Any) -> None:
    with pytest.raises(InvalidEvent, match="Secretive") as caught:
        Outbox("s").add(session, SUBJECT, Secretive(secret="hunter2"))  # noqa: S106 - no password
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_good_payloads_pass() -> None:
    class Color(StrEnum):
        RED = "red"

    class Level(IntEnum):
        LOW = 1

    assert encode_payload({"a": Color.RED, "b": Level.LOW, "c": (1, 2)}) == (
        b'{"a":"red","b":1,"c":[1,2]}'
    )
    assert encode_payload(types.MappingProxyType({"a": collections.OrderedDict(b=1)})) == (
        b'{"a":{"b":1}}'
    )
    assert encode_payload({"a": "\\u0000", "é": "😀"}) == '{"a":"\\\\u0000","é":"😀"}'.encode()
    assert encode_payload({"a": 2**63 - 1, "b": -0.0, "c": 1e22}).startswith(
        b'{"a":9223372036854775807'
    )
    assert encode_payload(Number(text="1234567890123456789012 NaN \\u0000")).startswith(b'{"x":0.0')


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("event_id", {"event_id": "abc"}),
        ("event_id", {"event_id": ""}),
        ("event_id", {"event_id": 17}),
        ("key", {"key": "k" * 2700}),
        ("key", {"key": "a\x00"}),
        ("key", {"key": "\ud800"}),
        ("key", {"key": ""}),
        ("key", {"key": 17}),
        ("correlation_id", {"correlation_id": ""}),
        ("correlation_id", {"correlation_id": "a\nb"}),
        ("correlation_id", {"correlation_id": "\ud800"}),
        ("correlation_id", {"correlation_id": "c" * 256}),
        ("correlation_id", {"correlation_id": 17}),
        ("deliver_at", {"deliver_at": datetime(2030, 1, 1)}),  # noqa: DTZ001 - naive on purpose
        ("deliver_at", {"deliver_at": datetime.max.replace(tzinfo=UTC)}),
        ("deliver_at", {"deliver_at": datetime.now(UTC) + timedelta(days=3650)}),
        ("deliver_at", {"deliver_at": 17}),
        ("headers", {"headers": {"Nats-Msg-Id": "x"}}),
        ("headers", {"headers": [1]}),
        ("metadata", {"metadata": {"a": float("nan")}}),
        ("metadata", {"metadata": [1]}),
    ],
)
def test_bad_arguments_are_refused_by_name(
    session: Any, field: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(InvalidEvent) as caught:
        Outbox("s").add(session, SUBJECT, {}, **arguments)
    assert caught.value.field == field
    assert str(caught.value).replace("…", "").isascii()
    assert not session.in_transaction()


def test_size_counts_headers_and_body(session: Any) -> None:
    small = Outbox("s", settings=Settings.defaults(event_bytes_max=1024))
    small.add(session, SUBJECT, {"a": "x" * 500})
    with pytest.raises(InvalidEvent, match="at most 1024"):
        small.add(session, SUBJECT, {"a": "x" * 500}, headers={"h": "y" * 500})
    with pytest.raises(InvalidEvent, match="at most 1048576"):
        Outbox("s").add(session, SUBJECT, {"a": "x" * 1_048_576})


def test_source_service_is_required_and_checked(session: Any) -> None:
    with pytest.raises(InvalidEvent, match="source_service"):
        Outbox().add(session, SUBJECT, {})
    for bad in ("", "a\nb", "x" * 256, 17):
        with pytest.raises(InvalidEvent, match="source_service"):
            Outbox(bad)  # type: ignore[arg-type]


def test_running_handler_gives_correlation_cause_and_service(session: Any) -> None:
    token = context.running.set(context.Running("e0", "c0", "listener-service"))
    try:
        Outbox().add(session, SUBJECT, {}, metadata={"a": 1})
    finally:
        context.running.reset(token)
    (share,) = session.info["outbox.writer"].open_shares()
    body = share.items[0].body
    assert b'"correlation_id":"c0","source_service":"listener-service"' in body
    assert b'"metadata":{"causation_id":"e0","a":1}' in body
