"""`outbox doctor` finds what a test has broken, and nothing where nothing is."""

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox import JetStreamClient, Relay, Settings
from outbox.cli.main import main
from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from outbox.errors import BrokerUnavailable, ConfigurationError
from outbox.findings import Finding, Severity
from outbox.jetstream import examining, provisioning
from outbox.operate import doctor
from outbox.operate.doctor import examine
from outbox.postgres import schema
from tests.servers.ports import free_port
from tests.servers.streams import change

HOUR = 3_600_000_000_000


@pytest.fixture
async def healthy(js_client: JetStreamClient, stream: str) -> Settings:
    """Settings with a stream that fits them."""
    await change(js_client, stream, max_age=24 * HOUR)
    return Settings.defaults(stream=stream)


async def sql(engine: AsyncEngine, *statements: str) -> None:
    async with engine.connect() as connection:
        autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
        for each in statements:
            await autocommit.execute(text(each))


def told(found: list[Finding], severity: Severity | None = None) -> list[str]:
    return [each.what for each in found if severity in {None, each.severity}]


async def test_nothing_is_found_where_nothing_is_broken(
    engine: AsyncEngine, js_client: JetStreamClient, healthy: Settings
) -> None:
    found = await examine(engine, js_client, healthy)
    assert [each for each in found if "fsync" not in each.what] == []  # the tests' own server


@pytest.mark.parametrize(
    ("statement", "what", "severity"),
    [
        ("ALTER TABLE outbox.inbox SET UNLOGGED", "table inbox is UNLOGGED", Severity.ERROR),
        (
            "ALTER DATABASE {name} SET synchronous_commit = off",
            "synchronous_commit is off",
            Severity.NOTE,
        ),
    ],
)
async def test_database_findings(
    engine: AsyncEngine,
    database_url: str,
    js_client: JetStreamClient,
    healthy: Settings,
    statement: str,
    what: str,
    severity: Severity,
) -> None:
    await sql(engine, statement.format(name=make_url(database_url).database))
    fresh = create_async_engine(database_url, poolclass=NullPool)
    found = await examine(fresh, js_client, healthy)
    assert what in told(found, severity)
    (finding,) = [each for each in found if each.what == what]
    assert finding.why
    assert finding.mend.startswith("ALTER")


async def test_long_transactions_are_named_by_pid_and_application(
    engine: AsyncEngine, database_url: str, js_client: JetStreamClient, healthy: Settings
) -> None:
    named = make_url(database_url)
    holder = create_async_engine(
        named, connect_args={"server_settings": {"application_name": "reporting"}}
    )
    async with holder.connect() as connection:
        await connection.execute(text("SELECT pg_current_xact_id()"))
        pid = await connection.scalar(text("SELECT pg_backend_pid()"))
        found = await examine(engine, js_client, healthy, held_since=timedelta(0))
        (finding,) = [each for each in found if "reporting" in each.what]
        assert f"session {pid} (reporting)" in finding.what
        assert finding.mend == f"SELECT pg_terminate_backend({pid})"
    await holder.dispose()


async def test_role_without_privileges_is_told_what_it_lacks(
    engine: AsyncEngine, database_url: str, js_client: JetStreamClient, healthy: Settings
) -> None:
    role = f"poor_{make_url(database_url).database}"
    await sql(
        engine,
        f"CREATE ROLE {role} LOGIN PASSWORD '{role}'",
        f"GRANT USAGE ON SCHEMA outbox TO {role}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA outbox TO {role}",
    )
    poor = create_async_engine(
        make_url(database_url).set(username=role, password=role), poolclass=NullPool
    )
    try:
        (finding,) = [
            each for each in await examine(poor, js_client, healthy) if "lacks" in each.what
        ]
        assert "DELETE ON pending" in finding.what
        assert "SELECT ON pending" not in finding.what
    finally:
        await sql(engine, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.parametrize(
    ("changed", "what", "severity"),
    [
        (
            {"discard": "old", "max_msgs": 1000},
            "discards old messages at max_msgs",
            Severity.ERROR,
        ),
        ({"duplicate_window": 30_000_000_000}, "forgets duplicates after 30 s", Severity.WARNING),
        ({"max_age": 240 * HOUR}, "the inbox forgets before stream", Severity.ERROR),
        ({"max_age": 0}, "keeps messages for ever", Severity.WARNING),
        ({"subjects": ["evt.>"]}, "does not take cmd.>", Severity.ERROR),
        ({"no_ack": True}, "acknowledges nothing", Severity.ERROR),
    ],
)
async def test_stream_findings_and_that_their_mend_mends(
    engine: AsyncEngine,
    js_client: JetStreamClient,
    stream: str,
    healthy: Settings,
    changed: dict[str, Any],
    what: str,
    severity: Severity,
) -> None:
    before = (await js_client.get_stream_info(stream))["config"]
    await js_client.api(f"STREAM.UPDATE.{stream}", before | changed)
    (finding,) = [each for each in await examine(engine, js_client, healthy) if what in each.what]
    assert finding.severity is severity
    assert finding.mend.startswith((f"nats stream edit {stream} --", "OUTBOX_INBOX_RETENTION="))
    await js_client.api(f"STREAM.UPDATE.{stream}", before)
    assert not [each for each in await examine(engine, js_client, healthy) if what in each.what]


async def test_missing_stream_and_stream_in_memory(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str, healthy: Settings
) -> None:
    await js_client.delete_stream(stream)
    found = await examine(engine, js_client, healthy)
    assert f"stream {stream} does not exist" in told(found, Severity.ERROR)
    await js_client.ensure_stream(stream, ["evt.>", "cmd.>", "dlq.>"], storage="memory")
    found = await examine(engine, js_client, healthy)
    assert f"stream {stream} is in memory" in told(found, Severity.ERROR)


async def test_consumers_of_listeners_that_have_handled_something_are_looked_at(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str, healthy: Settings
) -> None:
    await sql(
        engine,
        "INSERT INTO outbox.inbox (listener, event_id) VALUES ('mail-old', gen_random_uuid()),"
        " ('mail-gap', gen_random_uuid()), ('mail-gone', gen_random_uuid())",
    )
    config = {"durable_name": "mail-old", "ack_policy": "explicit", "max_deliver": 5}
    await js_client.api(
        f"CONSUMER.CREATE.{stream}.mail-old", {"stream_name": stream, "config": config}
    )
    await provisioning.ensure_consumer(
        js_client,
        stream=stream,
        durable="mail-gap",
        filter_subject=">",
        ack_wait=timedelta(seconds=30),
        max_ack_pending=100,
    )
    for n in range(5):
        await js_client.js.publish("evt.a.v1", str(n).encode())
    pulled = await js_client.js.pull_subscribe_bind("mail-gap", stream)
    (message,) = await pulled.fetch(1)
    await message.ack_sync()
    await change(js_client, stream, discard="old", max_msgs=2)
    await pulled.unsubscribe()
    found = await examine(engine, js_client, healthy)
    errors = told(found, Severity.ERROR)
    assert "consumer mail-old gives up after 5 deliveries" in errors
    assert any("messages left the stream before mail-gap had read them" in each for each in errors)


async def consumer_findings(
    engine: AsyncEngine,
    client: JetStreamClient,
    settings: Settings,
    config: dict[str, Any],
) -> list[Finding]:
    """Make a consumer of a listener that handled something; return what is found of it."""
    await sql(
        engine,
        "INSERT INTO outbox.inbox (listener, event_id) VALUES ('mail-x', gen_random_uuid())",
    )
    config = {"durable_name": "mail-x", "ack_policy": "explicit", "deliver_policy": "all"} | config
    await client.api(
        f"CONSUMER.CREATE.{settings.stream}.mail-x",
        {"stream_name": settings.stream, "config": config},
    )
    return [each for each in await examine(engine, client, settings) if "mail-x" in each.what]


@pytest.mark.parametrize(
    ("config", "what", "severity"),
    [
        ({"max_deliver": 5}, "gives up after 5 deliveries", Severity.ERROR),
        ({"ack_policy": "all"}, "has ack policy all", Severity.ERROR),
        ({"ack_policy": "none"}, "has ack policy none", Severity.ERROR),
        ({"deliver_subject": "push.mail"}, "is a push consumer", Severity.ERROR),
        ({"headers_only": True}, "delivers headers only", Severity.ERROR),
        ({"mem_storage": True}, "is in memory", Severity.WARNING),
        (
            {"inactive_threshold": HOUR},
            "is deleted when its listener is away for 3600 s",
            Severity.WARNING,
        ),
        ({"deliver_policy": "new"}, "began with deliver policy new", Severity.WARNING),
        ({"replay_policy": "original"}, "replays at the original speed", Severity.WARNING),
        ({"max_ack_pending": 1}, "has at most 1 events in hand", Severity.WARNING),
        ({"pause_until": "2100-01-01T00:00:00Z"}, "is paused", Severity.WARNING),
    ],
)
async def test_consumer_findings(
    engine: AsyncEngine,
    js_client: JetStreamClient,
    healthy: Settings,
    config: dict[str, Any],
    what: str,
    severity: Severity,
) -> None:
    (finding,) = await consumer_findings(engine, js_client, healthy, config)
    assert finding.what == f"consumer mail-x {what}"
    assert finding.severity is severity
    assert finding.mend.startswith("nats consumer")


async def test_nothing_is_found_of_a_consumer_as_a_listener_makes_it(
    engine: AsyncEngine, js_client: JetStreamClient, healthy: Settings
) -> None:
    assert not await consumer_findings(engine, js_client, healthy, {"max_ack_pending": 1000})


async def test_what_was_dropped_is_no_certain_loss_for_a_consumer_of_some_subjects(
    engine: AsyncEngine, js_client: JetStreamClient, healthy: Settings
) -> None:
    await js_client.js.publish("evt.rare.v1", b"1")
    config = {"filter_subject": "evt.rare.v1"}
    assert not await consumer_findings(engine, js_client, healthy, config)
    pulled = await js_client.js.pull_subscribe_bind("mail-x", healthy.stream)
    (message,) = await pulled.fetch(1)
    await message.ack_sync()
    await pulled.unsubscribe()
    for n in range(9):
        await js_client.js.publish("evt.a.v1", str(n).encode())
    await change(js_client, healthy.stream, discard="old", max_msgs=2)
    await change(js_client, healthy.stream, discard="new", max_msgs=-1)
    await js_client.js.publish("evt.rare.v1", b"2")
    found = await examine(engine, js_client, healthy)
    (finding,) = [each for each in found if "mail-x" in each.what]
    assert finding.what == "up to 7 messages left the stream before mail-x had read them"
    assert finding.severity is Severity.WARNING


@pytest.mark.parametrize(
    ("config", "archive", "severity"),
    [
        ("sync_interval: always", None, None),
        ("sync_interval: 10s", timedelta(seconds=30), None),
        ("sync_interval: 20s", timedelta(seconds=30), Severity.ERROR),
        ("", None, Severity.ERROR),
    ],
)
async def test_acknowledged_events_that_the_brokers_disk_has_late_are_told_by_its_monitor(
    engine: AsyncEngine,
    stream: str,
    tmp_path: Path,
    config: str,
    archive: timedelta | None,
    severity: Severity | None,
) -> None:
    port = free_port()
    store = f'jetstream {{ store_dir: "{tmp_path}/store", {config} }}' if config else ""
    with EmbeddedNats(config=f'http: "127.0.0.1:{port}"\n{store}') as server:
        settings = Settings.defaults(stream=stream, archive_retention=archive)
        client = JetStreamClient(server.url)
        await client.connect()
        await client.ensure_stream(stream, ["evt.>", "cmd.>", "dlq.>"])
        found = await examine(engine, client, settings, monitor=f"http://127.0.0.1:{port}/")
        await client.close()
    late = [each for each in found if "disk has an event up to" in each.what]
    assert [each.severity for each in late] == ([severity] if severity else [])


async def test_monitor_that_is_none_is_told(
    engine: AsyncEngine, js_client: JetStreamClient, healthy: Settings
) -> None:
    with pytest.raises(ConfigurationError, match="--monitor"):
        await examine(engine, js_client, healthy, monitor="file:///etc/passwd")
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(BrokerUnavailable, match="monitoring port does not answer"):
        await examine(engine, js_client, healthy, monitor=nobody)


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ((2, 10, 29), True),
        ((2, 11, 15), True),
        ((2, 11, 16), False),
        ((2, 12, 6), True),
        ((2, 12, 7), False),
        ((2, 14, 0), False),
        ((2, 15, 1), False),
    ],
)
def test_servers_that_lose_messages_are_known(version: tuple[int, int, int], *, old: bool) -> None:
    assert bool(list(examining.version(version))) is old


def test_pool_that_changes_its_backend_is_found() -> None:
    assert not list(doctor._of_pool(1))
    (finding,) = doctor._of_pool(3)
    assert finding.severity is Severity.ERROR


def test_command_exits_by_the_worst_finding(
    database_url: str,
    nats_server: str,
    healthy: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE_URL", database_url)
    monkeypatch.setenv("OUTBOX_NATS_URL", nats_server)
    monkeypatch.setenv("OUTBOX_STREAM", "ABSENT")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "stream ABSENT does not exist" in out
    assert "mend: nats stream add ABSENT" in out
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found[0].keys() == {"severity", "what", "why", "mend"}
    monkeypatch.setenv("OUTBOX_STREAM", healthy.stream)
    monkeypatch.setattr(doctor, "_of_server", lambda *_: [])  # the tests' own runs without fsync
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "nothing breaks the promise\n"


async def findings_of(
    server: EmbeddedPostgres, client: JetStreamClient, settings: Settings
) -> list[Finding]:
    engine = create_async_engine(server.url, poolclass=NullPool)
    return await examine(engine, client, settings, held_since=timedelta(0))


async def test_standby_is_found_and_a_relay_refuses_it(
    js_client: JetStreamClient, healthy: Settings
) -> None:
    """Its rows may be of a failed primary: a copy that recovers is one that is no primary."""
    with EmbeddedPostgres() as server:
        engine = create_async_engine(server.url, poolclass=NullPool)
        await schema.upgrade(engine)
        server.stop()
        signal_file = server.directory / "data" / "standby.signal"
        signal_file.touch()
        owner = (server.directory / "data").stat()
        os.chown(signal_file, owner.st_uid, owner.st_gid)
        server.start()
        found = await findings_of(server, js_client, healthy)
        assert "the database is a standby" in told(found, Severity.ERROR)
        with pytest.raises(ConfigurationError, match="standby"):
            await Relay(engine, js_client, settings=healthy).run()


async def test_settings_that_a_power_cut_punishes_are_found(
    js_client: JetStreamClient, healthy: Settings
) -> None:
    with EmbeddedPostgres(options={"fsync": "off", "full_page_writes": "off"}) as server:
        await schema.upgrade(create_async_engine(server.url, poolclass=NullPool))
        errors = told(await findings_of(server, js_client, healthy), Severity.ERROR)
    assert {"fsync is off", "full_page_writes is off"} <= set(errors)


async def test_prepared_transactions_and_idle_slots_that_hold_the_vacuum_back_are_found(
    js_client: JetStreamClient, healthy: Settings
) -> None:
    options = {"max_prepared_transactions": "5", "wal_level": "logical"}
    with EmbeddedPostgres(options=options) as server:
        engine = create_async_engine(server.url, poolclass=NullPool)
        await schema.upgrade(engine)
        await sql(engine, "SELECT pg_create_logical_replication_slot('idle', 'pgoutput')")
        async with engine.connect() as connection:
            await connection.execute(text("CREATE TABLE t ()"))
            await connection.commit()
            await connection.execute(text("INSERT INTO t DEFAULT VALUES"))
            await connection.execute(text("PREPARE TRANSACTION 'left-over'"))
        found = await findings_of(server, js_client, healthy)
        mends = {each.mend for each in found if "is open" in each.what}
        assert mends >= {"ROLLBACK PREPARED 'left-over'", "SELECT pg_drop_replication_slot('idle')"}
        await sql(engine, *mends)
        assert not [
            each
            for each in await findings_of(server, js_client, healthy)
            if "left-over" in each.what or "idle" in each.what
        ]


async def test_clocks_that_differ_from_ours_are_found(
    engine: AsyncEngine,
    js_client: JetStreamClient,
    healthy: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No clock is turned; the least difference counts here."""
    monkeypatch.setattr(examining, "SKEW", timedelta(0))
    found = told(await examine(engine, js_client, healthy), Severity.WARNING)
    assert any("the database's clock is" in each for each in found)
    assert any("the broker's clock is" in each for each in found)
