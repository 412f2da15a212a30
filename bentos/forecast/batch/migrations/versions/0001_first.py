"""The first tables: sales, forecasts, evaluations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None


def upgrade() -> None:
    op.create_table(
        "forecast_sales",
        sa.Column("store", sa.String(200), primary_key=True),
        sa.Column("item", sa.String(200), primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("sales", sa.Float),
        sa.Column("price", sa.Float),
        sa.Column("discount", sa.Float),
        sa.Column("holiday", sa.Float),
        sa.Column("temperature", sa.Float),
        sa.Column("changed", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    )
    op.create_index("ix_forecast_sales_day", "forecast_sales", ["day"])
    op.create_table(
        "forecast_forecasts",
        sa.Column("model", sa.String(100), primary_key=True),
        sa.Column("origin", sa.Date, primary_key=True),
        sa.Column("store", sa.String(200), primary_key=True),
        sa.Column("item", sa.String(200), primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("sales", sa.Float, nullable=False),
        sa.Column("seasonal_naive", sa.Float),
        sa.Column("made", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    )
    op.create_index("ix_forecast_forecasts_origin", "forecast_forecasts", ["origin"])
    op.create_index("ix_forecast_forecasts_store_item_day", "forecast_forecasts", ["store", "item", "day"])
    op.create_table(
        "forecast_evaluations",
        sa.Column("model", sa.String(100), primary_key=True),
        sa.Column("origin", sa.Date, primary_key=True),
        sa.Column("forecasts", sa.Integer, nullable=False),
        sa.Column("compared", sa.Integer, nullable=False),
        sa.Column("rmse", sa.Float),
        sa.Column("wape", sa.Float),
        sa.Column("rmse_seasonal_naive", sa.Float),
        sa.Column("wape_seasonal_naive", sa.Float),
        sa.Column("evaluated", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    )
    op.create_index("ix_forecast_evaluations_origin", "forecast_evaluations", ["origin"])
