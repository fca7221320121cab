"""Batches may run lines with the same body once; a shard knows which of its lines are copies of others."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batches", sa.Column("deduplicate", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("batches", sa.Column("copies", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("shards", sa.Column("copies", sa.LargeBinary(), nullable=True))
