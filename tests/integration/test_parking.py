"""`on_dead = "park_key"`: what follows a dead letter of its key waits until a person decides."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from typing_extensions import override

from outbox import EventEnvelope, JetStreamClient, Listener, Reject, Relay, Settings
from outbox.operate import redrive
from outbox.postgres import ordering, waiting
from outbox.postgres.redrive import Filter
from outbox.postgres.tables import raw
from outbox.telemetry import Step
from tests.faults import Watch
from tests.servers.events import count, insert, published

SUBJECT = "evt.letter.written.v1"


async def act(engine: AsyncEngine, action: str) -> int:
    return await redrive.acted(engine, "outbox", Filter(), action=action, by="me@here")


async def until(told: Callable[[], Awaitable[object]], wanted: object) -> None:
    """Return once `told` answers `wanted`; fail after 15 s."""
    try:
        async with asyncio.timeout(15):
            while await told() != wanted:  # noqa: ASYNC110 - a database tells nobody
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{await told()} instead of {wanted}") from None


# ---- relay ------------------------------------------------------------------------------------


@pytest.fixture
def settings(stream: str) -> Settings:
    return Settings.defaults(
        stream=stream,
        publish_attempts_max=1,
        on_dead="park_key",
        lease=timedelta(seconds=1),
        publish_timeout=0.5,
    )


async def limit(client: JetStreamClient, stream: str, most: int) -> None:
    config = (await client.get_stream_info(stream))["config"]
    await client.api(f"STREAM.UPDATE.{stream}", config | {"max_msg_size": most})


async def park(engine: AsyncEngine, client: JetStreamClient, stream: str) -> list[str]:
    """Commit four events of `k`, of which the second is too large; return their ids."""
    await limit(client, stream, 400)
    first = await insert(engine, ["k"])
    dead = await insert(engine, ["k"], body=b"x" * 500)
    return [*first, *dead, *await insert(engine, ["k", "k"])]


@pytest.mark.parametrize(("action", "kept"), [("requeued", True), ("discarded", False)])
async def test_followers_of_a_dead_event_are_published_in_order_once_somebody_has_decided(
    engine: AsyncEngine,
    js_client: JetStreamClient,
    settings: Settings,
    stream: str,
    *,
    action: str,
    kept: bool,
) -> None:
    ids = await park(engine, js_client, stream)
    async with Relay(engine, js_client, settings=settings):
        others = await insert(engine, ["other"] * 3)
        await until(lambda: published(js_client, stream), [ids[0], *others])
        late = await insert(engine, ["k"])
        await until(lambda: count(engine, "waiting", "reason = 'blocked'"), 3)
        assert await count(engine, "dead_letter", "parks AND state = 'open'") == 1
        await limit(js_client, stream, -1)
        assert await act(engine, action) == 1
        wanted = [ids[0], *others, *(ids[1:] if kept else ids[2:]), *late]
        await until(lambda: published(js_client, stream), wanted)
        last = await insert(engine, ["k"])
        await until(lambda: published(js_client, stream), [*wanted, *last])
    assert await count(engine, "waiting") == 0


async def test_a_key_stays_parked_over_a_restart_and_a_drain_ends_beside_it(
    engine: AsyncEngine, js_client: JetStreamClient, settings: Settings, stream: str
) -> None:
    ids = await park(engine, js_client, stream)
    drained = await Relay(engine, js_client, settings=settings).drain()
    assert (drained.complete, drained.backing_off) == (True, 2)
    late = await insert(engine, ["k", "other"])
    drained = await Relay(engine, js_client, settings=settings).drain()
    assert (drained.complete, drained.backing_off) == (True, 3)
    assert await published(js_client, stream) == [ids[0], late[1]]
    assert await act(engine, "discarded") == 1  # nobody relays at the moment
    assert (await Relay(engine, js_client, settings=settings).drain()).complete
    assert await published(js_client, stream) == [ids[0], late[1], *ids[2:], late[0]]


async def test_a_requeued_head_that_dies_again_parks_its_key_again(
    engine: AsyncEngine, js_client: JetStreamClient, settings: Settings, stream: str
) -> None:
    ids = await park(engine, js_client, stream)
    async with Relay(engine, js_client, settings=settings):
        await until(lambda: count(engine, "dead_letter", "state = 'open'"), 1)
        assert await act(engine, "requeued") == 1
        await until(lambda: count(engine, "dead_letter"), 2)
        assert await count(engine, "dead_letter", "state = 'open'") == 1
        assert await count(engine, "waiting", "reason = 'blocked'") == 2
        assert await published(js_client, stream) == ids[:1]
        await limit(js_client, stream, -1)
        assert await act(engine, "requeued") == 1
        await until(lambda: published(js_client, stream), ids)


async def test_followers_go_on_without_a_dead_event_by_default(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    ids = await park(engine, js_client, stream)
    usual = Settings.defaults(stream=stream, publish_attempts_max=1)
    assert (await Relay(engine, js_client, settings=usual).drain()).complete
    assert await published(js_client, stream) == [ids[0], *ids[2:]]
    assert await count(engine, "dead_letter", "parks") == 0


# ---- listener ---------------------------------------------------------------------------------


class Clerk(Listener):
    """Files each event, but for those that it is in no mood for."""

    subject = SUBJECT
    queue_group = "clerk"
    service_name = "office"
    ordered = True
    on_dead = "park_key"
    _refused: frozenset[int] = frozenset()

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        number = int(event.data["n"])
        if number in self._refused:
            raise Reject("not today")
        values = {"k": event.key, "n": number}
        await session.execute(text("INSERT INTO filed (key, n) VALUES (:k, :n)"), values)


@pytest.fixture
async def _filed(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        sql = "CREATE TABLE filed (id bigint GENERATED ALWAYS AS IDENTITY, key text, n int)"
        await connection.execute(text(sql))


async def send(client: JetStreamClient, key: str, numbers: Sequence[int]) -> None:
    for number in numbers:
        body = {
            "event_id": str(uuid4()),
            "event_type": SUBJECT,
            "source_service": "shop",
            "timestamp": "2026-11-25T07:00:00Z",
            "data": {"n": number},
        }
        await client.js.publish(SUBJECT, json.dumps(body).encode(), headers={"Outbox-Key": key})


def filed(engine: AsyncEngine, key: str) -> Callable[[], Awaitable[object]]:
    async def found() -> list[int]:
        async with engine.connect() as connection:
            sql = text("SELECT n FROM filed WHERE key = :key ORDER BY id")
            return list((await connection.execute(sql, {"key": key})).scalars())

    return found


@pytest.mark.usefixtures("_filed")
@pytest.mark.parametrize(
    ("action", "wanted"), [("requeued", [1, 2, 3, 4]), ("discarded", [1, 3, 4])]
)
async def test_a_listeners_followers_wait_behind_a_dead_letter_of_their_key(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    settings: Settings,
    action: str,
    wanted: list[int],
) -> None:
    clerk = Clerk(js_client, sessionmaker, settings=settings)
    clerk._refused = frozenset({2})
    await send(js_client, "k", [1, 2, 3])
    async with clerk:
        await send(js_client, "other", range(10, 15))
        await until(filed(engine, "other"), [10, 11, 12, 13, 14])
        await until(filed(engine, "k"), [1])
        await until(lambda: count(engine, "dead_letter", "parks AND state = 'open'"), 1)
    again = Clerk(js_client, sessionmaker, settings=settings)  # after a restart, in a better mood
    async with again:
        await send(js_client, "k", [4])
        await until(lambda: count(engine, "held", "key = 'k'"), 2)
        assert await filed(engine, "k")() == [1]
        assert await act(engine, action) == 1
        await until(filed(engine, "k"), wanted)
    assert await count(engine, "held") == 0


@pytest.mark.usefixtures("_filed")
async def test_a_requeued_event_that_fails_again_keeps_its_key_parked(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    settings: Settings,
) -> None:
    watch = Watch()
    clerk = Clerk(js_client, sessionmaker, settings=settings, observer=watch)
    clerk._refused = frozenset({1})
    await send(js_client, "k", [1, 2])
    async with clerk:
        await watch.until(Step.DEAD_LETTERED)
        assert await act(engine, "requeued") == 1
        await until(lambda: count(engine, "dead_letter_action", "action = 'failed'"), 1)
        await send(js_client, "other", [10])
        await until(filed(engine, "other"), [10])
        assert await filed(engine, "k")() == []
        clerk._refused = frozenset()
        assert await act(engine, "requeued") == 1
        await until(filed(engine, "k"), [1, 2])


async def test_parked_keys_are_found_by_their_index(engine: AsyncEngine) -> None:
    """A large table of old dead letters costs neither side anything."""
    fill = """
    INSERT INTO outbox.dead_letter (side, listener, event_id, key, subject, headers, body, reason,
                                    error, attempts, state, parks)
    SELECT 'listener', 'l', gen_random_uuid(), 'k' || n, 'evt.a.v1', '', '', 'r', 'e', 1,
           CASE WHEN n % 1000 = 0 THEN 'open' ELSE 'handled' END, true
    FROM generate_series(1, 50000) AS n
    """
    async with engine.begin() as connection:
        await connection.execute(text(fill))
    async with engine.connect() as connection:
        autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
        await autocommit.execute(text("ANALYZE outbox.dead_letter"))
    async with engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        blocked = await driver.fetch("EXPLAIN " + raw("outbox", waiting.BLOCKED), None)
        parked = await driver.fetch("EXPLAIN " + raw("outbox", waiting.PARKED), ["k1000"])
        values = {"listener": "l", "key": "k1000"}
        following = (
            await connection.execute(text("EXPLAIN " + raw("outbox", ordering.NEXT)), values)
        ).all()
    for plan in (blocked, parked, following):
        assert "Seq Scan on dead_letter" not in "\n".join(str(row[0]) for row in plan)


@pytest.mark.parametrize(
    ("declared", "error"),
    [
        ({"on_dead": "park_key"}, "needs ordered = True"),
        ({"on_dead": "park", "ordered": True}, "must be 'continue' or 'park_key'"),
    ],
)
def test_a_listener_that_declares_it_wrongly_is_refused(
    declared: dict[str, object], error: str
) -> None:
    with pytest.raises(TypeError, match=error):
        type("Wrong", (Listener,), {"subject": SUBJECT, "queue_group": "wrong", **declared})
