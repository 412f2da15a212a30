"""What several replicas share: crashes that were told already, and the oldest schema whose code works with this one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "told_crashes",
        sa.Column("deployment", sa.String(length=40), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("deployment", name=op.f("pk_told_crashes")),
    )
    op.create_table(
        "schema_compatible",
        sa.Column("oldest", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("oldest", name=op.f("pk_schema_compatible")),
    )
