"""CRC32 of every block of a stored blob: bytes that have rotted on disk are noticed by whoever reads them.

A blob is its content and then the checksum of each of the content's blocks, little-endian 32-bit. zlib's CRC32 takes
4 GB/s on one core, a tenth of what reading costs.
"""

from __future__ import annotations

import zlib
from array import array

from pronghorn.limits import KIB

# What is read beyond a range to check it, at most, at each end; its checksums take 64 KiB for a GiB.
BLOCK_BYTES = 64 * KIB
CHECKSUM_BYTES = 4


class Checksums:
    """Takes a blob's content in pieces of any size and returns the checksums of its blocks."""

    def __init__(self) -> None:
        self._whole = array("I")
        self._open = 0
        self._open_bytes = 0

    def add(self, data: bytes | memoryview) -> None:
        if self._open_bytes + len(data) < BLOCK_BYTES:
            self._open = zlib.crc32(data, self._open)
            self._open_bytes += len(data)
            return
        view = memoryview(data)
        while self._open_bytes + len(view) >= BLOCK_BYTES:
            piece, view = view[: BLOCK_BYTES - self._open_bytes], view[BLOCK_BYTES - self._open_bytes :]
            self._whole.append(zlib.crc32(piece, self._open))
            self._open = self._open_bytes = 0
        self._open = zlib.crc32(view, self._open)
        self._open_bytes = len(view)

    def trailer(self) -> bytes:
        """Return what follows the content."""
        last = [self._open] if self._open_bytes else []
        return _little_endian(self._whole + array("I", last)).tobytes()


def blocks_of(first: int, last: int) -> tuple[int, int]:
    """Return the first block of a range of bytes and the one after its last."""
    return first // BLOCK_BYTES, -(-last // BLOCK_BYTES)


def first_bad_block(content: memoryview, trailer: bytes) -> int | None:
    """Return the position of the first block that is not what was written, among those that are given whole."""
    checksums = array("I")
    checksums.frombytes(trailer)
    for position, checksum in enumerate(_little_endian(checksums)):
        if zlib.crc32(content[position * BLOCK_BYTES : (position + 1) * BLOCK_BYTES]) != checksum:
            return position
    return None


def _little_endian(checksums: array[int]) -> array[int]:
    if array("I", [1]).tobytes()[0] == 0:
        checksums.byteswap()
    return checksums
