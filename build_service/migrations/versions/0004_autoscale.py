"""A deployment may leave the number of its replicas to an autoscaler."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("deployments", sa.Column("autoscale", sa.JSON(none_as_null=True), nullable=True))
