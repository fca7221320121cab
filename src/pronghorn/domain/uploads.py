"""An upload: a large file sent in parts, and the one step that its life has.

pending ──▶ completed   (a client names the parts in order; they are the file from then on)
   ├──────▶ cancelled   (a client gives up)
   └──────▶ expired     (its hour is over)

Nothing leaves the other three, and a part is only taken while the upload is pending.
"""

from __future__ import annotations

import enum

import msgspec


class UploadStatus(enum.StrEnum):
    """Where an upload is in its life."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Upload(msgspec.Struct, frozen=True):
    """A file that is being sent in parts; times are Unix seconds, `bytes` is what its client announced.

    `file_expires_after_s` counts from the creation of the file. `part_ids_digest` names the parts that became the
    file, so that a repeated completion is known as one.
    """

    id: str
    account_id: str
    filename: str
    purpose: str
    mime_type: str
    bytes: int
    status: UploadStatus
    created_at: int
    expires_at: int
    file_expires_after_s: int | None = None
    file_id: str | None = None
    part_ids_digest: str | None = None

    def status_at(self, now: int) -> UploadStatus:
        """Return the status: an upload whose time is over has expired, whether or not that has been noted yet."""
        if self.status is UploadStatus.PENDING and now >= self.expires_at:
            return UploadStatus.EXPIRED
        return self.status


class UploadPart(msgspec.Struct, frozen=True):
    """One part of an upload, and the key its bytes are stored under."""

    id: str
    upload_id: str
    account_id: str
    key: str
    created_at: int
