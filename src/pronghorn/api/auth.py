"""Who calls: every row names its account, and for now there is one."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends

from pronghorn.domain.model import DEFAULT_ACCOUNT


async def _caller() -> str:
    """Return the account of the request; any Authorization header is accepted."""
    return DEFAULT_ACCOUNT


AccountId = Annotated[str, Depends(_caller)]
