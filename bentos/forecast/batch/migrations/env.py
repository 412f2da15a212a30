"""What Alembic runs a migration in: the connection that `Database.migrate` holds, within its transaction."""

from __future__ import annotations

from alembic import context

from bentos.forecast.batch.tables import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE
)
context.run_migrations()
