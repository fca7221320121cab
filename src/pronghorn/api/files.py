"""/v1/files: upload, list, metadata, content, delete."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from pronghorn.api import content, faults, intake, multipart, wire
from pronghorn.api.auth import AccountId
from pronghorn.clock import Clock
from pronghorn.domain.model import BlobRef, File
from pronghorn.errors import Conflict, InvalidRequest, NotFound, StorageError
from pronghorn.ids import Ids
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.files import Files

LISTED_MAX = 10_000
_DOWNLOADABLE = ("batch", "batch_output")


@dataclass(frozen=True, slots=True)
class FilesApi:
    """Answers the Files API; `batch_file_expires_s` is the life of batch inputs that name none."""

    files: Files
    blobs: Blobs
    clock: Clock
    ids: Ids
    batch_file_expires_s: int | None

    def routes(self) -> APIRouter:
        router = APIRouter(tags=["Files"])
        router.post("/v1/files", openapi_extra={"requestBody": _UPLOAD_BODY})(self.upload_file)
        router.get("/v1/files")(self.list_files)
        router.get("/v1/files/{file_id}")(self.retrieve_file)
        router.delete("/v1/files/{file_id}")(self.delete_file)
        content_of = "/v1/files/{file_id}/content"
        router.get(content_of, response_class=StreamingResponse, responses=_CONTENT)(self.download_file)
        router.head(content_of, include_in_schema=False)(self.download_file)
        return router

    async def upload_file(self, request: Request, account_id: AccountId) -> wire.FileObject:
        """Store a file as it streams in, whatever its size."""
        file_id = self.ids.new("file-")
        key = f"files/{file_id}"
        async with self.blobs.writing(key) as writer:
            form = await multipart.receive(dict(request.headers), request.stream(), writer, file_field="file")
            purpose, filename = _checked(form, writer.bytes)
            life_s = _life_s(form.fields, self.batch_file_expires_s if purpose == "batch" else None)
            await asyncio.to_thread(writer.commit)
        now = self.clock.now()
        expires_at = None if life_s is None else now + life_s
        file = File(file_id, account_id, purpose, filename, writer.bytes, now, expires_at)
        try:
            await self.files.add(file, [BlobRef(key, writer.bytes)])
        except StorageError:
            await self.blobs.delete(key)
            raise
        return wire.file_object(file)

    async def list_files(
        self,
        account_id: AccountId,
        purpose: str | None = None,
        limit: Annotated[int, Query(ge=1, le=LISTED_MAX)] = LISTED_MAX,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> wire.FileList:
        """Return a page of files, newest first unless asked otherwise."""
        newest_first = order == "desc"
        page = await self.files.page(
            account_id, self.clock.now(), purpose=purpose, limit=limit, after=after, newest_first=newest_first
        )
        if page is None:
            raise NotFound(f"No such File object: {after}", param="after")
        return wire.FileList.of(list(map(wire.file_object, page.items)), has_more=page.has_more)

    async def retrieve_file(self, file_id: str, account_id: AccountId) -> wire.FileObject:
        """Return a file's metadata."""
        return wire.file_object(await self._find(file_id, account_id))

    async def delete_file(self, file_id: str, account_id: AccountId) -> wire.FileDeleted:
        """Delete a file; the input of a batch that has not ended stays."""
        await self._find(file_id, account_id)
        if not await self.files.delete(file_id, account_id):
            message = (
                f"File {file_id} is the input of a batch that has not ended. Cancel the batch, or wait for its end."
            )
            raise Conflict(message, param="id", code="file_in_use")
        # It is gone, whatever becomes of its bytes: those that are left here, the next sweep removes.
        with contextlib.suppress(StorageError, OSError):
            keys = await self.files.removals()
            for key in keys:
                await self.blobs.delete(key)
            await self.files.removed(keys)
        return wire.FileDeleted(id=file_id)

    async def download_file(self, request: Request, file_id: str, account_id: AccountId) -> Response:
        """Return a file's content, or a range of it."""
        file = await self._find(file_id, account_id)
        if file.purpose not in _DOWNLOADABLE:
            raise InvalidRequest(f"Not allowed to download files of purpose: {file.purpose}")
        return await content.respond(request, file, await self.files.blobs(file.id), self.blobs)

    async def _find(self, file_id: str, account_id: str) -> File:
        file = await self.files.find(file_id, account_id)
        if file is None or file.has_expired(self.clock.now()):
            raise NotFound(f"No such File object: {file_id}", param="id")
        return file


def _life_s(fields: dict[str, str], default_s: int | None) -> int | None:
    """Return how long an upload's file lives, in seconds, from its `expires_after[...]` fields."""
    given = {
        name: fields[f"expires_after[{name}]"] for name in ("anchor", "seconds") if f"expires_after[{name}]" in fields
    }
    if not given:
        return default_s
    try:
        return wire.ExpiresAfter.model_validate(given, strict=False).seconds
    except ValidationError as error:
        first = error.errors()[0]
        raise faults.explain({**first, "loc": ("body", "expires_after", *first["loc"])}) from error


def _checked(form: multipart.Form, size: int) -> tuple[str, str]:
    """Return an upload's purpose and file name once they and the first line are acceptable."""
    if form.filename is None:
        raise InvalidRequest("Missing required parameter: 'file'.", param="file", code="missing_required_parameter")
    if "purpose" not in form.fields:
        raise InvalidRequest(
            "Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter"
        )
    purpose = form.fields["purpose"]
    intake.check_purpose(purpose)
    filename = intake.plain_name(form.filename)
    if purpose == "batch":
        intake.check_batch_name(filename)
        intake.check_batch_head(form.head, size)
    return purpose, filename


_UPLOAD_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": list(intake.PURPOSES)},
                    "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                    "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                },
            }
        }
    },
}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
    206: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
    304: {"description": "The content has not changed."},
}
