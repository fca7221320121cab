"""/v1/files: upload, metadata, content."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse

from pronghorn.api import intake, multipart, wire
from pronghorn.api.auth import caller
from pronghorn.clock import Clock
from pronghorn.domain.model import BlobRef, File
from pronghorn.errors import InvalidRequest, NotFound
from pronghorn.ids import Ids
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.metadata import Metadata

_DOWNLOADABLE = ("batch", "batch_output")


def routes(metadata: Metadata, blobs: Blobs, clock: Clock, ids: Ids) -> APIRouter:
    """Return the routes of the Files API."""
    router = APIRouter(tags=["Files"])

    @router.post("/v1/files", openapi_extra={"requestBody": _UPLOAD_BODY})
    async def upload_file(request: Request, account_id: Annotated[str, Depends(caller)]) -> wire.FileObject:
        """Store a file as it streams in, whatever its size."""
        file_id = ids.new("file-")
        key = f"files/{file_id}"
        with blobs.writer(key) as writer:
            form = await multipart.receive(dict(request.headers), request.stream(), writer, file_field="file")
            purpose, filename = _checked(form, writer.bytes)
            await asyncio.to_thread(writer.commit)
        file = File(file_id, account_id, purpose, filename, writer.bytes, clock.now())
        await metadata.add_file(file, [BlobRef(key, writer.bytes)])
        return wire.file_object(file)

    @router.get("/v1/files/{file_id}")
    async def retrieve_file(file_id: str, account_id: Annotated[str, Depends(caller)]) -> wire.FileObject:
        """Return a file's metadata."""
        return wire.file_object(await find(file_id, account_id))

    @router.get("/v1/files/{file_id}/content", response_class=StreamingResponse)
    async def download_file(file_id: str, account_id: Annotated[str, Depends(caller)]) -> StreamingResponse:
        """Return a file's content."""
        file = await find(file_id, account_id)
        if file.purpose not in _DOWNLOADABLE:
            raise InvalidRequest(f"Not allowed to download files of purpose: {file.purpose}")
        content: AsyncIterator[bytes] = blobs.read(await metadata.file_blobs(file.id), 0, file.bytes)
        return StreamingResponse(
            content,
            media_type="application/octet-stream",
            headers={
                "Content-Length": str(file.bytes),
                "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename)}",
                "X-Content-Type-Options": "nosniff",
            },
        )

    async def find(file_id: str, account_id: str) -> File:
        file = await metadata.file(file_id, account_id)
        if file is None:
            raise NotFound(f"No such File object: {file_id}", param="id")
        return file

    return router


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
                },
            }
        }
    },
}
