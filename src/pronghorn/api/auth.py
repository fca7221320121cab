"""Who calls: every row names its account, and for now there is one."""

from __future__ import annotations

from pronghorn.domain.model import DEFAULT_ACCOUNT


async def caller() -> str:
    """Return the account of the request; any Authorization header is accepted."""
    return DEFAULT_ACCOUNT
