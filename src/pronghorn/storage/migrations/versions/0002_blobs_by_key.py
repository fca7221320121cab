"""Blobs are found by their key, so that those that nothing names can be removed."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_file_blobs_key"), "file_blobs", ["key"])
    op.create_index(op.f("ix_upload_parts_key"), "upload_parts", ["key"])
