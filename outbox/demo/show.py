"""The demo: two services and a relay that is killed, on servers of its own."""

import asyncio
import base64
import contextlib
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox.demo.children import Child
from outbox.demo.report import Result, printed
from outbox.demo.tables import EFFECT, LEDGER, MAIL, ROLLED_BACK, SHOP, create, ids, size
from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from outbox.envelope import decode_headers
from outbox.errors import OutboxError
from outbox.jetstream.client import JetStreamClient
from outbox.jetstream.provisioning import consumer_info, ensure_stream
from outbox.postgres import schema

STREAM = "EVENTS"
SUBJECTS = ("evt.>", "cmd.>", "dlq.>")
DURABLE = "mailer-mails"
KILLS = (0.25, 0.55)  # of the events, when the relay dies
REDELIVERED = 30  # after each kill
RELAY = {"OUTBOX_LEASE": "3", "OUTBOX_PUBLISH_TIMEOUT": "2", "OUTBOX_LOG_LEVEL": "ERROR"}
LOOK_SECONDS = 0.1
LIMIT_SECONDS = 90.0
INTERRUPTED = 130


@dataclass(slots=True)
class Stage:
    """Everything that runs."""

    events: int
    client: JetStreamClient
    shop_db: AsyncEngine
    mail_db: AsyncEngine
    shop: Child
    relay: Child
    mailer: Child
    repeated: int = 0  # messages that were delivered once more on purpose
    began: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """Print one line with the time that has passed."""
        print(f"{time.monotonic() - self.began:5.1f} s  {text}", flush=True)

    async def until(self, reached: Callable[[], Coroutine[Any, Any, bool]], what: str) -> None:
        """Wait until `reached`; every child must be alive or have ended well.

        Raises:
            OutboxError: a child has failed, or it took too long.
        """
        while not await reached():
            for child in (self.shop, self.relay, self.mailer):
                child.check()
            if time.monotonic() - self.began > LIMIT_SECONDS:
                raise OutboxError(f"the demo waited in vain until {what}")
            await asyncio.sleep(LOOK_SECONDS)

    async def published(self) -> int:
        """Return how many messages the stream has by the relay."""
        state = (await self.client.get_stream_info(STREAM))["state"]
        return int(state["messages"]) - self.repeated


async def show(asked: asyncio.Event, *, events: int = 3000) -> int:
    """Run the demo until its end, or until `asked`; return the exit code.

    Raises:
        OutboxError: a server or service did not start, or has failed.
    """
    work = asyncio.create_task(_perform(events))
    stop = asyncio.create_task(asked.wait())
    await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not work.done():
        work.cancel()
        await asyncio.wait({work})
        return INTERRUPTED
    return printed(work.result())


async def _perform(events: int) -> Result:
    async with contextlib.AsyncExitStack() as stack:
        stage = await _set_up(stack, events)
        for child in (stage.relay, stage.mailer, stage.shop):
            await child.start()
            stack.push_async_callback(child.kill)
        stage.say(f"the shop adds {events:,} events, a relay publishes, a mailer handles")
        for number, share in enumerate(KILLS, 1):
            await _kill(stage, number, share)
            await _redeliver(stage)
        await stage.until(lambda: _finished(stage), "all is handled")
        stage.say("everything is published and handled")
        await stage.mailer.stop()
        await stage.relay.stop()
        stage.relay.check()
        stage.mailer.check()
        return await _result(stage)


async def _set_up(stack: contextlib.AsyncExitStack, events: int) -> Stage:
    """Start the servers and make what the services need."""
    print("starting PostgreSQL and nats-server", flush=True)
    postgres = stack.enter_context(EmbeddedPostgres())
    nats = stack.enter_context(EmbeddedNats())
    shop_db = await _database(stack, postgres.create_database("shop"), SHOP)
    mail_db = await _database(stack, postgres.create_database("mail"), MAIL)
    client = await stack.enter_async_context(JetStreamClient(nats.url, name="outbox-demo"))
    await ensure_stream(client, STREAM, SUBJECTS)
    shop = {"OUTBOX_DATABASE_URL": postgres.database_url("shop"), "OUTBOX_NATS_URL": nats.url}
    mail = shop | {"OUTBOX_DATABASE_URL": postgres.database_url("mail")}
    return Stage(
        events,
        client,
        shop_db,
        mail_db,
        shop=Child("outbox.demo.shop", str(events), settings=shop),
        relay=Child("outbox.cli.relay", settings=shop | RELAY),
        mailer=Child("outbox.demo.mailer", settings=mail),
    )


async def _database(stack: contextlib.AsyncExitStack, url: str, tables: MetaData) -> AsyncEngine:
    """Make the tables of a service; return the engine, which the stack disposes of."""
    engine = create_async_engine(url)
    stack.push_async_callback(engine.dispose)
    await schema.upgrade(engine)
    await create(engine, tables)
    return engine


async def _kill(stage: Stage, number: int, share: float) -> None:
    """Kill the relay amid its work and start another."""

    async def far_enough() -> bool:
        return await stage.published() >= share * stage.events

    await stage.until(far_enough, f"{share:.0%} are published")
    await stage.relay.kill()
    added, published = await size(stage.shop_db, LEDGER), await stage.published()
    stage.say(f"kill {number}: the relay is gone; {added:,} added, {published:,} published")
    await stage.relay.start()


async def _redeliver(stage: Stage) -> None:
    """Publish stored messages a second time, past the stream's own duplicate window."""
    for sequence in range(stage.repeated + 1, stage.repeated + REDELIVERED + 1):
        answer = await stage.client.api(f"STREAM.MSG.GET.{STREAM}", {"seq": sequence})
        message = answer["message"]
        _, _, lines = base64.b64decode(message["hdrs"]).partition(b"\r\n")
        headers = decode_headers(lines)
        headers["Nats-Msg-Id"] += "~r1"
        body = base64.b64decode(message["data"])
        await stage.client.js.publish(message["subject"], body, headers=headers)
    stage.repeated += REDELIVERED
    stage.say(f"{REDELIVERED} messages are delivered once more, on purpose")


async def _finished(stage: Stage) -> bool:
    """Return whether the shop is done and its last message was acked by the mailer."""
    if stage.shop.code is None or await stage.published() < stage.events:
        return False
    found = await consumer_info(stage.client, STREAM, DURABLE)
    return found is not None and found["num_pending"] == found["num_ack_pending"] == 0


async def _result(stage: Stage) -> Result:
    return Result(
        committed=await ids(stage.shop_db, LEDGER),
        rolled_back=await ids(stage.shop_db, ROLLED_BACK),
        published=await stage.published(),
        kills=len(KILLS),
        redelivered=stage.repeated,
        duplicates=stage.mailer.lines,
        effects=await ids(stage.mail_db, EFFECT),
    )
