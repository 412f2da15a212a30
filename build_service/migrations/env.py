"""What Alembic runs a migration in: the connection that build_service.migrate holds, within its transaction."""

from __future__ import annotations

from alembic import context

import build_service.state  # noqa: F401  its tables are part of the metadata
from registry.database import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    version_table="schema_version",
)
context.run_migrations()
