"""What an answer's body says once it is unpacked: gateways compress although nobody has asked them to."""

from __future__ import annotations

import codecs
import zlib

# Gzip's own header, zlib's, and what some servers send as "deflate" without any.
_WINDOWS = {b"gzip": (zlib.MAX_WBITS + 16,), b"x-gzip": (zlib.MAX_WBITS + 16,), b"deflate": (zlib.MAX_WBITS, -15)}


class TooMuchError(Exception):
    """A body unpacks to more than its limit."""


def unpacked(body: bytes, coding: bytes, bytes_max: int) -> bytes | None:
    """Return a body without its content coding, or None where it is in another one than it says, or in one not known.

    Raises TooMuchError as soon as more than `bytes_max` come out.
    """
    for window_bits in _WINDOWS.get(coding.strip().lower(), ()):
        unpacker = zlib.decompressobj(window_bits)
        try:
            content = unpacker.decompress(body, bytes_max + 1)
        except zlib.error:
            continue
        if len(content) > bytes_max:
            raise TooMuchError
        if unpacker.eof:
            return content
    return None


def without_bom(body: bytes) -> bytes:
    """Return a body without the mark that some servers write before their JSON, and no reader of JSON lines expects."""
    return body.removeprefix(codecs.BOM_UTF8)
