"""Which hosts may be asked for URLs that strangers write, and which token belongs to which host."""

from __future__ import annotations

import base64
import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import unquote_to_bytes, urlsplit

from lora.errors import SourceInvalid

PORTS = {"http": 80, "https": 443}

_NETWORKS = (
    *("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24"),
    *("3fff::/20", "::/96", "64:ff9b:1::/48", "5f00::/16"),
)
NOT_PUBLIC = tuple(map(ipaddress.ip_network, _NETWORKS))
"""Networks that some version of Python takes for public: Azure's and Oracle's services for their own
machines, relays of 6to4, examples in documents, translators' and segment routing's own."""

NAT64 = ipaddress.ip_network("64:ff9b::/96")
SIIT = ipaddress.ip_network("::ffff:0:0:0/96")
ISATAP = 0x5EFE
"""The third quarter of an ISATAP address, but for one bit; the fourth is an IPv4 address (RFC 5214)."""


def is_public(address: str) -> bool:
    """Whether an IP address is on the open internet; one that embeds an IPv4 address counts as that one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in NAT64 or ip in SIIT or (int(ip) >> 32) & 0xFDFFFFFF == ISATAP:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    listed = any(ip in network for network in NOT_PUBLIC)
    return ip.is_global and not (listed or ip.is_multicast or ip.is_reserved)


@dataclass(frozen=True)
class WebRules:
    """Where requests may lead, and with which tokens."""

    allow_private: bool = False
    """Whether addresses of the worker's own network may be asked."""
    allowed_hosts: tuple[str, ...] = ()
    """If there are any, only these hosts, after redirects too. `*.example.com`: all below example.com."""
    own: frozenset[str] = frozenset()
    """Origins of servers that the operator set up: neither rule above applies to them."""
    tokens: Mapping[str, tuple[str, str]] = field(default_factory=dict, repr=False)
    """Origin -> (header's name, its value)."""
    share_private: bool = False
    """Whether a file that the token in a request's link opened serves requests without that token, too."""

    def check(self, host: str, addresses: Sequence[str]) -> None:
        """Raises: SourceInvalid if the host must not be asked; `addresses` are all that it has."""
        allowed = self.allowed_hosts
        if allowed and not any(fnmatchcase(host, pattern.lower()) for pattern in allowed):
            raise SourceInvalid(
                f"the host {host} is not among LORA_ALLOWED_HOSTS",
                "The worker's operator decides which hosts it may ask.",
            )
        if not self.allow_private and not all(map(is_public, addresses)):
            raise SourceInvalid(
                f"the host {host} is not on the open internet",
                "If it must be asked, the worker's operator sets LORA_ALLOW_PRIVATE_URLS=1.",
            )


def origin_of(url: str) -> str:
    """`scheme://host:port`, the port always there. A bare host name means https.

    Raises: ValueError if there is no host.
    """
    parts = urlsplit(url if "://" in url else f"https://{url}")
    if parts.scheme not in PORTS or not parts.hostname:
        raise ValueError("it is no http(s) URL")
    return f"{parts.scheme}://{parts.hostname}:{parts.port or PORTS[parts.scheme]}"


def user_of(url: str) -> str:
    """The user and password of a URL, as HTTP's basic authorization writes them; empty if there are none."""
    user, at, _ = urlsplit(url).netloc.rpartition("@")
    return base64.b64encode(unquote_to_bytes(user)).decode() if at else ""


def without_user(url: str) -> str:
    """The URL without its user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def auth_headers(text: str) -> dict[str, tuple[str, str]]:
    """Origin -> (header's name, its value), from JSON such as `{"host": "Authorization: Bearer ..."}`.

    An empty text has none. Raises: ValueError that repeats nothing of the text.
    """
    try:
        by_host = json.loads(text or "{}")
    except ValueError:
        raise ValueError("it is no JSON") from None
    if not isinstance(by_host, dict):
        raise ValueError("it is no JSON object of host -> header")
    headers = {}
    for host, header in by_host.items():
        name, colon, value = str(header).partition(":")
        value = value.strip()
        if not isinstance(header, str) or not colon or not re.fullmatch(r"[A-Za-z0-9-]+", name):
            raise ValueError("a header is not written as 'Name: value'")
        if not value.isprintable() or not value.isascii():
            raise ValueError("a header's value holds a character that no header may")
        try:
            headers[origin_of(host)] = name, value
        except ValueError:
            raise ValueError("a key is no host name") from None
    return headers
