"""The two services' own tables, and what is read of them at the end."""

from collections.abc import Sequence

from sqlalchemy import BigInteger, Column, Identity, MetaData, Table, Uuid, func, select
from sqlalchemy.ext.asyncio import AsyncEngine

SHOP = MetaData()
# Written in the transaction that adds the event: a row is a commit.
LEDGER = Table("ledger", SHOP, Column("event_id", Uuid, nullable=False))
# Written afterwards, in another transaction: what must never have an effect.
ROLLED_BACK = Table("rolled_back", SHOP, Column("event_id", Uuid, nullable=False))

MAIL = MetaData()
# No unique key: a second effect would be a second row.
EFFECT = Table(
    "effect",
    MAIL,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("event_id", Uuid, nullable=False),
)


async def create(engine: AsyncEngine, tables: MetaData) -> None:
    """Make the tables of one service."""
    async with engine.begin() as connection:
        await connection.run_sync(tables.create_all)


async def size(engine: AsyncEngine, table: Table) -> int:
    """Return how many rows there are."""
    async with engine.connect() as connection:
        return int(await connection.scalar(select(func.count()).select_from(table)) or 0)


async def ids(engine: AsyncEngine, table: Table) -> Sequence[str]:
    """Return the event id of every row."""
    async with engine.connect() as connection:
        found = await connection.scalars(select(table.c.event_id))
        return [str(each) for each in found]
