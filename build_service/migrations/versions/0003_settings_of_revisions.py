"""What a revision was asked for with, so that the way back to it restores that too."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("revisions", sa.Column("settings", sa.JSON(), nullable=True))
