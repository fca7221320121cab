"""What a request begins with: the base URL, the method, the path and the headers, checked and put together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from pronghorn.engines.client_errors import EngineAddressError, EngineRequestError

_FRAMING_HEADERS = frozenset(
    {"accept-encoding", "connection", "content-length", "expect", "host", "keep-alive"}
    | {"proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
_DEFAULT_PORTS = {"http": 80, "https": 443}

_visible = re.compile(r"[!-~]+").fullmatch
_token = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
_field_value = re.compile(r"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?").fullmatch


@dataclass(frozen=True, slots=True)
class Address:
    """A base URL taken apart: where to connect to, what to call it, and what to put before each path."""

    tls: bool
    host: str
    port: int
    path: str
    host_header: str
    origin: str


def parse_base_url(base_url: str) -> Address:
    """Take a base URL apart; raises EngineAddressError for one that cannot be used."""
    # Checked first because urlsplit silently drops tabs and line ends.
    if not _visible(base_url):
        raise EngineAddressError("a base URL is written in visible ASCII characters, host names in punycode")
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise EngineAddressError("the base URL has a host or port that is not one") from error
    if parts.scheme not in _DEFAULT_PORTS:
        raise EngineAddressError("a base URL starts with http:// or https://")
    if "@" in parts.netloc:
        raise EngineAddressError("a base URL holds no user name or password: send an Authorization header")
    if not host or port == 0 or "?" in base_url or "#" in base_url:
        raise EngineAddressError("a base URL is http(s)://host[:port][/path], with no query or fragment")
    default_port = _DEFAULT_PORTS[parts.scheme]
    host_header = f"[{host}]" if ":" in host else host
    if port not in (None, default_port):
        host_header += f":{port}"
    return Address(
        tls=parts.scheme == "https",
        host=host,
        port=port or default_port,
        path=parts.path.rstrip("/"),
        host_header=host_header,
        origin=f"{parts.scheme}://{host_header}",
    )


def merge_headers(base: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """Return `base` with `extra` put over it, names compared without case.

    Raises EngineRequestError for a header of `extra` that cannot be sent; `base` is not checked.
    """
    for name, value in extra.items():
        if not _token(name) or not _field_value(value):
            raise EngineRequestError(f"header {name!r} has a name or value that cannot be sent")
        if name.lower() in _FRAMING_HEADERS:
            raise EngineRequestError(f"header {name!r} is set by the client itself")
    replaced = {name.lower() for name in extra}
    return {name: value for name, value in base.items() if name.lower() not in replaced} | dict(extra)


def head_lines(method: str, address: Address, path: str, headers: Mapping[str, str]) -> bytes:
    """Return the request line and the headers, up to where the empty line or more headers follow.

    Raises EngineRequestError for a method or path that cannot be sent; `headers` come checked from merge_headers.
    """
    # An answer to HEAD or CONNECT is framed by its request, which the parser does not know.
    if not _token(method) or method in ("HEAD", "CONNECT"):
        raise EngineRequestError(f"method {method!r} cannot be sent")
    if not path.startswith("/") or not _visible(path) or "#" in path:
        raise EngineRequestError("a path starts with / and holds visible ASCII characters but no #")
    lines = [f"{method} {address.path}{path} HTTP/1.1", f"Host: {address.host_header}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, ""]).encode("latin-1")
