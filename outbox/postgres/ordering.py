"""The durable queue of an ordered listener, and the lease on working it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from outbox.postgres.tables import statement

# More than two leases ahead: the clock was set back, which would keep a dead owner for that long.
TAKE = """
INSERT INTO {schema}.listener_lease AS l (listener, owner, owner_name, epoch, expires_at)
VALUES (CAST(:listener AS text), CAST(:owner AS uuid), CAST(:owner_name AS text), 1,
        clock_timestamp() + CAST(:lease AS interval))
ON CONFLICT (listener) DO UPDATE
SET owner = excluded.owner, owner_name = excluded.owner_name, epoch = l.epoch + 1,
    expires_at = excluded.expires_at
WHERE l.owner = excluded.owner OR l.expires_at < clock_timestamp()
   OR l.expires_at > clock_timestamp() + 2 * CAST(:lease AS interval)
RETURNING epoch
"""
RENEW = """
UPDATE {schema}.listener_lease SET expires_at = clock_timestamp() + CAST(:lease AS interval)
WHERE listener = CAST(:listener AS text) AND owner = CAST(:owner AS uuid) AND epoch = :epoch
RETURNING epoch
"""
RELEASE = """
UPDATE {schema}.listener_lease SET owner = NULL, owner_name = NULL, expires_at = '-infinity'
WHERE listener = CAST(:listener AS text) AND owner = CAST(:owner AS uuid) AND epoch = :epoch
"""
# A share lock: whoever takes the lease waits until the transaction that checked it has ended.
FENCE = """
SELECT 1 FROM {schema}.listener_lease
WHERE listener = CAST(:listener AS text) AND owner = CAST(:owner AS uuid) AND epoch = :epoch
FOR SHARE
"""
# A message that comes again is here already; the ack that follows must not be lost by a crash.
HOLD = """
INSERT INTO {schema}.held (listener, created, sequence, key, subject, headers, body, stored_at,
                           epoch)
SELECT CAST(:listener AS text), CAST(:created AS text), s, k, j, h, b, t, :epoch
FROM unnest(CAST(:sequences AS int8[]), CAST(:keys AS text[]), CAST(:subjects AS text[]),
            CAST(:headers AS bytea[]), CAST(:bodies AS bytea[]), CAST(:stored_ats AS timestamptz[])
           ) AS u(s, k, j, h, b, t)
WHERE (SELECT CASE WHEN current_setting('synchronous_commit') = 'off'
                   THEN set_config('synchronous_commit', 'on', true) ELSE '' END) IS NOT NULL
ON CONFLICT DO NOTHING
"""
# The event leaves the queue with the effect of its handler.
DONE_BY_HOLDER = f"""
WITH fence AS ({FENCE}), gone AS (
  DELETE FROM {{schema}}.held WHERE listener = CAST(:listener AS text)
    AND created = CAST(:created AS text) AND sequence = CAST(:sequence AS int8)
    AND stored_at = CAST(:stored_at AS timestamptz) AND EXISTS (SELECT 1 FROM fence)
)
SELECT 1 FROM fence
"""  # noqa: S608 - no value is built in
PAGE = """
SELECT created, sequence, stored_at, key FROM {schema}.held
WHERE listener = CAST(:listener AS text)
  AND (created, sequence, stored_at)
      > (CAST(:created AS text), CAST(:sequence AS int8), CAST(:stored_at AS timestamptz))
ORDER BY created, sequence, stored_at LIMIT CAST(:rows_max AS int)
"""
_PARKS = """d.listener = CAST(:listener AS text) AND d.parks
  AND d.state IN ('open', 'requeued')"""
_ROW = f"""
SELECT created, sequence, key, subject, headers, body, stored_at, epoch, delivered,
       greatest(extract(epoch FROM due_at - clock_timestamp()), 0),
       EXISTS (SELECT 1 FROM {{schema}}.dead_letter AS d WHERE d.key = h.key AND {_PARKS}),
       EXISTS (SELECT 1 FROM {{schema}}.held AS l
               WHERE l.listener = h.listener AND l.key = h.key
                 AND (l.created, l.sequence, l.stored_at) > (h.created, h.sequence, h.stored_at))
FROM {{schema}}.held AS h WHERE listener = CAST(:listener AS text) """  # noqa: S608 - no value is built in
_AT = """AND created = CAST(:created AS text) AND sequence = CAST(:sequence AS int8)
  AND stored_at = CAST(:stored_at AS timestamptz)"""
ROW = _ROW + _AT
NEXT = _ROW + "AND key = CAST(:key AS text) ORDER BY created, sequence, stored_at LIMIT 1"
PARKED = f"""
SELECT DISTINCT d.key FROM {{schema}}.dead_letter AS d
WHERE d.key = ANY(CAST(:keys AS text[])) AND {_PARKS}
"""  # noqa: S608 - as above
DONE = f"""
DELETE FROM {{schema}}.held WHERE listener = CAST(:listener AS text) {_AT}
"""  # noqa: S608 - as above
POSTPONE = f"""
UPDATE {{schema}}.held
SET delivered = delivered + 1, due_at = clock_timestamp() + CAST(:delay AS interval)
WHERE listener = CAST(:listener AS text) {_AT}
"""  # noqa: S608 - as above


class Place(NamedTuple):
    """Where an event stands in the queue.

    A broker that was restored from a backup gives sequences out twice; the time tells them apart.
    """

    created: str
    sequence: int
    stored_at: datetime
    key: str | None


class Held(NamedTuple):
    """An event of the queue."""

    created: str
    sequence: int
    key: str | None
    subject: str
    headers: bytes
    body: bytes
    stored_at: datetime
    epoch: int
    delivered: int
    due_seconds: float  # until its next try
    parked: bool  # behind a dead letter of its key
    more: bool  # later events of its key

    @property
    def place(self) -> Place:
        """Where it stands."""
        return Place(self.created, self.sequence, self.stored_at, self.key)


@dataclass(frozen=True, slots=True)
class Queue:
    """The queue of one listener, under one owner and epoch of its lease."""

    schema: str
    listener: str
    owner: UUID
    epoch: int = 0

    async def take(self, session: AsyncSession, owner_name: str, lease: timedelta) -> int | None:
        """Take the lease when nobody has it; return its new epoch, else None."""
        values = {"owner": self.owner, "owner_name": owner_name, "lease": lease}
        epoch = await session.scalar(self._sql(TAKE), self._own | values)
        return None if epoch is None else int(epoch)

    async def renew(self, session: AsyncSession, lease: timedelta) -> bool:
        """Extend the lease; return False when another instance has taken it."""
        return await session.scalar(self._sql(RENEW), self._fence | {"lease": lease}) is not None

    async def release(self, session: AsyncSession) -> None:
        """Give the lease back, so that another instance takes it at once."""
        await session.execute(self._sql(RELEASE), self._fence)

    async def is_mine(self, session: AsyncSession) -> bool:
        """Return whether the lease is held still, and cannot be taken before the COMMIT."""
        return await session.scalar(self._sql(FENCE), self._fence) is not None

    async def done_by_holder(self, session: AsyncSession, place: Place) -> bool:
        """Delete an event in its handler's transaction; return what `is_mine` returns."""
        values = self._fence | self._at(place)
        return await session.scalar(self._sql(DONE_BY_HOLDER), values) is not None

    async def hold(self, session: AsyncSession, created: str, rows: Sequence[Held]) -> None:
        """Write messages of the stream's incarnation `created`; those that are here stay."""
        columns: dict[str, list[Any]] = {
            "sequences": [row.sequence for row in rows],
            "keys": [row.key for row in rows],
            "subjects": [row.subject for row in rows],
            "headers": [row.headers for row in rows],
            "bodies": [row.body for row in rows],
            "stored_ats": [row.stored_at for row in rows],
        }
        more = {"created": created, "epoch": self.epoch}
        await session.execute(self._sql(HOLD), self._own | more | columns)

    async def page(self, session: AsyncSession, after: Place, rows_max: int) -> list[Place]:
        """Return the places behind one, in order."""
        values = self._own | self._at(after) | {"rows_max": rows_max}
        found = await session.execute(self._sql(PAGE), values)
        return [Place(*row) for row in found]

    async def row(self, session: AsyncSession, place: Place) -> Held | None:
        """Return the event at a place, None when it has gone."""
        found = (await session.execute(self._sql(ROW), self._own | self._at(place))).one_or_none()
        return None if found is None else Held(*found)

    async def next_of_key(self, session: AsyncSession, key: str) -> Held | None:
        """Return the first event of a key that is left."""
        found = await session.execute(self._sql(NEXT), self._own | {"key": key})
        row = found.one_or_none()
        return None if row is None else Held(*row)

    async def parked(self, session: AsyncSession, keys: Collection[str]) -> set[str]:
        """Return those of `keys` whose events wait behind a dead letter."""
        found = await session.scalars(self._sql(PARKED), self._own | {"keys": list(keys)})
        return set(found)

    async def done(self, session: AsyncSession, place: Place) -> None:
        """Delete an event that is finished with."""
        await session.execute(self._sql(DONE), self._own | self._at(place))

    async def postpone(self, session: AsyncSession, place: Place, delay: timedelta) -> None:
        """Have an event, and its key with it, wait for its next try."""
        values = self._own | self._at(place) | {"delay": delay}
        await session.execute(self._sql(POSTPONE), values)

    @property
    def _own(self) -> dict[str, Any]:
        return {"listener": self.listener}

    @property
    def _fence(self) -> dict[str, Any]:
        return {"listener": self.listener, "owner": self.owner, "epoch": self.epoch}

    def _sql(self, sql: str) -> Any:
        return statement(self.schema, sql)

    def _at(self, place: Place) -> dict[str, Any]:
        return {
            "created": place.created,
            "sequence": place.sequence,
            "stored_at": place.stored_at,
        }
