"""Every answer that is not a success: OpenAI's envelope, whatever went wrong and wherever it was noticed."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pronghorn.domain.validation import type_name
from pronghorn.errors import OutOfSpace, RequestError

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


def install(app: FastAPI) -> None:
    """Make every error of the app answer with the envelope."""
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OSError, _os_error)
    app.add_exception_handler(Exception, _bug)


def envelope(error: RequestError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the answer for an error, with its own headers and those given."""
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return JSONResponse({"error": body}, status_code=error.status, headers={**error.headers, **(headers or {})})


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
        fault = RequestError(f"Not allowed: {where}. This URL takes other methods.", code="method_not_allowed")
    else:
        fault = RequestError(str(error.detail))
    fault.status = error.status_code
    return envelope(fault, error.headers)


async def _os_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return envelope(OutOfSpace("The server's disk is full. Try again when there is room.", code="disk_full"))
    return await _bug(request, error)


async def _bug(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    fault = RequestError("The server had an error while processing your request.", code="internal_error")
    fault.status, fault.type = 500, "server_error"
    return envelope(fault)


def explain(problem: dict[str, Any]) -> RequestError:
    """Return what OpenAI would say about the first thing that is wrong with a request's body or query."""
    param = ".".join(str(part) for part in problem["loc"][1:]) or None
    kind, value = problem["type"], problem.get("input")
    if kind == "json_invalid":
        return RequestError("We could not parse the JSON body of your request.")
    if kind == "missing":
        if param is None:
            return RequestError("The request needs a JSON body.")
        return RequestError(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return RequestError(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if kind in _EXPECTED:
        got = type_name(value)
        message = f"Invalid type for '{param}': expected {_EXPECTED[kind]}, but got {got} instead."
        if param is None:
            message = f"The request's body must be a JSON object, but it is {got}."
        return RequestError(message, param=param, code="invalid_type")
    if kind in ("less_than_equal", "greater_than_equal"):
        return _out_of_range(param, kind, value, problem["ctx"])
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


def _out_of_range(param: str | None, kind: str, value: object, bounds: dict[str, Any]) -> RequestError:
    if kind == "less_than_equal":
        limit, expected, code = "above maximum", f"<= {bounds['le']}", "integer_above_max_value"
    else:
        limit, expected, code = "below minimum", f">= {bounds['ge']}", "integer_below_min_value"
    message = f"Invalid '{param}': integer {limit} value. Expected a value {expected}, but got {value} instead."
    return RequestError(message, param=param, code=code)
