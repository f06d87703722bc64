"""No payload, password or URL with one reaches a log line, a repr or an error's text."""

import io
import json
import logging
import subprocess
import sys
import traceback
from collections.abc import Iterator
from uuid import uuid4

import pytest
from pydantic import BaseModel
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from typing_extensions import override

import outbox
from outbox import EventEnvelope, JetStreamClient, Listener, Outbox, Relay, Settings
from outbox.cli.logs import Json
from outbox.embedded import EmbeddedNats
from outbox.telemetry import Step
from outbox.testing import Result, deliver
from tests.faults import Watch
from tests.servers.events import insert

CANARY = "c4nary-7f31"
SUBJECT = "evt.secret.told.v1"
events = Outbox("secrets")


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """Everything that is logged, on every level and with tracebacks, as the commands write it."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Json())
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    for chatty in ("asyncio", "sqlalchemy", "nats"):  # not ours: their users turn these on
        logging.getLogger(chatty).setLevel(logging.WARNING)
    yield stream
    root.removeHandler(handler)
    root.setLevel(before)


class Typed(BaseModel):
    number: int


class Careless(Listener):
    """A handler whose own SQL fails with the payload among its parameters."""

    subject = SUBJECT
    queue_group = "careless"
    service_name = "secrets"
    max_attempts = 1

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        values = {"value": json.dumps(dict(event.data))}
        await session.execute(text("INSERT INTO nowhere VALUES (:value)"), values)


class Strict(Listener[Typed]):
    subject = SUBJECT
    queue_group = "strict"
    service_name = "secrets"

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope[Typed]) -> None:
        raise AssertionError("it was not valid")


async def dead_letter_texts(engine: AsyncEngine) -> str:
    async with engine.connect() as connection:
        rows = await connection.execute(text("SELECT reason, error FROM outbox.dead_letter"))
        return json.dumps([list(row) for row in rows])


async def test_what_the_database_refuses_is_raised_without_the_payload(
    engine: AsyncEngine, sessionmaker: async_sessionmaker[AsyncSession]
) -> None:
    async with engine.begin() as connection:
        await connection.execute(
            text("ALTER TABLE outbox.pending ADD CONSTRAINT never CHECK (subject = '')")
        )
    async with sessionmaker() as session:
        events.add(session, SUBJECT, {"secret": CANARY}, headers={"X-Token": CANARY})
        with pytest.raises(Exception, match="never") as caught:
            await session.commit()
    assert CANARY not in _first_lines(caught.value)


def _first_lines(error: BaseException) -> str:
    """Return the texts of an error and of what led to it, but for the server's DETAIL."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(line for line in lines if "DETAIL" not in line and "Failing row" not in line)


async def test_failing_handlers_tell_no_payload(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    written: io.StringIO,
) -> None:
    careless = Careless(JetStreamClient(), sessionmaker)
    outcome = await deliver(careless, SUBJECT, {"secret": CANARY})
    assert outcome.result is Result.DEAD_LETTER
    strict = Strict(JetStreamClient(), sessionmaker)
    assert (await deliver(strict, SUBJECT, {"number": CANARY})).reason == "invalid_payload"
    body = json.dumps({"event_id": str(uuid4()), "data": CANARY}).encode()
    assert (await deliver(careless, SUBJECT, body)).reason == "missing_field"
    assert (await deliver(careless, SUBJECT, b'{"' + CANARY.encode())).reason == "malformed"
    assert "a handler failed" in written.getvalue()
    assert CANARY not in written.getvalue()
    assert CANARY not in await dead_letter_texts(engine)


async def test_relay_tells_no_payload_of_what_it_cannot_publish(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str, written: io.StringIO
) -> None:
    config = (await js_client.get_stream_info(stream))["config"]
    await js_client.api(f"STREAM.UPDATE.{stream}", config | {"max_msg_size": 300})
    secret = CANARY.encode()
    await insert(engine, 1, body=secret * 100)
    await insert(engine, 1, subject="bad subject", body=secret)
    watch = Watch()
    settings = Settings.defaults(stream=stream, publish_attempts_max=1)
    async with Relay(engine, js_client, settings=settings, observer=watch):
        await watch.until(Step.DEAD_LETTERED, 2)
    assert CANARY not in written.getvalue()
    assert CANARY not in await dead_letter_texts(engine)
    assert CANARY not in repr(watch.moments)


def test_reprs_mask_secrets() -> None:
    settings = Settings.defaults(
        database_url=f"postgresql://u:{CANARY}@h/d", nats_password=CANARY, nats_token=CANARY
    )
    client = JetStreamClient(f"nats://u:{CANARY}@127.0.0.1:4222", password=CANARY, token=CANARY)
    for shown in (settings, client, settings.model_dump(), vars(settings)):
        assert CANARY not in f"{shown!r} {shown!s}"


async def test_wrong_passwords_are_not_told(
    database_url: str, js_client: JetStreamClient, written: io.StringIO
) -> None:
    wrong = make_url(database_url).set(username="nobody", password=CANARY)
    engine = create_async_engine(wrong)
    relay = Relay(engine, js_client)
    await relay.start()
    await relay.pause(0.5)
    await relay.stop()
    with EmbeddedNats(config='authorization { token: "other" }') as server:
        client = JetStreamClient(server.url, token=CANARY)
        with pytest.raises(outbox.OutboxError) as caught:
            await client.connect()
        await client.close()
    assert CANARY not in "".join(traceback.format_exception(caught.value))
    assert CANARY not in repr(relay.health())
    assert "the database cannot be used" in written.getvalue()
    assert CANARY not in written.getvalue()
    await engine.dispose()


@pytest.mark.parametrize("command", [["status"], ["migrate"]])
def test_commands_tell_no_password(command: list[str]) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "outbox.cli.main", *command),
            *("--database-url", f"postgresql://u:{CANARY}@127.0.0.1:1/none"),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert CANARY not in done.stdout + done.stderr
