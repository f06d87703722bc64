"""A relay needs an engine and a client."""

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Relay


def refused(engine: AsyncEngine) -> None:
    Relay(engine)  # refused
