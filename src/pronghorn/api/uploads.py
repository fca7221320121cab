"""/v1/uploads: a large file in parts, which may come in any order and in parallel. docs/WIRE.md has our choices."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NoReturn

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, StringConstraints

from pronghorn.api import intake, multipart, wire
from pronghorn.api.auth import AccountId
from pronghorn.clock import Clock
from pronghorn.domain.model import BlobRef, File
from pronghorn.domain.uploads import Upload, UploadPart, UploadStatus
from pronghorn.errors import Fenced, InvalidRequest, NotFound, NotStored
from pronghorn.ids import Ids
from pronghorn.limits import (
    FILE_CHUNK_BYTES,
    UPLOAD_BYTES_MAX,
    UPLOAD_LIFETIME_S,
    UPLOAD_PART_BYTES_MAX,
    UPLOAD_PARTS_MAX,
)
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.files import Files
from pronghorn.storage.uploads import Uploads, digest

# What programs call a JSONL file, and what they say when they do not know; charset and the like are ignored.
BATCH_MIME_TYPES = frozenset(
    {
        "application/jsonl",
        "application/x-jsonl",
        "application/jsonlines",
        "application/x-jsonlines",
        "application/ndjson",
        "application/x-ndjson",
        "application/json",
        "application/octet-stream",
        "text/jsonl",
        "text/plain",
    }
)


class CreateUpload(wire.Request):
    """A file to be sent in parts."""

    filename: Annotated[str, StringConstraints(min_length=1)]
    purpose: Annotated[str, Field(json_schema_extra={"enum": list(intake.PURPOSES)})]
    bytes: Annotated[int, Field(ge=1, le=UPLOAD_BYTES_MAX, description="The size of the whole file.")]
    mime_type: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    expires_after: wire.ExpiresAfter | None = None


class CompleteUpload(wire.Request):
    """The parts in the order in which they make the file."""

    part_ids: Annotated[list[str], Field(max_length=UPLOAD_PARTS_MAX)]
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


class UploadObject(BaseModel):
    """An upload; `file` is there once it is completed."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: UploadStatus
    expires_at: int
    file: wire.FileObject | None


class UploadPartObject(BaseModel):
    """A part of an upload."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


@dataclass(frozen=True, slots=True)
class UploadsApi:
    """Answers the Uploads API; `batch_file_expires_s` is the life of batch inputs that name none."""

    uploads: Uploads
    files: Files
    blobs: Blobs
    clock: Clock
    ids: Ids
    batch_file_expires_s: int | None

    def routes(self) -> APIRouter:
        router = APIRouter(tags=["Uploads"])
        router.post("/v1/uploads")(self.create_upload)
        router.post("/v1/uploads/{upload_id}/parts", openapi_extra={"requestBody": _PART_BODY})(self.add_part)
        router.post("/v1/uploads/{upload_id}/complete")(self.complete_upload)
        router.post("/v1/uploads/{upload_id}/cancel")(self.cancel_upload)
        return router

    async def create_upload(self, body: CreateUpload, account_id: AccountId) -> UploadObject:
        """Announce a file that will be sent in parts within an hour."""
        life_s = self.batch_file_expires_s if body.purpose == "batch" else None
        if body.expires_after is not None:
            life_s = body.expires_after.seconds
        upload = _new_upload(self.ids.new("upload_"), account_id, body, self.clock.now(), life_s)
        await self.uploads.add(upload)
        return _upload_object(upload, None)

    async def add_part(self, upload_id: str, request: Request, account_id: AccountId) -> UploadPartObject:
        """Store a part as it streams in; parts may come in any order and in parallel."""
        upload = await self._find_pending(upload_id, account_id, "add a part to")
        if await self.uploads.count_parts(upload_id) >= UPLOAD_PARTS_MAX:
            raise InvalidRequest(f"An upload has at most {UPLOAD_PARTS_MAX} parts.", code="too_many_parts")
        part_id = self.ids.new("part_")
        part = UploadPart(part_id, upload.id, account_id, f"parts/{part_id}", self.clock.now())
        try:
            await self._receive(part, request)
        except Fenced as fenced:
            await self._find_pending(upload_id, account_id, "add a part to")
            raise InvalidRequest(f"The part was given up: {fenced}.", code="part_dropped") from fenced
        return UploadPartObject(id=part.id, created_at=part.created_at, upload_id=part.upload_id)

    async def complete_upload(self, upload_id: str, body: CompleteUpload, account_id: AccountId) -> UploadObject:
        """Make the parts, in the order given, a file; to repeat this changes nothing and has the same answer."""
        upload, stored = await self.uploads.find_with_parts(upload_id, account_id) or _not_found(upload_id)
        if upload.status is not UploadStatus.COMPLETED:
            _require_pending(upload, self.clock.now(), "complete")
            upload = await self._complete(upload, body, _in_order(body.part_ids, stored, upload.bytes))
        if upload.part_ids_digest != digest(body.part_ids):
            message = f"The upload '{upload_id}' has already been completed with other parts."
            raise InvalidRequest(message, param="part_ids", code="upload_completed")
        file = await self.files.find(upload.file_id, account_id) if upload.file_id else None
        return _upload_object(upload, file)

    async def cancel_upload(self, upload_id: str, account_id: AccountId) -> UploadObject:
        """Give an upload and its parts up; to repeat this changes nothing."""
        upload = await self._find(upload_id, account_id)
        if upload.status is not UploadStatus.CANCELLED:
            _require_pending(upload, self.clock.now(), "cancel")
            try:
                upload = await self.uploads.cancel(upload)
            except Fenced:  # it has ended meanwhile, for good: look once more
                return await self.cancel_upload(upload_id, account_id)
        return _upload_object(upload, None)

    async def _receive(self, part: UploadPart, request: Request) -> None:
        """Store a part's bytes; whatever goes wrong, nothing of them is left."""
        headers = dict(request.headers)
        try:
            await self.uploads.begin_part(part, self.clock.now())
            async with self.blobs.writing(part.key) as writer:
                form = await multipart.receive(
                    headers, request.stream(), writer, file_field="data", file_bytes_max=UPLOAD_PART_BYTES_MAX
                )
                _check_part(form, writer.bytes)
                await asyncio.to_thread(writer.commit)
            await self.uploads.store_part(part, writer.bytes, self.clock.now())
        except BaseException:
            await self.uploads.drop_part(part)
            raise

    async def _complete(self, upload: Upload, body: CompleteUpload, refs: list[BlobRef]) -> Upload:
        """Return the upload once it is completed, by this request or by another at the same time."""
        try:
            await self._check_content(upload, refs, body.md5)
            now = self.clock.now()
            expires_at = None if upload.file_expires_after_s is None else now + upload.file_expires_after_s
            file_id = self.ids.new("file-")
            file = File(file_id, upload.account_id, upload.purpose, upload.filename, upload.bytes, now, expires_at)
            return await self.uploads.complete(upload, body.part_ids, file, refs)
        except (Fenced, NotStored):
            ended = await self._find(upload.id, upload.account_id)
            if ended.status is UploadStatus.PENDING:
                raise  # its parts are gone although nothing removed them
            if ended.status is not UploadStatus.COMPLETED:
                _require_pending(ended, self.clock.now(), "complete")
            return ended

    async def _check_content(self, upload: Upload, refs: list[BlobRef], md5: str | None) -> None:
        """Raise InvalidRequest unless the parts' bytes are what they should be."""
        if upload.purpose == "batch":
            end = min(upload.bytes, FILE_CHUNK_BYTES)
            head = b"".join([chunk async for chunk in self.blobs.read(refs, 0, end)])
            intake.check_batch_head(head, upload.bytes)
        if md5 is not None and (found := await _md5(self.blobs, refs, upload.bytes)) != md5.lower():
            message = f"The MD5 of the parts in this order is {found}, but {md5} was expected."
            raise InvalidRequest(message, param="md5", code="md5_mismatch")

    async def _find(self, upload_id: str, account_id: str) -> Upload:
        return await self.uploads.find(upload_id, account_id) or _not_found(upload_id)

    async def _find_pending(self, upload_id: str, account_id: str, purpose: str) -> Upload:
        upload = await self._find(upload_id, account_id)
        _require_pending(upload, self.clock.now(), purpose)
        return upload


def _new_upload(upload_id: str, account_id: str, body: CreateUpload, now: int, life_s: int | None) -> Upload:
    """Return the upload that a request announces, once its file is one that can be accepted."""
    intake.check_purpose(body.purpose)
    filename = intake.plain_name(body.filename)
    if body.purpose == "batch":
        intake.check_batch_name(filename)
        if body.mime_type.partition(";")[0].strip().lower() not in BATCH_MIME_TYPES:
            message = f"Invalid 'mime_type': '{body.mime_type}'. A file for the Batch API is 'application/jsonl'."
            raise InvalidRequest(message, param="mime_type", code="invalid_value")
    return Upload(
        id=upload_id,
        account_id=account_id,
        filename=filename,
        purpose=body.purpose,
        mime_type=body.mime_type,
        bytes=body.bytes,
        status=UploadStatus.PENDING,
        created_at=now,
        expires_at=now + UPLOAD_LIFETIME_S,
        file_expires_after_s=life_s,
    )


def _not_found(upload_id: str) -> NoReturn:
    raise NotFound(f"No such Upload object: {upload_id}", param="id")


def _require_pending(upload: Upload, now: int, purpose: str) -> None:
    status = upload.status_at(now)
    if status is not UploadStatus.PENDING:
        raise InvalidRequest(f"Cannot {purpose} an upload with status '{status}'.", code=f"upload_{status}")


def _check_part(form: multipart.Form, size: int) -> None:
    if form.filename is None:
        raise InvalidRequest("Missing required parameter: 'data'.", param="data", code="missing_required_parameter")
    for name in form.fields:
        raise InvalidRequest(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    if size == 0:
        raise InvalidRequest("Invalid 'data': a part holds at least one byte.", param="data", code="invalid_value")


def _in_order(part_ids: Sequence[str], stored: Mapping[str, BlobRef], size: int) -> list[BlobRef]:
    """Return the blobs of the parts in the order given.

    Raises InvalidRequest unless each part is one of the upload's, named once, and together they have `size` bytes.
    """
    refs: dict[str, BlobRef] = {}
    for part_id in part_ids:
        if part_id not in stored:
            message = f"No such Part object in this upload: {part_id}"
            raise InvalidRequest(message, param="part_ids", code="part_not_found")
        if part_id in refs:
            message = f"Invalid 'part_ids': '{part_id}' is in it more than once."
            raise InvalidRequest(message, param="part_ids", code="duplicate_part")
        refs[part_id] = stored[part_id]
    total = sum(ref.bytes for ref in refs.values())
    if total != size:
        message = f"The parts have {total} bytes together, but the upload was announced with {size} bytes."
        raise InvalidRequest(message, param="part_ids", code="bytes_mismatch")
    return list(refs.values())


async def _md5(blobs: Blobs, refs: Sequence[BlobRef], size: int) -> str:
    """Return the MD5 of blobs laid end to end, in lower-case hex."""
    abandoned = threading.Event()

    def read() -> str:
        md5 = hashlib.md5(usedforsecurity=False)
        for chunk in blobs.read_blocking(refs, 0, size):
            if abandoned.is_set():
                break
            md5.update(chunk)
        return md5.hexdigest()

    try:
        return await blobs.through_whole_files(read)
    finally:
        abandoned.set()  # the thread outlives a cancelled request unless it is told


def _upload_object(upload: Upload, file: File | None) -> UploadObject:
    return UploadObject(
        id=upload.id,
        bytes=upload.bytes,
        created_at=upload.created_at,
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status,
        expires_at=upload.expires_at,
        file=wire.file_object(file) if file else None,
    )


_PART_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["data"],
                "properties": {"data": {"type": "string", "format": "binary"}},
            }
        }
    },
}
