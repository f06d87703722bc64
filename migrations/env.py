"""The Alembic environment, for `alembic.command` with a configuration made in code.

The package itself upgrades through `outbox.postgres.schema`, which adds the lock and needs none of
Alembic's global state. Here `config.attributes` holds "connection" and, if it is not the default,
"schema".
"""

from alembic import context

from outbox.errors import ConfigurationError
from outbox.postgres.schema import VERSION_TABLE
from outbox.postgres.tables import metadata, statement

schema = context.config.attributes.get("schema", "outbox")
connection = context.config.attributes.get("connection")
if connection is None:
    raise ConfigurationError("config.attributes['connection'] is missing; run `outbox migrate`")

inside = connection.in_transaction()
connection.execute(statement(schema, "CREATE SCHEMA IF NOT EXISTS {schema}"))
if not inside:
    connection.commit()  # or `autocommit_block` fails on the open transaction
context.configure(
    connection=connection,
    target_metadata=metadata(schema),
    version_table=VERSION_TABLE,
    version_table_schema=schema,
    transaction_per_migration=True,
    include_schemas=True,
    include_name=lambda name, kind, _parents: kind != "schema" or name == schema,
)
with context.begin_transaction():
    context.run_migrations(execute=connection.exec_driver_sql, schema=schema)
