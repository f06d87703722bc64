"""The six services on servers of their own, and what happens to them meanwhile."""

import asyncio
import base64
import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from examples.glam import analytics, catalog, credit, merchant, notification, webhook
from examples.glam.service import migrate
from examples.glam.verdict import Evidence, Verdict
from outbox import JetStreamClient, Listener, OutboxError
from outbox.demo.children import Child
from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from outbox.envelope import decode_headers
from outbox.jetstream.provisioning import consumer_info

STREAM = "GLAM_EVENTS"
SUBJECTS = ("evt.>", "cmd.>", "dlq.>")
LISTENERS: dict[str, tuple[type[Listener[Any]], ...]] = {
    "webhook": (),
    "merchant": (merchant.Install, merchant.Uninstall),
    "credit": (credit.GrantTrial, credit.Spend),
    "catalog": (catalog.StartSync, catalog.Sync),
    "notification": (notification.Welcome, notification.WarnOfBalance, notification.SendMail),
    "analytics": (analytics.CountAll,),
}
REPEATED = 40  # messages that are delivered once more on purpose
# Short, because a killed service comes back within a second here.
SETTINGS = {"OUTBOX_LEASE": "3", "OUTBOX_PUBLISH_TIMEOUT": "2", "OUTBOX_LOG_LEVEL": "CRITICAL"}
LOOK_SECONDS = 0.2
LIMIT_SECONDS = 120.0


def identity(listener: type[Listener[Any]]) -> str:
    """Return the durable's name, which is the inbox's too."""
    return f"{listener.service_name}-{listener.queue_group}"


@dataclass(slots=True)
class Stage:
    """Everything that runs."""

    merchants: int
    nats: EmbeddedNats
    client: JetStreamClient
    engines: dict[str, AsyncEngine]
    children: dict[str, Child]
    began: float = field(default_factory=time.monotonic)

    async def welcomed(self) -> int:
        """Return how many merchants have their welcome mail."""
        return await self._number(
            "notification", "SELECT count(*) FROM mail WHERE template = 'welcome'"
        )

    async def fault(self, share: float) -> str:
        """Do what happens once `share` of the merchants are welcomed; return what it was."""
        match FAULTS[share]:
            case "nats-server":
                self.nats.kill()
                await asyncio.to_thread(self.nats.start)
                return "nats-server: SIGKILL, and started again"
            case "repeat":
                return f"{await self._repeat()} messages are delivered once more"
            case name:
                await self.children[name].kill()
                await self.children[name].start()
                return f"{name} service: SIGKILL of relay and listeners, and started again"

    async def _repeat(self) -> int:
        """Store messages a second time under other message ids."""
        for sequence in range(1, REPEATED + 1):
            answer = await self.client.api(f"STREAM.MSG.GET.{STREAM}", {"seq": sequence})
            message = answer["message"]
            _, _, lines = base64.b64decode(message["hdrs"]).partition(b"\r\n")
            headers = decode_headers(lines)
            headers["Nats-Msg-Id"] += "~r1"
            body = base64.b64decode(message["data"])
            await self.client.js.publish(message["subject"], body, headers=headers)
        return REPEATED

    async def finished(self) -> bool:
        """Return whether all is told, published and handled, twice in a row."""
        for child in self.children.values():
            child.check()
        if time.monotonic() - self.began > LIMIT_SECONDS:
            raise OutboxError(f"not finished within {LIMIT_SECONDS:g} s: {await self._open()}")
        for _ in range(2):
            if await self._open():
                return False
            await asyncio.sleep(LOOK_SECONDS)
        return True

    async def _open(self) -> list[str]:
        """Return what is not finished."""
        wanted = self.merchants + self.merchants // webhook.LEAVES
        if await self._number("webhook", "SELECT count(*) FROM webhook") < wanted:
            return ["webhooks"]
        for name in self.engines:
            for table in ("pending", "waiting"):
                if await self._number(name, f"SELECT count(*) FROM outbox.{table}"):  # noqa: S608
                    return [f"{table} of {name}"]
        for listener in (each for group in LISTENERS.values() for each in group):
            found = await consumer_info(self.client, STREAM, identity(listener))
            if found is None or found["num_pending"] or found["num_ack_pending"]:
                return [identity(listener)]
        return []

    async def _number(self, service: str, sql: str) -> int:
        async with self.engines[service].connect() as connection:
            return int(await connection.scalar(text(sql)) or 0)

    async def verdict(self) -> Verdict:
        """Return what is in all databases and on the stream."""
        return Verdict(
            services={name: await self._evidence(name) for name in self.engines},
            stored=await self._stored(),
            listeners={
                identity(each): each.subject for group in LISTENERS.values() for each in group
            },
            poison=[identity(catalog.Sync)] if self.merchants > int(catalog.POISON) else [],
        )

    async def _evidence(self, name: str) -> Evidence:
        async def pairs(sql: str) -> list[tuple[str, str]]:
            return [(str(row[0]), str(row[1])) for row in await connection.execute(text(sql))]

        async with self.engines[name].connect() as connection:
            return Evidence(
                told=await pairs("SELECT event_id, what FROM told"),
                effects=await pairs("SELECT event_id, what FROM effect"),
                dead=await pairs(
                    "SELECT event_id, coalesce(listener, side) FROM outbox.dead_letter"
                ),
                duplicates=self.children[name].lines,
                unpublished=len(await pairs("SELECT event_id, subject FROM outbox.pending")),
            )

    async def _stored(self) -> Counter[str]:
        """Count what the stream holds of each event, but for `dlq.` and what was repeated."""
        stored: Counter[str] = Counter()
        messages = await self.client.js.subscribe(">", stream=STREAM, ordered_consumer=True)
        while True:
            message = await messages.next_msg(timeout=10)
            message_id = (message.headers or {}).get("Nats-Msg-Id", "")
            if not message.subject.startswith("dlq.") and "~" not in message_id:
                stored[message_id] += 1
            if not message.metadata.num_pending:
                break
        await messages.unsubscribe()
        return stored


# What happens once this share of the merchants is welcomed; a name is that of a killed service.
FAULTS = {0.15: "merchant", 0.3: "notification", 0.5: "nats-server", 0.65: "repeat", 0.8: "catalog"}


async def set_up(stack: contextlib.AsyncExitStack, merchants: int) -> Stage:
    """Start servers and services; the stack ends them."""
    postgres = stack.enter_context(EmbeddedPostgres())
    nats = stack.enter_context(EmbeddedNats())
    engines = {}
    for name in LISTENERS:
        engines[name] = create_async_engine(postgres.create_database(name))
        stack.push_async_callback(engines[name].dispose)
        await migrate(engines[name], name)
    client = await stack.enter_async_context(JetStreamClient(nats.url, name="glam-demo"))
    await client.ensure_stream(STREAM, list(SUBJECTS))
    children = {}
    for name in LISTENERS:
        settings = SETTINGS | {
            "OUTBOX_DATABASE_URL": postgres.database_url(name),
            "OUTBOX_NATS_URL": nats.url,
            "OUTBOX_STREAM": STREAM,
            "OUTBOX_SOURCE_SERVICE": f"{name}-service",
            "MERCHANTS": str(merchants),
        }
        children[name] = Child(f"examples.glam.{name}", settings=settings)
        await children[name].start()
        stack.push_async_callback(children[name].kill)
    return Stage(merchants, nats, client, engines, children)
