"""The relay, from the outbox to the stream."""

from outbox.relay.relay import Relay

__all__ = ["Relay"]
