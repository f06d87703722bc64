"""The relay when things go wrong: pauses, late commits, full streams, lost backends."""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from typing_extensions import override

from outbox.embedded import EmbeddedNats
from outbox.jetstream import publishing
from outbox.jetstream.client import JetStreamClient
from outbox.relay import Relay, lane
from outbox.settings import Settings
from outbox.telemetry import Moment, Step
from tests.faults import Watch
from tests.servers.events import count, insert, published

ROOT = Path(__file__).parents[2]
SHORT = Settings.defaults(lease=2, publish_timeout=1, page_rows_max=100)
ONE = (
    "INSERT INTO outbox.pending (event_id, slot, subject, headers, body) "
    "SELECT gen_random_uuid(), 0, 'evt.test.late.v1', '', '{}' FROM generate_series(1, 3) "
    "RETURNING CAST(event_id AS text)"
)
WRITER = """
import asyncio, sys
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from outbox import Outbox

async def main():
    engine = create_async_engine(sys.argv[1])
    async with AsyncSession(engine) as session:
        Outbox(source_service="test").add(session, "evt.test.added.v1", {"n": 1})
        await session.commit()
    await engine.dispose()

asyncio.run(main())
"""


class KillBroker(Watch):
    """Kills the broker each time that frames were handed over, the first `times` times."""

    def __init__(self, server: EmbeddedNats, times: int) -> None:
        super().__init__()
        self._server = server
        self._times = times

    @override
    def on_step(self, moment: Moment) -> None:
        if moment.step is Step.SENT and self._times:
            self._times -= 1
            self._server.kill()
            self._server.start()
        super().on_step(moment)


async def eventually(check: Callable[[], Awaitable[bool]], within: float = 9.0) -> None:
    """Return once `check` holds: for what no observer tells."""
    async with asyncio.timeout(within):
        while not await check():  # noqa: ASYNC110 - a database cannot be waited on
            await asyncio.sleep(0.02)


async def is_(value: Awaitable[int], wanted: int) -> bool:
    """Return whether `value` is `wanted`."""
    return await value == wanted


async def late(connection: AsyncConnection) -> list[str]:
    """Insert three events, not committed; return their ids."""
    return list((await connection.execute(text(ONE))).scalars())


async def limit(client: JetStreamClient, stream: str, messages: int) -> None:
    """Set the most messages that `stream` takes."""
    config = (await client.get_stream_info(stream))["config"]
    await client.api(f"STREAM.UPDATE.{stream}", {**config, "max_msgs": messages})


async def test_paused_relay_does_no_harm_after_its_lease(
    engine: AsyncEngine,
    database_url: str,
    js_client: JetStreamClient,
    nats_server: str,
    stream: str,
) -> None:
    ids = await insert(engine, [f"k{n % 5}" if n % 2 else None for n in range(4000)])
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.guarantees.relay_child", database_url, nats_server, Step.READ, "1000000"),
        cwd=ROOT,
    )
    try:
        await eventually(lambda: _some(count(engine, "archive")))
        child.send_signal(signal.SIGSTOP)
        poison = await insert(engine, ["k1"], body=b"x" * (js_client.max_payload + 1))
        more = await insert(engine, ["k1"] * 3)
        watch = Watch()
        async with Relay(engine, js_client, settings=SHORT, observer=watch):
            await watch.until(Step.LANE_TAKEN)
            child.send_signal(signal.SIGCONT)
            await eventually(lambda: is_(count(engine, "pending"), 0))
        assert [each.event_id for each in watch.of(Step.DEAD_LETTERED)] == poison
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()
    assert await count(engine, "dead_letter") == 1
    assert await count(engine, "waiting") == 0
    assert sorted(await published(js_client, stream)) == sorted([*ids, *more])


async def _some(value: Awaitable[int]) -> bool:
    return await value > 0


@pytest.mark.parametrize("sweep", [30.0, 0.05])
async def test_late_commit_with_lower_ids_is_published(
    engine: AsyncEngine,
    js_client: JetStreamClient,
    stream: str,
    monkeypatch: pytest.MonkeyPatch,
    sweep: float,
) -> None:
    monkeypatch.setattr(lane, "SWEEP", timedelta(seconds=sweep))
    watch = Watch()
    sent = 0
    wanted: list[str] = []
    async with Relay(engine, js_client, settings=SHORT, observer=watch) as relay:
        for _ in range(3):
            async with engine.connect() as connection:
                wanted += await late(connection)
                for _ in range(3):
                    wanted += await insert(engine, 150)
                    sent += 150
                    await watch.until_events(Step.SETTLED, sent)
                await connection.commit()
            sent += 3
            await watch.until_events(Step.SETTLED, sent)  # before the sweep of 30 s
        assert relay.health().rows_below_floor == 0
    assert sorted(await published(js_client, stream)) == sorted(wanted)


async def test_notify_of_another_process_wakes_the_relay(
    engine: AsyncEngine,
    database_url: str,
    js_client: JetStreamClient,
    stream: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lane, "IDLE_FIRST", 60.0)  # it sleeps until it is woken
    watch = Watch()
    async with Relay(engine, js_client, observer=watch):
        await watch.until(Step.LANE_TAKEN)
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", WRITER, database_url)
        assert await child.wait() == 0
        await watch.until_events(Step.SETTLED, 1, within=5)
    assert len(await published(js_client, stream)) == 1


async def test_full_stream_is_an_outage_and_spends_nothing(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    await limit(js_client, stream, 10)
    ids = await insert(engine, ["k", None] * 20)
    watch = Watch()
    async with Relay(engine, js_client, observer=watch):
        await watch.until(Step.OUTAGE_BEGAN)
        await eventually(lambda: is_(count(engine, "pending"), 30))
        assert await count(engine, "waiting") == await count(engine, "dead_letter") == 0
        await limit(js_client, stream, -1)
        await watch.until_events(Step.SETTLED, 40)
        await watch.until(Step.OUTAGE_ENDED)
    stored = await published(js_client, stream)
    assert sorted(stored) == sorted(ids)
    assert [each for each in stored if each in ids[::2]] == ids[::2]


async def test_terminated_backends_lose_nothing(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    keys = [f"k{n % 3}" if n % 2 else None for n in range(1500)]
    ids = await insert(engine, keys)
    watch = Watch()
    async with Relay(engine, js_client, settings=SHORT, observer=watch):
        for pages in (1, 4, 7):
            await watch.until(Step.SETTLED, pages)
            async with engine.begin() as connection:
                await connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                )
        await eventually(lambda: is_(count(engine, "pending"), 0))
    stored = await published(js_client, stream)
    assert sorted(stored) == sorted(ids)
    wanted = [each for each, key in zip(ids, keys, strict=True) if key == "k1"]
    assert [each for each in stored if each in set(wanted)] == wanted


async def test_two_relays_started_at_once_publish_each_event_once(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    ids = await insert(engine, 500)
    first, second = Watch(), Watch()
    async with (
        Relay(engine, js_client, observer=first),
        Relay(engine, js_client, observer=second),
    ):
        await eventually(lambda: is_(count(engine, "pending"), 0))
    assert sorted(await published(js_client, stream)) == sorted(ids)
    assert {first.count(Step.SETTLED), second.count(Step.SETTLED)} == {0, 500}
    assert not first.of(Step.DUPLICATE)
    assert not second.of(Step.DUPLICATE)


async def test_drain_beside_a_live_relay_waits_for_its_work(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    watch, own = Watch(), Watch()
    async with Relay(engine, js_client, settings=SHORT, observer=watch):
        await watch.until(Step.LANE_TAKEN)
        ids = await insert(engine, 1000)
        drained = await Relay(engine, js_client, settings=SHORT, observer=own).drain()
        assert drained.complete
        assert await count(engine, "pending") == 0
    assert not own.of(Step.SETTLED)
    assert len(await published(js_client, stream)) == len(ids)


async def test_drain_after_a_dead_relay_waits_for_its_lease(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    await insert(engine, 5)
    async with engine.begin() as connection:
        await connection.execute(
            text(
                "UPDATE outbox.lane SET owner = gen_random_uuid(), epoch = epoch + 1, "
                "expires_at = clock_timestamp() + interval '2 seconds'"
            )
        )
    drained = await Relay(engine, js_client, settings=SHORT).drain()
    assert (drained.complete, drained.published, drained.remaining) == (True, 5, 0)
    assert len(await published(js_client, stream)) == 5


async def test_each_purge_needs_one_more_suffix(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    ids = await insert(engine, 1)
    for suffix in ("", "~r1", "~r2"):
        assert (await Relay(engine, js_client).drain()).complete
        assert await published(js_client, stream) == [f"{ids[0]}{suffix}"]
        await js_client.api(f"STREAM.PURGE.{stream}")
        await insert(engine, 1, ids=ids)


async def test_waiting_event_on_which_the_server_hangs_up_spares_the_others(
    engine: AsyncEngine,
    js_client: JetStreamClient,
    stream: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing, "obstacle", lambda *_, **__: None)
    poison = await insert(engine, 1, body=b"x" * (js_client.max_payload + 1))
    others = await insert(engine, 3)
    async with engine.begin() as connection:
        await connection.execute(
            text(
                "WITH moved AS (DELETE FROM outbox.pending RETURNING *) "
                "INSERT INTO outbox.waiting (id, event_id, slot, key, subject, headers, body, "
                "created_at, reason, attempts, due_at, republished) "
                "SELECT id, event_id, slot, key, subject, headers, body, created_at, 'failed', "
                "1, now(), 0 FROM moved"
            )
        )
    watch = Watch()
    settings = Settings.defaults(publish_attempts_max=1)
    async with Relay(engine, js_client, settings=settings, observer=watch):
        await watch.until(Step.DEAD_LETTERED)
        await watch.until_events(Step.SETTLED, 3)
    assert [each.event_id for each in watch.of(Step.DEAD_LETTERED)] == poison
    assert await count(engine, "dead_letter", "reason = 'closes_connection'") == 1
    assert sorted(await published(js_client, stream)) == sorted(others)


async def test_event_alone_in_flight_is_not_blamed_for_restarts_of_the_broker(
    engine: AsyncEngine, private_nats: EmbeddedNats
) -> None:
    async with JetStreamClient(private_nats.url) as client:
        await client.ensure_stream("EVENTS", ["evt.>", "cmd.>"])
        ids = await insert(engine, ["k"])
        watch = KillBroker(private_nats, 4)
        settings = Settings.defaults(publish_attempts_max=1)
        async with Relay(engine, client, settings=settings, observer=watch):
            await watch.until_events(Step.SETTLED, 1)
        assert await published(client, "EVENTS") == ids
    assert watch.count(Step.SENT) >= 4
    assert not watch.of(Step.DEAD_LETTERED)
    assert not watch.of(Step.HELD)
