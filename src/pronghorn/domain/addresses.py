"""Where a webhook may be sent: a judgement about a URL and about an IP address, before anything is connected.

A webhook makes the server connect to what a client names, so everything that only the server can reach is refused:
every address that is not public, however it is written. The operator can name hosts that are allowed all the same.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from typing import NamedTuple
from urllib.parse import urlsplit

# A host name, or `host:port`; an IPv6 address stands in brackets.
ALLOWED_PATTERN = r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?$"

# RFC 1035's bounds of a name and of one label of it.
_NAME_CHARS_MAX = 253
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_PORTS = {"https": 443, "http": 80}

# IANA's registries of special-purpose addresses. Written out, because what `ipaddress.is_global` answers changed
# within 3.11 and 3.12.
_NOT_PUBLIC_V4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # carrier-grade NAT
            "127.0.0.0/8",  # loopback
            "169.254.0.0/16",  # link-local, and the metadata service of every cloud
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # 6to4 relays, withdrawn
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and broadcast
        ),
    )
)
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which wraps any IPv4 address
            "3fff::/20",  # documentation
        ),
    )
)
# An IPv6-only network reaches every IPv4 host through this prefix, so here the wrapped address is what counts.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Receiver(NamedTuple):
    """A webhook URL taken apart: `path` is what goes into the request line."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The host and, unless it is the scheme's own, the port, as a Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


class Refused(NamedTuple):
    """Why nothing is sent there, as a sentence without its subject and full stop."""

    reason: str


class AllowedHosts:
    """The hosts that the operator allows although they are not public, each on one port or on all."""

    def __init__(self, entries: Collection[str]) -> None:
        self._entries = {entry.lower() for entry in entries}

    def __contains__(self, place: tuple[str, int]) -> bool:
        host, port = place
        host = _plain(host)
        host = f"[{host}]" if ":" in host else host
        return host in self._entries or f"{host}:{port}" in self._entries


def judge_url(url: str, allowed: AllowedHosts) -> Receiver | Refused:
    """Take a webhook URL apart, or say why it is refused; a name is not resolved, so it may be refused later."""
    receiver = _parse(url)
    if isinstance(receiver, Refused) or (receiver.host, receiver.port) in allowed:
        return receiver
    if receiver.scheme != "https":
        return Refused("must start with https://")
    host = _plain(receiver.host)
    if ":" in host or _NUMBER.fullmatch(host.rpartition(".")[2]):
        return receiver if is_public(host) else Refused("names an address that is not public")
    if host == "localhost" or host.endswith(".localhost"):
        return Refused("names an address that is not public")
    return receiver


def is_public(address: str) -> bool:
    """Tell whether an IP address, in its usual notation, is one that anybody on the internet can reach."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _NOT_PUBLIC_V4)
    if parsed.scope_id is not None:
        return False
    if parsed in _NAT64:
        return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    return parsed in _PUBLIC_V6 and not any(parsed in network for network in _NOT_PUBLIC_V6)


def _parse(url: str) -> Receiver | Refused:
    # The parser drops some characters and tolerates others; whatever it and the server might read differently is out.
    if not url.isascii() or not url.isprintable() or any(character in url for character in ' \\"<>^`{|}'):
        return Refused("must be written in ASCII, with everything else percent-encoded and host names in Punycode")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return Refused("is not a valid URL")
    if parts.scheme not in _PORTS:
        return Refused("must start with https://")
    if parts.username is not None or parts.password is not None:
        return Refused("must not hold a user name or password")
    if port == 0 or not _is_host(host):
        return Refused("is not a valid URL")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Receiver(parts.scheme, host, port or _PORTS[parts.scheme], path)


def _is_host(host: str) -> bool:
    if ":" in host:
        try:
            return ipaddress.IPv6Address(host).scope_id is None
        except ValueError:
            return False
    name = _plain(host)
    return len(name) <= _NAME_CHARS_MAX and all(_LABEL.fullmatch(label) for label in name.split("."))


def _plain(host: str) -> str:
    return host.lower().removesuffix(".")
