"""Identifiers: opaque, unguessable, with the prefixes OpenAI's clients expect."""

from __future__ import annotations

import secrets
import string
from typing import Protocol

_ALNUM = string.ascii_letters + string.digits


class Ids(Protocol):
    """Where new identifiers come from."""

    def new(self, prefix: str) -> str:
        """Return `prefix` and at least 128 bits that no one can guess."""
        ...


class RandomIds:
    """Identifiers from the operating system's randomness."""

    def new(self, prefix: str) -> str:
        if prefix == "file-":
            return prefix + "".join(secrets.choice(_ALNUM) for _ in range(22))
        return prefix + secrets.token_hex(16)


def line_id(batch_id: str, line: int) -> str:
    """Return the `batch_req_` id of one line: the same for every attempt, so a result never changes its name."""
    return f"batch_req_{batch_id.removeprefix('batch_')[:20]}{line:012x}"
