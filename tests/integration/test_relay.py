"""The relay on real servers: order, waiting rows, dead letters, outages, leases."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from outbox.errors import ConfigurationError
from outbox.jetstream import publishing
from outbox.jetstream.client import JetStreamClient
from outbox.postgres import driver, schema
from outbox.relay import Relay, upkeep
from outbox.relay.drain import Progress
from outbox.settings import Settings
from outbox.telemetry import Step
from tests.faults import Watch
from tests.servers.events import count, insert, published

SETTINGS = Settings.defaults(lease=6)


async def eventually(check: Callable[[], Awaitable[bool]], within: float = 15.0) -> None:
    """Return once `check` holds: for what no observer tells."""
    async with asyncio.timeout(within):
        while not await check():  # noqa: ASYNC110 - a database cannot be waited on
            await asyncio.sleep(0.02)


async def test_pending_events_are_published_and_archived(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    ids = await insert(engine, 2500)
    watch = Watch()
    async with Relay(engine, js_client, observer=watch):
        await watch.until_events(Step.SETTLED, 2500)
    assert sorted(await published(js_client, stream)) == sorted(ids)
    assert await count(engine, "pending") == 0
    assert await count(engine, "archive", "stream = 'EVENTS' AND sequence > 0") == 2500


async def test_archive_off_deletes(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    await insert(engine, 10)
    settings = Settings.defaults(archive_retention=None)
    drained = await Relay(engine, js_client, settings=settings).drain()
    assert drained.complete
    assert await count(engine, "pending") == await count(engine, "archive") == 0
    assert len(await published(js_client, stream)) == 10


async def test_events_of_a_key_are_published_in_order(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    keys = [f"k{n % 3}" if n % 4 else None for n in range(1200)]
    ids = await insert(engine, keys)
    assert (await Relay(engine, js_client).drain()).complete
    stored = await published(js_client, stream)
    for key in ("k0", "k1", "k2"):
        wanted = [each for each, own in zip(ids, keys, strict=True) if own == key]
        chosen = set(wanted)
        assert [each for each in stored if each in chosen] == wanted


async def test_event_above_the_payload_limit_is_a_dead_letter_and_its_followers_go_on(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    first = await insert(engine, ["k"], body=b"x" * (js_client.max_payload + 1))
    rest = await insert(engine, ["k", "k", None])
    watch = Watch()
    assert (await Relay(engine, js_client, observer=watch).drain()).complete
    assert set(await published(js_client, stream)) == set(rest)
    assert [m.event_id for m in watch.of(Step.DEAD_LETTERED)] == first
    assert await count(engine, "dead_letter", "side = 'relay' AND reason = 'too_large'") == 1
    assert await count(engine, "pending") == 0


async def test_scheduled_event_waits_and_does_not_block_its_key(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    later = await insert(engine, ["k"], later=timedelta(seconds=1.5))
    now = await insert(engine, ["k"])
    watch = Watch()
    async with Relay(engine, js_client, observer=watch):
        await watch.until(Step.HELD)
        assert await count(engine, "waiting", "reason = 'scheduled'") == 1
        await watch.until_events(Step.SETTLED, 2)
    assert await published(js_client, stream) == [*now, *later]
    assert await count(engine, "waiting") == 0


async def test_subject_without_a_stream_waits_and_the_others_flow(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    homeless = await insert(engine, ["k"], subject="other.thing")
    behind = await insert(engine, ["k"])
    others = await insert(engine, 5)
    watch = Watch()
    async with Relay(engine, js_client, observer=watch):
        await watch.until_events(Step.SETTLED, 5)
        await eventually(lambda: _is(count(engine, "waiting"), 2))
        assert set(await published(js_client, stream)) == set(others)
        assert await count(engine, "waiting", "reason = 'failed' AND attempts = 0") == 1
        assert await count(engine, "waiting", "reason = 'blocked'") == 1
        await js_client.ensure_stream("OTHER", ["other.>"])
        await js_client.delete_stream("OTHER")
        assert await count(engine, "dead_letter") == 0
    assert homeless != behind


async def _is(value: Awaitable[int], wanted: int) -> bool:
    return await value == wanted


async def test_blocked_followers_go_in_order_once_their_head_has_left(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    ids = await insert(engine, ["k"] * 6)
    async with engine.begin() as connection:
        await connection.execute(
            text(
                "WITH moved AS (DELETE FROM outbox.pending WHERE id IN "
                "(SELECT id FROM outbox.pending ORDER BY id LIMIT 3) RETURNING *) "
                "INSERT INTO outbox.waiting (id, event_id, slot, key, subject, headers, body, "
                "created_at, reason, attempts, due_at, republished) "
                "SELECT id, event_id, slot, key, subject, headers, body, created_at, "
                "CASE WHEN row_number() OVER (ORDER BY id) = 1 THEN 'failed' ELSE 'blocked' END, "
                "1, CASE WHEN row_number() OVER (ORDER BY id) = 1 "
                "THEN now() + interval '1 second' ELSE 'infinity' END, 0 FROM moved"
            )
        )
    watch = Watch()
    async with Relay(engine, js_client, observer=watch):
        await watch.until(Step.HELD)  # the three later ones went behind the blocked key
        await watch.until_events(Step.SETTLED, 6)
    assert await published(js_client, stream) == ids
    assert await count(engine, "waiting") == 0


async def test_second_publication_is_confirmed_when_the_stream_holds_this_event(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    ids = await insert(engine, 3)
    assert (await Relay(engine, js_client).drain()).complete
    await insert(engine, 3, ids=ids)
    watch = Watch()
    assert (await Relay(engine, js_client, observer=watch).drain()).complete
    assert watch.count(Step.DUPLICATE) == 3
    assert await published(js_client, stream) == ids
    assert await count(engine, "archive") == 6


async def test_id_of_another_event_is_a_dead_letter(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    ids = await insert(engine, 1, subject="evt.one")
    assert (await Relay(engine, js_client).drain()).complete
    await insert(engine, 1, subject="evt.two", ids=ids)
    assert (await Relay(engine, js_client).drain()).complete
    assert await count(engine, "dead_letter", "reason = 'id_reuse'") == 1


async def test_duplicate_of_a_purged_message_is_sent_again(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    ids = await insert(engine, 2)
    assert (await Relay(engine, js_client).drain()).complete
    await js_client.api(f"STREAM.PURGE.{stream}")
    await insert(engine, 2, ids=ids)
    assert (await Relay(engine, js_client).drain()).complete
    assert await published(js_client, stream) == [f"{each}~r1" for each in ids]


async def test_standby_takes_over_within_the_lease(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    first, second = Watch(), Watch()
    active = Relay(engine, js_client, settings=SETTINGS, observer=first)
    await active.start()
    await first.until(Step.LANE_TAKEN)
    async with Relay(engine, js_client, settings=SETTINGS, observer=second) as standby:
        await insert(engine, 5)
        await first.until_events(Step.SETTLED, 5)
        assert not second.of(Step.LANE_TAKEN)
        assert not standby.health().lane_owned
        await active.stop()
        await second.until(Step.LANE_TAKEN, within=5)
        await insert(engine, 5)
        await second.until_events(Step.SETTLED, 5)
    assert len(await published(js_client, stream)) == 10


async def test_relay_whose_lane_was_taken_moves_nothing(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    watch = Watch()
    async with Relay(engine, js_client, settings=SETTINGS, observer=watch):
        await watch.until(Step.LANE_TAKEN)
        async with engine.begin() as connection:
            await connection.execute(
                text(
                    "UPDATE outbox.lane SET owner = gen_random_uuid(), epoch = epoch + 1, "
                    "expires_at = clock_timestamp() + interval '2 seconds'"
                )
            )
        await insert(engine, 1, body=b"x" * (js_client.max_payload + 1))
        await watch.until(Step.LANE_LOST)
        assert await count(engine, "dead_letter") == 0
        await watch.until(Step.LANE_TAKEN, 2)
        await watch.until(Step.DEAD_LETTERED)


async def test_broker_restart_in_the_middle_loses_nothing_and_spends_nothing(
    engine: AsyncEngine, private_nats: EmbeddedNats
) -> None:
    async with JetStreamClient(private_nats.url) as client:
        await client.ensure_stream("EVENTS", ["evt.>", "cmd.>"])
        ids = await insert(engine, 3000)
        watch = Watch()
        async with Relay(engine, client, observer=watch):
            await watch.until(Step.SETTLED)
            await asyncio.to_thread(private_nats.kill)
            more = await insert(engine, ["k"] * 20)
            await watch.until(Step.OUTAGE_BEGAN)
            await asyncio.to_thread(private_nats.start)
            await eventually(lambda: _is(count(engine, "pending"), 0), within=30)
        assert set(await published(client, "EVENTS")) == {*ids, *more}
        assert await count(engine, "waiting") == await count(engine, "dead_letter") == 0
        assert watch.of(Step.OUTAGE_ENDED)


async def test_database_restart_in_the_middle_loses_nothing(
    private_postgres: EmbeddedPostgres, js_client: JetStreamClient, stream: str
) -> None:
    engine = create_async_engine(private_postgres.url)
    await schema.upgrade(engine)
    ids = await insert(engine, 3000)
    watch = Watch()
    async with Relay(engine, js_client, observer=watch):
        await watch.until(Step.SETTLED)
        await asyncio.to_thread(private_postgres.restart, mode="immediate")
        await engine.dispose()
        more = await insert(engine, 5)
        await eventually(lambda: _is(count(engine, "pending"), 0), within=30)
    assert set(await published(js_client, stream)) == {*ids, *more}
    await engine.dispose()


async def test_missing_stream_refuses_to_start(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    settings = Settings.defaults(stream="NOWHERE")
    with pytest.raises(ConfigurationError, match="NOWHERE"):
        await Relay(engine, js_client, settings=settings).run()


async def test_drain_counts_what_is_scheduled(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    await insert(engine, 3)
    await insert(engine, 2, later=timedelta(hours=1))
    shown: list[Progress] = []
    drained = await Relay(engine, js_client).drain(shown.append)
    assert drained.complete
    assert (drained.published, drained.scheduled) == (3, 2)
    assert shown[-1].published == shown[-1].total
    assert len(await published(js_client, stream)) == 3


async def test_active_relay_uses_three_connections_and_leaves_none(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    watch = Watch()
    sql = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type LIKE 'cl%'"
    )

    async def sessions() -> int:
        async with engine.connect() as connection:
            return int(await connection.scalar(text(sql)) or 0)

    before = await sessions()
    async with Relay(engine, js_client, observer=watch):
        await insert(engine, 1)
        await watch.until(Step.SETTLED)
        assert await sessions() - before <= 3
    await eventually(lambda: _is(sessions(), before))


async def test_upkeep_empties_old_partitions_and_prunes_the_inbox(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(
            text(
                "INSERT INTO outbox.archive (id, event_id, slot, subject, headers, body, "
                "created_at, stream, sequence, published_at, day) "
                "SELECT n, gen_random_uuid(), 0, 'evt.a', '', '', now(), 'EVENTS', n, now(), "
                "(CAST(floor(extract(epoch FROM now())) AS int8) / 86400 - n) % 32 "
                "FROM generate_series(0, 5) AS n"
            )
        )
        await connection.execute(
            text(
                "INSERT INTO outbox.inbox (listener, event_id, processed_at) VALUES "
                "('a', gen_random_uuid(), now()), "
                "('a', gen_random_uuid(), now() - interval '30 days')"
            )
        )
    async with driver.connection(engine) as (held, raw):
        await upkeep.turn_archive(raw, Settings.defaults())
        assert not await upkeep.prune_inbox(held, Settings.defaults())
    assert await count(engine, "archive") == 2  # today and yesterday
    assert await count(engine, "inbox") == 1


async def test_event_on_which_the_server_hangs_up_is_found_and_given_up(
    engine: AsyncEngine,
    js_client: JetStreamClient,
    stream: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The check before sending is switched off, so that the server refuses the frame itself.
    monkeypatch.setattr(publishing, "obstacle", lambda *_, **__: None)
    poison = await insert(engine, 1, body=b"x" * (js_client.max_payload + 1))
    others = await insert(engine, 5)
    watch = Watch()
    async with Relay(engine, js_client, observer=watch):
        await watch.until(Step.DEAD_LETTERED, within=60)
        await watch.until_events(Step.SETTLED, 5)
    assert [each.event_id for each in watch.of(Step.DEAD_LETTERED)] == poison
    assert set(await published(js_client, stream)) == set(others)
