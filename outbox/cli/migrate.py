"""`outbox migrate`: makes or upgrades the tables."""

import argparse

from outbox.cli import options
from outbox.postgres import schema
from outbox.postgres.driver import translated
from outbox.settings import Settings


async def migrate(settings: Settings, given: argparse.Namespace) -> int:
    """Bring the tables to this package's version, or print the script that does."""
    name = settings.schema_name
    if given.sql:
        print(schema.offline_sql(name))
        return options.EXIT_OK
    engine = options.engine(settings, "outbox migrate", timeout=schema.LOCK_WAIT * 10)
    try:
        with translated():
            await schema.upgrade(engine, schema=name)
    finally:
        await engine.dispose()
    print(f"schema {name} is at version {schema.head()}")
    return options.EXIT_OK
