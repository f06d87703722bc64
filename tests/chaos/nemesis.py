"""The faults, each a coroutine that does it, lets it last, and ends it."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from datetime import timedelta

from outbox import Settings
from outbox.operate import redrive
from outbox.operate.prune import prune
from outbox.operate.replay import replay
from outbox.postgres.redrive import Filter
from outbox.postgres.replaying import Window
from tests.chaos.failpoints import ACTIONS, LISTENER_STEPS, RELAY_STEPS
from tests.chaos.listeners import SUBJECTS
from tests.chaos.shared import LEASE_SECONDS, STREAM, Failpoint
from tests.chaos.stage import Stage, keep_store, put_back
from tests.servers import jetstream, proxy

Fault = Callable[[Stage], Awaitable[bool]]  # whether it fired
# Of eight days and more ago; nobody published or handled them, so no trigger is to see them come.
OLD_ROWS = """
WITH quiet AS MATERIALIZED (SELECT set_config('session_replication_role', 'replica', true) AS q),
days AS (SELECT CAST(extract(epoch FROM now()) AS int8) / 86400 - 9 AS day, q FROM quiet),
handled AS (
  INSERT INTO outbox.inbox (listener, event_id, processed_at)
  SELECT 'gone', gen_random_uuid(), now() - interval '8 days' FROM quiet, generate_series(1, 20)
)
INSERT INTO outbox.archive (id, event_id, slot, subject, headers, body, created_at, stream,
                            sequence, published_at, day)
SELECT 0, gen_random_uuid(), 0, 'evt.old.v1', '', '', to_timestamp(day * 86400), 'GLAM_EVENTS', 0,
       to_timestamp(day * 86400), day % 32
FROM days, generate_series(1, 20)
"""
TRAP_SECONDS = 2.0
STEP_SECONDS = 2.0


# ---- processes --------------------------------------------------------------------------------


def _signalled(role: str, number: signal.Signals) -> Fault:
    async def fault(stage: Stage) -> bool:
        living = stage.of(role)
        return bool(living) and stage.random.choice(living).signal(number)

    return fault


def _paused(role: str) -> Fault:
    async def fault(stage: Stage) -> bool:
        """Stop a process for longer than a lease; it goes on as if nothing had been."""
        living = stage.of(role)
        if not living:
            return False
        child = stage.random.choice(living)
        if not child.signal(signal.SIGSTOP):
            return False
        await asyncio.sleep(1.3 * LEASE_SECONDS)
        return child.signal(signal.SIGCONT)

    return fault


def _at_step(role: str, action: str) -> Fault:
    steps = RELAY_STEPS if role == "relay" else LISTENER_STEPS

    async def fault(stage: Stage) -> bool:
        """Have the first process that comes to a step do something to itself there."""
        living = stage.of(role)
        point = Failpoint(str(stage.random.choice(steps)), action, stage.random.choice((1, 2, 5)))
        for child in living:
            point.save(child.orders.told)
            child.signal(signal.SIGUSR2)
        fired = await stage.noted(f"{role}_{action}_at_step", STEP_SECONDS)
        for child in living:
            child.signal(signal.SIGUSR1)
        return fired

    return fault


# ---- servers ----------------------------------------------------------------------------------


async def backends_terminated(stage: Stage) -> bool:
    """End some of the sessions, as an administrator would."""
    sql = """
    SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
    WHERE datname IN ('shop', 'warehouse') AND pid <> pg_backend_pid() AND random() < 0.5
    """
    return bool((await stage.execute("postgres", sql))[0][0])


async def backend_killed(stage: Stage) -> bool:
    """Kill one backend: all connections drop, and PostgreSQL recovers."""
    sql = "SELECT pid FROM pg_stat_activity WHERE datname IN ('shop', 'warehouse')"
    rows = await stage.execute("postgres", sql)
    if not rows:
        return False
    os.kill(stage.random.choice(rows)[0], signal.SIGKILL)
    return True


async def postgres_restarted(stage: Stage) -> bool:
    """Have PostgreSQL end as in a crash, and recover."""
    await stage.blocking(stage.postgres.restart, "immediate")
    return True


async def nats_killed(stage: Stage) -> bool:
    """Kill nats-server; start it again on the same files."""
    await stage.blocking(stage.nats.kill)
    await asyncio.sleep(stage.random.uniform(0.2, 1.0))
    await stage.blocking(stage.nats.start)
    return True


async def nats_paused(stage: Stage) -> bool:
    """Have nats-server hang with all its connections open."""
    os.kill(stage.nats.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(2.5)
    finally:
        os.kill(stage.nats.pid, signal.SIGCONT)
    return True


async def broker_restored(stage: Stage) -> bool:
    """Put an older copy of the broker's files back: what it acknowledged since is lost."""
    await stage.blocking(stage.nats.stop)
    copy = keep_store(stage)
    await stage.blocking(stage.nats.start)
    before = await _last(stage)
    await asyncio.sleep(1.5)
    lost = await _last(stage) - before
    await stage.blocking(stage.nats.kill)
    put_back(stage, copy)
    await stage.blocking(stage.nats.start)
    return lost > 0


async def lane_taken_away(stage: Stage) -> bool:
    """Give the lane to somebody else behind its owner's back, as after a long sleep of its host."""
    sql = """
    UPDATE outbox.lane SET owner = gen_random_uuid(), owner_name = 'elsewhere:0', epoch = epoch + 1,
           expires_at = clock_timestamp() + interval '1 second'
    WHERE owner IS NOT NULL RETURNING 1
    """
    return bool(await stage.execute("shop", sql))


async def stream_full(stage: Stage) -> bool:
    """Let the stream take nothing for a while."""
    config = await _config(stage)
    await _update(stage, config | {"max_bytes": 1})
    try:
        await asyncio.sleep(2.5)
    finally:
        await _update(stage, config)
    return True


async def consumer_deleted(stage: Stage) -> bool:
    """Delete a durable; its listener makes it again, from the start."""
    name = stage.random.choice(list(SUBJECTS))
    await asyncio.to_thread(jetstream.api, stage.nats.url, f"CONSUMER.DELETE.{STREAM}.{name}", {})
    return True


async def _config(stage: Stage) -> dict[str, object]:
    info = await asyncio.to_thread(jetstream.api, stage.nats.url, f"STREAM.INFO.{STREAM}")
    config: dict[str, object] = info["config"]
    return config


async def _last(stage: Stage) -> int:
    info = await asyncio.to_thread(jetstream.api, stage.nats.url, f"STREAM.INFO.{STREAM}")
    return int(info["state"]["last_seq"])


async def _update(stage: Stage, config: dict[str, object]) -> None:
    await asyncio.to_thread(jetstream.api, stage.nats.url, f"STREAM.UPDATE.{STREAM}", config)


# ---- the network ------------------------------------------------------------------------------


async def connections_cut(stage: Stage) -> bool:
    """Reset all connections of a role to a server."""
    _some(stage).cut()
    return True


async def traffic_stalled(stage: Stage) -> bool:
    """Let nothing through for a while; nothing of it is lost."""
    some = _some(stage)
    some.stall()
    await asyncio.sleep(stage.random.uniform(0.5, 2.5))
    some.open()
    return True


async def traffic_lost(stage: Stage) -> bool:
    """Lose what is sent for a while, with the connections open; then reset them."""
    some = _some(stage)
    some.lose()
    await asyncio.sleep(stage.random.uniform(0.5, 2.5))
    some.open()
    return True


def _some(stage: Stage) -> proxy.Proxy:
    return stage.proxies[stage.random.choice(sorted(stage.proxies))]


def _cut_at(moment: tuple[proxy.Side, bytes, bool], *names: str) -> Fault:
    async def fault(stage: Stage) -> bool:
        chosen = stage.proxies[stage.random.choice(names)]
        trap = chosen.trap(*moment)
        for _ in range(int(TRAP_SECONDS / 0.05)):
            if trap.fired:
                return True
            await asyncio.sleep(0.05)
        chosen.disarm()
        return False

    return fault


# ---- people -----------------------------------------------------------------------------------


async def letters_requeued(stage: Stage) -> bool:
    """Requeue some dead letters of listeners, of which half may be handled now."""
    ids = await _open_letters(stage, "warehouse", "listener")
    if not ids:
        return False
    await stage.execute(
        "warehouse",
        "INSERT INTO amnesty SELECT event_id FROM outbox.dead_letter"
        f" WHERE id IN ({', '.join(map(str, ids[::2]))}) ON CONFLICT DO NOTHING",
    )
    return await _acted(stage, "warehouse", ids, "requeued")


async def letters_discarded(stage: Stage) -> bool:
    """Discard a dead letter of a listener."""
    ids = await _open_letters(stage, "warehouse", "listener")
    return bool(ids) and await _acted(stage, "warehouse", ids[:1], "discarded")


async def refused_requeued(stage: Stage) -> bool:
    """Requeue what a relay could not publish, and cannot now."""
    ids = await _open_letters(stage, "shop", "relay")
    return bool(ids) and await _acted(stage, "shop", ids[:3], "requeued")


async def _open_letters(stage: Stage, database: str, side: str) -> list[int]:
    sql = f"""
    SELECT id FROM outbox.dead_letter
    WHERE state = 'open' AND side = '{side}' AND random() < 0.5 LIMIT 20
    """
    return [row[0] for row in await stage.execute(database, sql)]


async def _acted(stage: Stage, database: str, ids: list[int], action: str) -> bool:
    """Act twice, as somebody does who did not see the first answer."""
    async with stage.engine(database) as engine:
        numbers = [
            await redrive.acted(engine, "outbox", Filter(ids=ids), action=action, by="chaos")
            for _ in range(2)
        ]
    return numbers[0] > 0


async def events_replayed(stage: Stage) -> bool:
    """Publish once more what was published last."""
    ((newest,),) = await stage.execute("shop", "SELECT max(published_at) FROM outbox.archive")
    if newest is None:
        return False
    window = Window(since=newest - timedelta(seconds=0.3), until=newest + timedelta(seconds=0.1))
    async with stage.engine("shop") as engine:
        return (await replay(engine, "outbox", window, by="chaos")).taken > 0


async def old_rows_pruned(stage: Stage) -> bool:
    """Delete what is past its retention, among rows that are not."""
    fired = False
    for database in ("shop", "warehouse"):
        await stage.execute(database, OLD_ROWS)
        async with stage.engine(database) as engine:
            gone = await prune(engine, Settings.defaults())
            fired = gone.inbox > 0 and gone.archive > 0
    return fired


FAULTS: dict[str, Fault] = {
    "app_killed": _signalled("app", signal.SIGKILL),
    "relay_killed": _signalled("relay", signal.SIGKILL),
    "listener_killed": _signalled("listener", signal.SIGKILL),
    "relay_stopped": _signalled("relay", signal.SIGTERM),
    "listener_stopped": _signalled("listener", signal.SIGTERM),
    "relay_paused": _paused("relay"),
    "listener_paused": _paused("listener"),
    "backends_terminated": backends_terminated,
    "backend_killed": backend_killed,
    "postgres_restarted": postgres_restarted,
    "nats_killed": nats_killed,
    "nats_paused": nats_paused,
    "broker_restored": broker_restored,
    "lane_taken_away": lane_taken_away,
    "stream_full": stream_full,
    "consumer_deleted": consumer_deleted,
    "connections_cut": connections_cut,
    "traffic_stalled": traffic_stalled,
    "traffic_lost": traffic_lost,
    "cut_before_commit": _cut_at(proxy.BEFORE_COMMIT, "app-postgres", "listener-postgres"),
    "cut_after_commit": _cut_at(proxy.AFTER_COMMIT, "app-postgres", "listener-postgres"),
    "cut_before_pub_ack": _cut_at(proxy.BEFORE_PUB_ACK, "relay-nats"),
    "cut_after_pub_ack": _cut_at(proxy.AFTER_PUB_ACK, "relay-nats"),
    "cut_before_ack": _cut_at(proxy.BEFORE_ACK, "listener-nats"),
    "cut_after_ack": _cut_at(proxy.AFTER_ACK, "listener-nats"),
    "letters_requeued": letters_requeued,
    "letters_discarded": letters_discarded,
    "refused_requeued": refused_requeued,
    "events_replayed": events_replayed,
    "old_rows_pruned": old_rows_pruned,
    **{
        f"{role}_{action}_at_step": _at_step(role, action)
        for role in ("relay", "listener")
        for action in ACTIONS
    },
}
# One of these at a time: each takes a server away.
EXCLUSIVE = frozenset(
    {
        *("backend_killed", "postgres_restarted", "nats_killed", "nats_paused"),
        *("broker_restored", "stream_full", "consumer_deleted"),
    }
)
# Done by the processes themselves, and noted in the journal.
NOTED = ("commit_cancelled", "rolled_back", "savepoint_rolled_back", "late_commit")
