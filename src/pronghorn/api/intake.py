"""What a new file must be, whether it comes whole or in parts."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import get_args

import msgspec

from pronghorn.api import wire
from pronghorn.domain.planning import BOM
from pronghorn.errors import InvalidRequest

PURPOSES: tuple[str, ...] = get_args(wire.Purpose)
FILENAME_CHARS_MAX = 255
_REFUSAL = "Invalid file format for Batch API. Must be .jsonl"


def check_purpose(purpose: str) -> None:
    """Raise InvalidRequest for a purpose that no file can have."""
    if purpose not in PURPOSES:
        raise InvalidRequest(f"'{purpose}' is not one of {list(PURPOSES)} - 'purpose'")


def plain_name(filename: str) -> str:
    """Return a file name without directories."""
    return PurePosixPath(filename.replace("\\", "/").replace("\0", "")).name[:FILENAME_CHARS_MAX] or "file"


def check_batch_name(filename: str) -> None:
    """Raise InvalidRequest for a name that no batch input has."""
    if not filename.endswith(".jsonl"):
        raise InvalidRequest(_REFUSAL)


def check_batch_head(head: bytes, size: int) -> None:
    """Refuse what is plainly no batch input, as early as OpenAI does; the batch's validation reads every line.

    `head` is the file's first bytes, `size` the number of all. Raises InvalidRequest.
    """
    if not head.removeprefix(BOM).strip():
        raise InvalidRequest(f"{_REFUSAL}: the file is empty.")
    first, newline, _ = head.removeprefix(BOM).lstrip().partition(b"\n")
    if newline or len(head) == size:
        try:
            msgspec.json.decode(first.strip(), type=dict[str, msgspec.Raw])
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{_REFUSAL}: the first line is not a JSON object.") from error
