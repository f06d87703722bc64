"""How the outbox does: from the database, and from the broker where it can be asked."""

from dataclasses import asdict
from datetime import timedelta
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox.errors import OutboxError
from outbox.jetstream import provisioning
from outbox.jetstream.api import Api
from outbox.postgres import counting, inspecting, overview, schema
from outbox.postgres.driver import translated

HELD_SINCE = timedelta(minutes=1)  # sessions that are open for longer hold the floor back


async def status(
    engine: AsyncEngine,
    schema_name: str = "outbox",
    *,
    client: Api | None = None,
    stream: str = "EVENTS",
) -> dict[str, Any]:
    """Return the figures of `outbox status --json`; what could not be asked is in `unseen`.

    Args:
        client: asked how far each listener is on `stream`.

    Raises:
        ConfigurationError: there are no tables of this version; names the command to run.
        DatabaseUnavailable: PostgreSQL cannot be reached.
    """
    with translated():
        async with engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="REPEATABLE READ")
            await schema.check_version(connection, schema_name)
            found = await _figures(connection, schema_name)
            await plain.rollback()
            found |= {"holders": [], "unseen": []}
            try:
                holders = await inspecting.holders(plain, schema_name, HELD_SINCE)
            except SQLAlchemyError as error:  # a role may not see others' sessions
                found["unseen"].append(f"who holds the vacuum back: {type(error).__name__}")
            else:
                found["holders"] = [_holder(each) for each in holders]
    if client is not None:
        await _add_lag(found, client, stream)
    return found


async def _figures(connection: AsyncConnection, name: str) -> dict[str, Any]:
    version = await schema.version(connection, name)
    counts = await counting.count(connection, name)
    lanes = await counting.lanes(connection, name)
    letters = await counting.open_letters(connection, name)
    oldest_event = await overview.oldest(connection, name)
    handled = await overview.handled_per_second(connection, name)
    numbers, oldest = counts.numbers, counts.oldest
    return {
        "pending": numbers["pending"],
        "oldest_pending_seconds": None if oldest is None else round(oldest.total_seconds(), 3),
        "oldest_pending_subject": None if oldest_event is None else oldest_event[0],
        "oldest_pending_key": None if oldest_event is None else oldest_event[1],
        "scheduled": numbers["scheduled"],
        "published": numbers["published"],
        "published_per_second": await overview.published_per_second(connection, name),
        "dead_letters": numbers["dead_letters"],
        "inbox": numbers["inbox"],
        "schema_version": version,
        "lanes": [asdict(lane) for lane in lanes],
        "waiting": [each._asdict() for each in await overview.waiting(connection, name)],
        "dead_letters_by": [
            {"side": side, "reason": reason, "count": number}
            for (side, reason), number in sorted(letters.items())
        ],
        "listeners": [
            each._asdict()
            | {
                "handled_per_second": round(handled.get(each.listener, 0.0), 3),
                "unread": None,
                "unacked": None,
            }
            for each in await overview.listeners(connection, name)
        ],
        "estimated": counts.estimated,
    }


def _holder(holder: inspecting.Holder) -> dict[str, Any]:
    found = holder._asdict()
    return found | {"age": round(holder.age.total_seconds(), 1)}


async def _add_lag(found: dict[str, Any], client: Api, stream: str) -> None:
    for each in found["listeners"]:
        try:
            info = await provisioning.consumer_info(client, stream, each["listener"])
        except OutboxError as error:
            found["unseen"].append(f"how far listeners are on stream {stream}: {error}")
            return
        if info is None:
            found["unseen"].append(f"{each['listener']} has no consumer on stream {stream}")
        else:
            each["unread"], each["unacked"] = info["num_pending"], info["num_ack_pending"]
