"""Storage in a directory, for tests of files and uploads."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa

from pronghorn.control.maintenance import Maintenance
from pronghorn.control.orphans import Orphans
from pronghorn.domain.model import BlobRef, File
from pronghorn.domain.uploads import Upload, UploadPart, UploadStatus
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.database import Database
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata
from pronghorn.storage.segments import Segments
from pronghorn.storage.tables import upload_parts
from pronghorn.storage.uploads import Uploads
from pronghorn.storage.webhooks import Webhooks
from tests.storing import SetClock

ACCOUNT = "org-test"
START, LIFETIME_S = 1_000_000, 3600
END = START + LIFETIME_S


class World:
    """Storage in a directory, and short ways to put uploads into it."""

    def __init__(self, database: Database, directory: Path) -> None:
        self.database = database
        self.uploads, self.files = Uploads(database), Files(database)
        self.blobs_dir = directory / "blobs"
        self.blobs = Blobs(self.blobs_dir)
        self.clock = SetClock(START)
        self.orphans = Orphans(Metadata(database), self.files, self.blobs, Segments(directory / "segments"))
        self.maintenance = Maintenance(
            self.files, self.uploads, Webhooks(database), self.blobs, self.orphans, self.clock
        )

    async def upload(self, name: str, size: int = 10) -> Upload:
        upload = Upload(
            id=f"upload_{name}",
            account_id=ACCOUNT,
            filename="input.jsonl",
            purpose="batch",
            mime_type="application/jsonl",
            bytes=size,
            status=UploadStatus.PENDING,
            created_at=START,
            expires_at=END,
        )
        await self.uploads.add(upload)
        return upload

    async def begin(self, upload: Upload, name: str) -> UploadPart:
        part = UploadPart(f"part_{name}", upload.id, ACCOUNT, f"parts/part_{name}", START)
        await self.uploads.begin_part(part, self.clock.now())
        return part

    async def part(self, upload: Upload, name: str, data: bytes) -> UploadPart:
        part = await self.begin(upload, name)
        await asyncio.to_thread(self.store, part.key, data)
        await self.uploads.store_part(part, len(data), self.clock.now())
        return part

    def store(self, key: str, data: bytes) -> None:
        with self.blobs.writer(key) as writer:
            writer.write(data)
            writer.commit()

    async def complete(self, upload: Upload, *parts: UploadPart) -> Upload:
        _, stored = await self.uploads.find_with_parts(upload.id, ACCOUNT) or pytest.fail("there is no upload")
        refs = [stored.get(part.id, BlobRef(part.key, 1)) for part in parts]
        file = File(f"file-{upload.id}", ACCOUNT, "batch", upload.filename, sum(ref.bytes for ref in refs), START)
        return await self.uploads.complete(upload, [part.id for part in parts], file, refs)

    async def status(self, upload: Upload) -> UploadStatus:
        found = await self.uploads.find(upload.id, ACCOUNT)
        assert found is not None
        return found.status

    def stored(self) -> set[str]:
        return {path.name for path in self.blobs_dir.rglob("*") if path.is_file()}

    async def known_parts(self) -> set[str]:
        return set(await self.database.read(lambda c: c.scalars(sa.select(upload_parts.c.id)).all()))
