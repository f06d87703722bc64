"""What a listener class may declare; all else is refused when the class is made."""

from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import override

from outbox.envelope import EventEnvelope
from outbox.listener import BatchListener, Listener

GOOD: dict[str, Any] = {"subject": "evt.order.created.v1", "queue_group": "mail"}


async def on_message(self: Listener, session: AsyncSession, event: EventEnvelope) -> None:
    """Do nothing."""


def declare(base: type = Listener, handler: str = "on_message", **attributes: Any) -> type[Any]:
    return type("Declared", (base,), {handler: on_message, **attributes})


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"queue_group": "mail"}, "subject is missing"),
        ({"subject": "evt.a.v1"}, "queue_group is missing"),
        (GOOD | {"queue_grop": "x"}, "queue_grop is not an attribute"),
        (GOOD | {"subject": 7}, "subject must be a str"),
        (GOOD | {"subject": "evt..a"}, "must match"),
        (GOOD | {"subject": "evt.a b"}, "must match"),
        (GOOD | {"subject": "evt.>.a"}, "must match"),
        (GOOD | {"queue_group": "a.b"}, "must match"),
        (GOOD | {"queue_group": ""}, "must match"),
        (GOOD | {"service_name": "a b"}, "must match"),
        (GOOD | {"stream_name": "a>"}, "must match"),
        (GOOD | {"timeout": "30"}, "timeout must be a timedelta or seconds"),
        (GOOD | {"timeout": 0}, "timeout must be above 0"),
        (GOOD | {"ack_wait": timedelta(seconds=-1)}, "ack_wait must be above 0"),
        (GOOD | {"ack_wait": True}, "ack_wait must be a timedelta"),
        (GOOD | {"concurrency": 0}, "concurrency must be a whole number"),
        (GOOD | {"concurrency": 1.5}, "concurrency must be a whole number"),
        (GOOD | {"max_attempts": True}, "max_attempts must be a whole number"),
        (GOOD | {"ordered": "yes"}, "ordered must be True or False"),
    ],
)
def test_a_wrong_declaration_is_refused_at_class_creation(
    attributes: dict[str, Any], words: str
) -> None:
    """The error names the class, the attribute and the rule."""
    with pytest.raises(TypeError, match=words) as caught:
        declare(**attributes)
    assert "Declared." in str(caught.value)


def test_what_is_private_callable_or_a_descriptor_is_free() -> None:
    """Names with an underscore, methods, properties and nested classes are the user's own."""

    class Free(Listener):
        subject = "evt.*.created.>"
        queue_group = "free"
        _mine = 7

        class Nested:
            """Anything."""

        @property
        def other(self) -> int:
            return 1

        @staticmethod
        def helper() -> int:
            return 2

        @override
        async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
            """Do nothing."""

    assert Free._mine == 7


def test_a_base_without_a_handler_needs_no_subject() -> None:
    """A service's common base class is allowed, and what it declares is inherited."""

    class Base(Listener):
        service_name = "mail"
        timeout = 5

    made = declare(Base, **GOOD)
    assert made.service_name == "mail"
    assert made.timeout == timedelta(seconds=5)


def test_the_older_name_of_max_attempts_works() -> None:
    """`max_deliver` is an alias."""
    assert declare(**GOOD, max_deliver=4).max_attempts == 4


def test_batches_are_declared_in_the_same_way() -> None:
    """`on_batch` is what makes a batch listener complete."""
    with pytest.raises(TypeError, match="subject is missing"):
        declare(BatchListener, "on_batch", queue_group="x")
    assert declare(BatchListener, "on_batch", **GOOD, batch_size=50).batch_size == 50


class A(BaseModel):
    a: int


class B(BaseModel):
    b: int


def test_the_payload_type_is_read_from_the_class() -> None:
    """A model, a union of models, or plain data."""

    class One(Listener[A]):
        """Nothing else."""

    class Either(Listener[A | B]):
        """Nothing else."""

    class Inherited(One):
        """Nothing else."""

    class Plain(Listener):
        """Nothing else."""

    class Mapped(Listener[dict[str, int]]):
        """Nothing else."""

    assert One._adapter is not None
    assert One._adapter.validate_python({"a": 1}) == A(a=1)
    assert Either._adapter is not None
    assert Either._adapter.validate_python({"b": 1}) == B(b=1)
    assert Inherited._adapter is not None
    assert Plain._adapter is None
    assert Mapped._adapter is None
