"""Every answer that is not a success: OpenAI's envelope, whatever went wrong and wherever it was noticed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from pronghorn.domain.validation import type_name
from pronghorn.errors import (
    Damaged,
    FileDamaged,
    NotStored,
    OutOfFiles,
    OutOfSpace,
    RequestError,
    StorageBusy,
    StorageError,
    StorageFull,
    is_full,
    is_out_of_files,
)

log = logging.getLogger("pronghorn.api")

_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "list_type": "an array",
}
# Pydantic's constraints, each with OpenAI's code and words for it.
_BOUNDS = {
    "less_than_equal": (
        "integer_above_max_value",
        "integer above maximum value. Expected a value <= {le}, but got {got} instead.",
    ),
    "greater_than_equal": (
        "integer_below_min_value",
        "integer below minimum value. Expected a value >= {ge}, but got {got} instead.",
    ),
    "string_too_long": (
        "string_above_max_length",
        "string too long. Expected a string with maximum length {max_length}, but got a string with length {got} "
        "instead.",
    ),
    "string_too_short": (
        "string_below_min_length",
        "string too short. Expected a string with minimum length {min_length}, but got a string with length {got} "
        "instead.",
    ),
    "too_long": (
        "array_above_max_length",
        "array too long. Expected an array with maximum length {max_length}, but got an array with length {got} "
        "instead.",
    ),
    "too_short": (
        "array_below_min_length",
        "array too short. Expected an array with minimum length {min_length}, but got an array with length {got} "
        "instead.",
    ),
}


def install(app: FastAPI) -> None:
    """Make every error of the app answer with the envelope."""
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OSError, _os_error)
    app.add_exception_handler(StorageFull, _full)
    app.add_exception_handler(Damaged, _damaged)
    app.add_exception_handler(NotStored, _damaged)
    app.add_exception_handler(StorageError, _refused)
    app.add_exception_handler(Exception, _bug)


def envelope(error: RequestError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the answer for an error, with its own headers and those given."""
    return JSONResponse(error.envelope(), status_code=error.status, headers={**error.headers, **(headers or {})})


async def _request_error(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestError):
        raise error
    return envelope(error)


async def _validation_error(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    return envelope(explain(error.errors()[0]))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        fault = RequestError(f"Invalid URL ({where})", code="unknown_url")
    elif error.status_code == 405:
        allowed = ", ".join(_methods_of(request))
        error.headers = {"Allow": allowed}
        fault = RequestError(f"Not allowed: {where}. This URL takes {allowed}.", code="method_not_allowed")
    elif error.status_code == 400:
        fault = _unparsable()  # the framework raises this for nothing else
    else:
        fault = RequestError(str(error.detail))
    fault.status = error.status_code
    return envelope(fault, error.headers)


def _methods_of(request: Request) -> list[str]:
    """Return the methods that this URL takes; the framework only knows those of the first route that it fits."""
    routes, scope = request.app.routes, request.scope
    methods = ("GET", "HEAD", "POST", "DELETE")
    return [name for name in methods if any(r.matches({**scope, "method": name})[0] is Match.FULL for r in routes)]


async def _os_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OSError) and is_full(error):
        return await _full(request, error)
    if isinstance(error, OSError) and is_out_of_files(error):
        log.error("%s %s: %s; raise the limit of open files (ulimit -n)", request.method, request.url.path, error)
        return envelope(OutOfFiles("The server has too many files open. Try again soon.", code="too_many_open_files"))
    return await _bug(request, error)


async def _full(_: Request, __: Exception) -> JSONResponse:
    return envelope(OutOfSpace("The server's disk is full. Try again when there is room.", code="disk_full"))


async def _damaged(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s: %s", request.method, request.url.path, error)
    message = f"The file is not served, because its stored bytes are no longer what was stored: {error}."
    return envelope(FileDamaged(message, code="file_damaged"))


async def _refused(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s: %s", request.method, request.url.path, error)
    return envelope(StorageBusy("The server's storage cannot be used now. Try again soon.", code="storage_busy"))


async def _bug(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    fault = RequestError("The server had an error while processing your request.", code="internal_error")
    fault.status, fault.type = 500, "server_error"
    return envelope(fault)


def explain(problem: dict[str, Any]) -> RequestError:
    """Return what OpenAI would say about the first thing that is wrong with a request's body or query."""
    param = _param(problem["loc"][1:])
    kind, value = problem["type"], problem.get("input")
    if kind in ("json_invalid", "string_unicode"):
        return _unparsable()
    if kind == "missing":
        if param is None:
            return RequestError("The request needs a JSON body.")
        return RequestError(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return RequestError(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if isinstance(value, bytes):  # what was sent was not said to be JSON, and so not parsed
        message = "Unsupported content type. Send the body as JSON, with the header 'Content-Type: application/json'."
        return RequestError(message, code="unsupported_content_type")
    if kind in _EXPECTED:
        got = type_name(value)
        message = f"Invalid type for '{param}': expected {_EXPECTED[kind]}, but got {got} instead."
        if param is None:
            message = f"The request's body must be a JSON object, but it is {got}."
        return RequestError(message, param=param, code="invalid_type")
    if kind in _BOUNDS:
        return _out_of_bounds(param, kind, value, problem["ctx"])
    if kind == "literal_error":
        supported = problem["ctx"]["expected"].replace(" or ", " and ")
        message = f"Invalid value: '{value}'. Supported values are: {supported}."
        return RequestError(message, param=param, code="invalid_value")
    param = problem.get("ctx", {}).get("param", param)
    known = (
        "invalid_value",
        "object_above_max_properties",
        "property_name_above_max_length",
        "string_above_max_length",
    )
    code = kind if kind in known else "invalid_value"
    message = problem["msg"] if kind in known else f"Invalid '{param}': {problem['msg']}."
    return RequestError(message, param=param, code=code)


def _param(place: Sequence[str | int]) -> str | None:
    """Return the name of a value's place in the body: `metadata.key`, `part_ids[3]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".") or None


def _unparsable() -> RequestError:
    return RequestError("We could not parse the JSON body of your request.")


def _out_of_bounds(param: str | None, kind: str, value: Any, bounds: dict[str, Any]) -> RequestError:
    code, words = _BOUNDS[kind]
    got = value if code.startswith("integer") else len(value)
    return RequestError(f"Invalid '{param}': {words.format(**bounds, got=got)}", param=param, code=code)
