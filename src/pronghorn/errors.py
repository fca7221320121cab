"""The errors that parts of the program raise for each other, in one tree; those of a single part stand beside it.

PronghornError
├── RequestError            a client's request cannot be served; carries OpenAI's envelope and its HTTP status
│   ├── InvalidRequest      400
│   ├── NotFound            404
│   ├── SlowBody            408
│   ├── Conflict            409
│   ├── TooLarge            413
│   ├── TooManyRequests     429
│   ├── FileDamaged         500
│   ├── EngineFailed        502
│   ├── EngineUnreachable   503
│   ├── OutOfFiles          503
│   ├── Stopping            503
│   ├── StorageBusy         503
│   ├── EngineTimedOut      504
│   └── OutOfSpace          507
├── UsageError              a command or a setting is wrong; one line on stderr, exit status 2
├── EngineError             an engine cannot be started or reached
├── StorageError            stored data cannot be read or written
│   ├── NotStored           no blob under that key
│   ├── Damaged             stored bytes are not what was written
│   ├── Fenced              what this commit wanted to change has moved on, or a later epoch owns it
│   ├── StorageFull         there is no room; it may come back
│   └── KeyReused           an idempotency key has come with another request
└── InvariantError          a bug of ours
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import NoReturn


class PronghornError(Exception):
    """The root of the tree; its text is written for people."""


class RequestError(PronghornError):
    """A client's request cannot be served: an HTTP status and the four keys of OpenAI's error envelope."""

    status = 400
    type = "invalid_request_error"
    headers: Mapping[str, str] = {}

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def envelope(self) -> dict[str, dict[str, str | None]]:
        """Return the body of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(RequestError):
    """The request itself is wrong."""


class NotFound(RequestError):
    """What the request names does not exist for this caller."""

    status = 404


class SlowBody(RequestError):
    """The request's body does not arrive."""

    status = 408
    # What else may still come on this connection is not waited for.
    headers: Mapping[str, str] = {"connection": "close"}


class Conflict(RequestError):
    """What the request names is in a state that forbids it."""

    status = 409
    # The official client repeats a 409 unless it is told that nothing will change.
    headers: Mapping[str, str] = {"x-should-retry": "false"}


class TooLarge(RequestError):
    """The request's body is above a limit."""

    status = 413


class TooManyRequests(RequestError):
    """The server has all the live requests that it takes at once."""

    status = 429
    type = "requests"
    headers: Mapping[str, str] = {"retry-after": "1"}


class EngineFailed(RequestError):
    """The engine took a live request and gave no whole answer."""

    status = 502
    type = "server_error"


class EngineUnreachable(RequestError):
    """No engine that could answer a live request accepts a connection."""

    status = 503
    type = "server_error"
    # About as long as an engine takes to be restarted, or to be found gone.
    headers: Mapping[str, str] = {"retry-after": "5"}


class OutOfFiles(RequestError):
    """The process has as many files and connections open as the system lets it."""

    status = 503
    type = "server_error"
    headers: Mapping[str, str] = {"retry-after": "5"}


class Stopping(RequestError):
    """The server ends before the request does."""

    status = 503
    type = "server_error"
    headers: Mapping[str, str] = {"retry-after": "5"}


class StorageBusy(RequestError):
    """The database refuses to be read or written at present; the client may try again later."""

    status = 503
    type = "server_error"
    headers: Mapping[str, str] = {"retry-after": "5"}


class EngineTimedOut(RequestError):
    """The engine took a live request and was silent for too long."""

    status = 504
    type = "server_error"


class FileDamaged(RequestError):
    """The stored bytes of a file are not what was uploaded or recorded."""

    status = 500
    type = "server_error"
    # To ask again changes nothing.
    headers: Mapping[str, str] = {"x-should-retry": "false"}


class OutOfSpace(RequestError):
    """The disk is full; the client may try again later."""

    status = 507
    type = "server_error"


class UsageError(PronghornError):
    """A command line, a setting or an input file is wrong."""


class EngineError(PronghornError):
    """An engine cannot be started or reached."""


class StorageError(PronghornError):
    """Stored data cannot be read or written."""


class NotStored(StorageError):
    """There is no blob under that key."""


class Damaged(StorageError):
    """Stored bytes are not what was written."""


class Fenced(StorageError):
    """What this commit wanted to change has moved on, or a later epoch owns it."""


class StorageFull(StorageError):
    """There is no room to store anything; it may come back."""


class KeyReused(StorageError):
    """An idempotency key has come with another request."""


class InvariantError(PronghornError):
    """A promise that our own code makes to itself does not hold."""


def unreachable(what: str) -> NoReturn:
    """Raise InvariantError for a branch that no input can reach."""
    raise InvariantError(f"unreachable: {what}")


def invariant(holds: bool, what: str) -> None:
    """Raise InvariantError unless `holds`; unlike assert it survives `python -O`."""
    if not holds:
        raise InvariantError(what)


def is_full(error: OSError) -> bool:
    """Tell whether an error says that there is no room, or none left for this user."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_out_of_files(error: OSError) -> bool:
    """Tell whether an error says that this process, or the whole system, can open no further file or connection."""
    return error.errno in (errno.EMFILE, errno.ENFILE)
