"""What the routes of batches share: finding one, and starting one once, however often the request is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Annotated

from fastapi import Header
from pydantic import BaseModel

from pronghorn.domain.model import Batch
from pronghorn.errors import InvalidRequest, KeyReused, NotFound
from pronghorn.storage.metadata import Idempotency, Metadata

IdempotencyKey = Annotated[
    str | None,
    Header(max_length=256, description="The same key with the same body gets the same answer, and starts nothing new."),
]


async def find_batch(metadata: Metadata, batch_id: str, account_id: str) -> Batch:
    """Return a batch of the caller's.

    Raises InvalidRequest for what cannot be a batch's id, NotFound for one that is not there.
    """
    if not batch_id.startswith("batch"):
        raise InvalidRequest(
            f"Invalid 'batch_id': '{batch_id}'. Expected an ID that begins with 'batch'.",
            param="batch_id",
            code="invalid_value",
        )
    batch = await metadata.batch(batch_id, account_id)
    if batch is None:
        raise NotFound(f"No batch found with id '{batch_id}'.")
    return batch


class Launcher:
    """Starts batches; `changed` is called when there is a new one to run."""

    def __init__(self, metadata: Metadata, changed: Callable[[], None]) -> None:
        self._metadata = metadata
        self.changed = changed

    async def launch(self, batch: Batch, path: str, body: BaseModel, key: str | None) -> Batch:
        """Start a batch and return it as it is at its creation; a request sent again gets the first one's.

        Raises InvalidRequest when the key has come with another body.
        """
        try:
            created = await self._metadata.add_batch(batch, _idempotency(path, body, key))
        except KeyReused as error:
            raise _key_reused() from error
        self.changed()
        return created

    async def launched(self, account_id: str, path: str, body: BaseModel, key: str | None) -> Batch | None:
        """Return the batch that a request which is sent again has started, as it was at its creation, or None.

        Raises InvalidRequest when the key has come with another body.
        """
        idempotency = _idempotency(path, body, key)
        if idempotency is None:
            return None
        try:
            return await self._metadata.batch_of_request(account_id, idempotency)
        except KeyReused as error:
            raise _key_reused() from error


def _idempotency(path: str, body: BaseModel, key: str | None) -> Idempotency | None:
    if key is None:
        return None
    return Idempotency(key, hashlib.sha256(f"{path}\n{body.model_dump_json()}".encode()).digest())


def _key_reused() -> InvalidRequest:
    message = "This Idempotency-Key was used with another request body. Use a new key for a new request."
    return InvalidRequest(message, code="idempotency_key_reused")
