"""A subject has one payload; `add` and typed listeners follow what is registered."""

import json
from collections.abc import Iterator
from typing import Any
from unittest.mock import create_autospec
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, ConfigDict
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from outbox import EventEnvelope, InvalidEvent, JetStreamClient, Listener, Outbox
from outbox.registry import Registry, registry

PLACED = "evt.registry.order.placed.v1"
PAID = "evt.registry.order.paid.v1"


class Placed(BaseModel):
    order_id: UUID
    lines: int = 1


class Renamed(Placed):
    pass


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")

    order_id: UUID


class Unregistered(BaseModel):
    order_id: UUID


@pytest.fixture
def known() -> Iterator[Registry]:
    """The registry of the process, as it was before the test once the test has ended."""
    before = dict(registry._by_subject)
    yield registry
    registry._by_subject.clear()
    registry._by_subject.update(before)


@pytest.fixture
def session() -> Iterator[Session]:
    """A session that never connects: what is refused or buffered needs no database."""
    with Session(create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")) as made:
        yield made


def bodies(session: Session) -> list[dict[str, Any]]:
    (share,) = session.info["outbox.writer"].open_shares()
    return [json.loads(item.body) for item in share.items]


def keys(session: Session) -> list[str | None]:
    (share,) = session.info["outbox.writer"].open_shares()
    return [item.key for item in share.items]


events = Outbox("registry-tests")


def test_payload_finds_its_subjects_and_subject_its_payload() -> None:
    own = Registry()
    own.register(PLACED, PAID, deprecated_by="evt.registry.order.settled.v1")(Placed)
    found = own.of(PAID)
    assert found is not None
    assert (found.payload, found.deprecated_by) == (Placed, "evt.registry.order.settled.v1")
    assert own.subjects_of(Placed) == (PLACED, PAID)
    assert own.subjects_of(Renamed) == ()
    assert [each.subject for each in own] == [PAID, PLACED]
    assert len(own) == 2


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (PLACED, 1),
        ("evt.registry.order.*.v1", 2),
        ("evt.>", 2),
        ("evt.registry.*", 0),
        ("evt.registry.order.placed.v1.>", 0),
        ("*.*.*.*.*", 2),
        (">", 2),
    ],
)
def test_matching_follows_the_wildcards_of_nats(pattern: str, count: int) -> None:
    own = Registry()
    own.register(PLACED, PAID)(Placed)
    assert len(own.matching(pattern)) == count


def test_second_payload_for_a_subject_is_refused_and_changes_nothing() -> None:
    own = Registry()
    own.register(PLACED)(Placed)
    with pytest.raises(TypeError, match=r"Placed already, not with .*Closed"):
        own.register(PAID, PLACED)(Closed)
    assert own.of(PAID) is None


def test_class_of_a_reloaded_module_replaces_its_older_self() -> None:
    own = Registry()
    own.register(PLACED)(Placed)
    again = type("Placed", (BaseModel,), {"__module__": __name__, "__qualname__": "Placed"})
    own.register(PLACED)(again)
    found = own.of(PLACED)
    assert found is not None
    assert found.payload is again


@pytest.mark.parametrize("subject", ["evt.*.v1", "evt..v1", "evt.>", "", "evt.a b"])
def test_odd_subjects_are_refused(subject: str) -> None:
    with pytest.raises(ValueError, match="registered subject"):
        Registry().register(subject)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a pydantic model"):
        Registry().register(PLACED)(dict)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="at least one subject"):
        Registry().register()


def test_payload_of_one_subject_needs_no_subject(known: Registry, session: Session) -> None:
    known.register(PLACED)(Placed)
    order = Placed(order_id=uuid4())
    events.add(session, order)
    (body,) = bodies(session)
    assert body["event_type"] == PLACED
    assert body["data"] == {"order_id": str(order.order_id), "lines": 1}


def test_payload_of_no_or_several_subjects_needs_one(known: Registry, session: Session) -> None:
    order = Placed(order_id=uuid4())
    with pytest.raises(TypeError, match="registered for no subject"):
        events.add(session, order)
    known.register(PLACED, PAID)(Placed)
    with pytest.raises(TypeError, match=f"{PLACED}, {PAID}"):
        events.add(session, order)
    assert events.add(session, PAID, order)


def test_payload_of_another_subject_is_refused(known: Registry, session: Session) -> None:
    known.register(PLACED)(Placed)
    known.register(PAID)(Closed)
    order = Closed(order_id=uuid4())
    with pytest.raises(InvalidEvent, match="takes Placed or a mapping, not Closed"):
        events.add(session, PLACED, order)
    with pytest.raises(InvalidEvent, match=f"Closed is registered for {PAID}"):
        events.add(session, "evt.registry.other.v1", order)
    with pytest.raises(InvalidEvent, match="takes Placed"):
        events.add(session, PLACED, Unregistered(order_id=uuid4()))
    assert events.add(session, PLACED, Renamed(order_id=uuid4()))


def test_mapping_for_a_registered_subject_is_validated(known: Registry, session: Session) -> None:
    known.register(PLACED)(Placed)
    with pytest.raises(InvalidEvent, match=r"is no Placed: order_id: Field required"):
        events.add(session, PLACED, {"lines": 2})
    with pytest.raises(InvalidEvent) as caught:
        events.add(session, PLACED, {"order_id": "s3cret-value", "lines": "many"})
    assert "1 more" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    order_id = uuid4()
    events.add(session, PLACED, {"order_id": order_id, "note": {"kept": True}})
    (body,) = bodies(session)
    assert body["data"] == {"order_id": str(order_id), "lines": 1, "note": {"kept": True}}


def test_unknown_fields_of_nested_models_travel_along(known: Registry, session: Session) -> None:
    class Parcel(BaseModel):
        order: Placed

    known.register(PAID)(Parcel)
    order_id = str(uuid4())
    events.add(session, PAID, {"order": {"order_id": order_id, "gift": "yes"}})
    (body,) = bodies(session)
    assert body["data"] == {"order": {"order_id": order_id, "lines": 1, "gift": "yes"}}


def test_unknown_fields_follow_the_models_own_rule(known: Registry, session: Session) -> None:
    known.register(PAID)(Closed)
    with pytest.raises(InvalidEvent, match="note: Extra inputs are not permitted"):
        events.add(session, PAID, {"order_id": str(uuid4()), "note": 1})


def test_registered_key_is_used_when_none_is_given(known: Registry, session: Session) -> None:
    known.register(PLACED, key=lambda order: f"order-{order.lines}")(Placed)
    events.add(session, Placed(order_id=uuid4(), lines=7))
    events.add(session, PLACED, {"order_id": str(uuid4()), "lines": 8})
    events.add(session, Placed(order_id=uuid4()), key="given")
    assert keys(session) == ["order-7", "order-8", "given"]


def test_key_that_fails_or_is_none_is_named_or_left_out(known: Registry, session: Session) -> None:
    known.register(PLACED, key=lambda order: order.no_such_field)(Placed)
    with pytest.raises(InvalidEvent, match=f"key registered for '{PLACED}' failed: AttributeErr"):
        events.add(session, Placed(order_id=uuid4()))
    known.register(PLACED, key=lambda _: None)(Placed)
    events.add(session, Placed(order_id=uuid4()))
    assert keys(session) == [None]


def listener(payload: Any, pattern: str) -> type[Listener[Any]]:
    async def on_message(self: object, session: object, event: EventEnvelope[Any]) -> None: ...

    members = {"subject": pattern, "queue_group": "q", "service_name": "s"}
    base = Listener[payload]

    class Made(base):
        subject = members["subject"]
        queue_group = members["queue_group"]
        service_name = members["service_name"]

    Made.on_message = on_message  # type: ignore[method-assign]
    return Made


def test_typed_listener_must_take_what_is_registered(known: Registry) -> None:
    known.register(PLACED)(Placed)
    known.register(PAID)(Closed)
    assert listener(Placed, PLACED)
    assert listener(Placed | Closed, "evt.registry.order.*.v1")
    assert listener(BaseModel, "evt.registry.>")
    with pytest.raises(TypeError, match=f"takes Closed, but {PLACED} is registered with Placed"):
        listener(Closed, PLACED)
    with pytest.raises(TypeError, match=f"{PAID} is registered with Closed"):
        listener(Placed, "evt.registry.>")


def test_later_registration_is_noticed_when_the_listener_is_made(known: Registry) -> None:
    made = listener(Closed, PLACED)
    known.register(PLACED)(Placed)
    client: Any = create_autospec(JetStreamClient)
    with pytest.raises(TypeError, match="is registered with Placed"):
        made(client, client)
