"""Analytics service: counts every event, many in one transaction."""

import asyncio
from collections import Counter
from collections.abc import Sequence

from sqlalchemy import Column, Integer, MetaData, Table, Text
from sqlalchemy import insert as plain_insert
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from examples.glam.service import effect, run
from outbox import BatchListener, EventEnvelope

count = Table(
    "count", MetaData(), Column("subject", Text, primary_key=True), Column("events", Integer)
)


class CountAll(BatchListener):
    """One row for each subject, raised by what a batch holds."""

    subject = "evt.>"
    queue_group = "count-all"
    service_name = "analytics-service"
    ack_wait = 3

    async def on_batch(self, session: AsyncSession, events: Sequence[EventEnvelope]) -> None:
        for subject, number in sorted(Counter(each.event_type for each in events).items()):
            row = insert(count).values(subject=subject, events=number)
            more = {"events": count.c.events + row.excluded.events}
            await session.execute(row.on_conflict_do_update(index_elements=["subject"], set_=more))
        rows = [{"event_id": each.event_id, "what": self.identity} for each in events]
        await session.execute(plain_insert(effect), rows)


if __name__ == "__main__":
    asyncio.run(run([CountAll]))
