"""How long an answer asks its client to wait, in every form that engines and gateways say it."""

from __future__ import annotations

import email.utils

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


def retry_after(headers: dict[bytes, bytes], now: float) -> float | None:
    """Return the seconds that an answer asks to wait, whichever of the usual headers says so, or None.

    A date is read against the answer's own Date, for clocks differ; `now`, in Unix seconds, stands in for it.
    """
    if (millis := _number(headers.get(b"retry-after-ms"))) is not None:
        return millis / 1000
    if (value := headers.get(b"retry-after")) is not None:
        seconds = _number(value)
        return seconds if seconds is not None else _seconds_until(value, headers.get(b"date"), now)
    waits = [wait for kind in (b"requests", b"tokens") if (wait := _reset_of(headers, kind)) is not None]
    return max(waits, default=None)


def _reset_of(headers: dict[bytes, bytes], kind: bytes) -> float | None:
    """Return when a limit that is used up is renewed; one of which something is left holds nothing up."""
    reset = headers.get(b"x-ratelimit-reset-" + kind)
    if reset is None or (_number(headers.get(b"x-ratelimit-remaining-" + kind)) or 0.0) > 0:
        return None
    return _duration(reset)


def _number(value: bytes | None) -> float | None:
    try:
        number = float(value) if value is not None else -1.0
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


def _seconds_until(date: bytes, sent: bytes | None, now: float) -> float | None:
    until, since = _timestamp(date), _timestamp(sent)
    return None if until is None else max(0.0, until - (now if since is None else since))


def _timestamp(date: bytes | None) -> float | None:
    try:
        return None if date is None else email.utils.parsedate_to_datetime(date.decode("latin-1")).timestamp()
    except (ValueError, OverflowError):
        return None


def _duration(value: bytes) -> float | None:
    """Read OpenAI's `6m0s`, `1.5s` or `20ms`."""
    total, rest = 0.0, value.decode("latin-1").strip()
    if not rest:
        return None
    while rest:
        digits = next((i for i, char in enumerate(rest) if char not in "0123456789."), len(rest))
        unit = next((name for name in ("ms", "h", "m", "s") if rest.startswith(name, digits)), None)
        number = _number(rest[:digits].encode())
        if number is None or (unit is None and rest[digits:]):
            return None
        total += number * _UNITS_S[unit]
        rest = rest[digits + len(unit or "") :]
    return total
