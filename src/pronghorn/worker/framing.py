"""Messages on a stream: a 32-bit length, then msgpack."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import msgspec

from pronghorn.worker.protocol import FRAME_BYTES_MAX

Message = TypeVar("Message")
Messages = AsyncIterator[Message]

_LENGTH = struct.Struct("<I")
_encode = msgspec.msgpack.Encoder().encode


def send(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
    """Queue a message; the other side's death shows on the reading end, not here."""
    if not writer.transport.is_closing():  # uvloop's raises where asyncio's drops what is written
        data = _encode(message)
        writer.write(_LENGTH.pack(len(data)) + data)


async def messages(reader: asyncio.StreamReader, kind: Any) -> AsyncIterator[Any]:
    """Yield messages of the given type or union until the stream ends.

    Raises ValueError on a frame that is too large or is not such a message.
    """
    decode = msgspec.msgpack.Decoder(kind).decode
    while True:
        try:
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            if length > FRAME_BYTES_MAX:
                raise ValueError(f"a message of {length} bytes is above the limit of {FRAME_BYTES_MAX}")
            data = await reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        yield decode(data)
