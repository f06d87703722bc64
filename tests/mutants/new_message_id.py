"""Each publication of an event has a message id of its own."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

TARGET = "outbox.jetstream.publishing:frame"
FAULTS = ("cut_before_pub_ack", "relay_killed", "relay_kill_at_step")


def broken(original: Callable[..., Any]) -> Callable[..., Any]:
    """Add something random to the id, which identity checks let pass."""

    def frame(head: Any, reply: str, message_id: str, lines: bytes, body: bytes) -> bytes:
        again: bytes = original(head, reply, f"{message_id}~r{uuid4().int}", lines, body)
        return again

    return frame
