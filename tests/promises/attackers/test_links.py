"""Hostile URLs and names: nothing of a query is shown, and no private address is connected to."""

from __future__ import annotations

import ipaddress
import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, repeat
from typing import Any

import pytest
import requests

from lora.errors import LoraError, SourceInvalid
from lora.fetch.redaction import redact_url
from lora.fetch.rules import is_public
from lora.fetch.sources import Reference, RemoteFile, parse
from lora.fetch.web import Web
from tests.promises.attackers.rounds import Rounds
from validation import InvalidInput
from worker.pictures.outputs import requested_bucket
from worker.pictures.store import UploadFailed

PIECES = (
    *(
        "https://",
        "http:/",
        "hf://",
        "civitai:1",
        "//",
        "/",
        "@",
        ":",
        "?",
        "#",
        "&",
        ";",
        "=",
        "\\",
    ),
    *("user/repo", "h.example", "127.0.0.1", "[::1]", "u:p@", "%3F", "%00", "\n", " ", "..", "é"),
    *(
        "://",
        "f.safetensors",
        "token=",
        "X-Amz-Signature=",
        "next=https://x/",
        "@v1",
        "+2",
        "\ud800",
    ),
)

PUBLIC = "93.184.215.14"


def test_no_link_shows_the_value_of_its_query_or_its_password(rounds: Rounds) -> None:
    for chance in rounds(1000, 30_000):
        before, after = ("".join(chance.choices(PIECES, k=chance.randint(0, 5))) for _ in range(2))
        mark = chance.choice(("?token=", "?a=1&k=", "#", "?x=https://y/?z=", "//u:", "//u:p://"))
        end = "@host/f" if mark.startswith("//") else after
        text = f"{before}{mark}canary{end}"
        shown = redact_url(text)
        try:
            location = parse(Reference(text))
            shown += location.shown if isinstance(location, RemoteFile) else ""
        except LoraError as error:
            shown += str(error)
        assert "canary" not in shown, text


PRIVATE = [
    ipaddress.ip_network(net)
    for net in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        *("168.63.129.16/32", "::/96", "64:ff9b:1::/48", "100::/64", "2001:db8::/32", "3fff::/20"),
        *("5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
    )
]
"""What is not on the open internet: the registries' lists, written down once more."""

EMBEDDING: dict[str, Callable[[int], int]] = {
    "mapped": lambda inner: 0xFFFF << 32 | inner,
    "translated": lambda inner: 0xFFFF << 48 | inner,
    "NAT64": lambda inner: 0x64FF9B << 96 | inner,
    "6to4": lambda inner: 0x2002 << 112 | inner << 80 | 1,
    "Teredo": lambda inner: 0x20010000 << 96 | (inner ^ 0xFFFFFFFF),
    "ISATAP": lambda inner: 0x2600 << 112 | 0x5EFE << 32 | inner,
    "ISATAP of a public address": lambda inner: 0x2600 << 112 | 0x0200_5EFE << 32 | inner,
}


def private_address(chance: random.Random) -> str:
    """One of a private network, or an IPv6 address that embeds one."""
    net = chance.choice(PRIVATE)
    number = int(net.network_address) + chance.randrange(net.num_addresses)
    if net.version == 6:
        return str(ipaddress.IPv6Address(number))
    way = chance.choice([*EMBEDDING, "plain"])
    if way == "plain":
        return str(ipaddress.IPv4Address(number))
    return str(ipaddress.IPv6Address(EMBEDDING[way](number)))


def test_no_address_that_embeds_a_private_one_is_public(rounds: Rounds) -> None:
    assert is_public(PUBLIC)
    for chance in rounds(1000, 100_000):
        address = private_address(chance)
        assert not is_public(address), address


class Network:
    """Stands in for the resolver and for connecting: what a name leads to is at random, and changes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._real = socket.getaddrinfo
        self.connected: list[str] = []
        self.answers: Callable[[], list[str]] = lambda: [PUBLIC]
        patch.setattr(socket, "getaddrinfo", self._look_up)
        patch.setattr(socket.socket, "connect", lambda made, address: self._connect(address))

    def _look_up(self, host: Any, port: Any, *_: Any, **options: Any) -> list[Any]:
        name = host.decode() if isinstance(host, bytes) else host
        try:  # octal, hex and short forms, as the C library reads them
            return self._real(name, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            addresses = self.answers()
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (one, int(port or 0), 0, 0))
            if ":" in one
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, int(port or 0)))
            for one in addresses
        ]

    def _connect(self, address: Any) -> None:
        self.connected.append(str(address[0]))
        raise ConnectionRefusedError("nobody is there")

    @property
    def private(self) -> list[str]:
        """The addresses of private networks to which somebody tried to connect."""
        return [
            one
            for one in self.connected
            if any(ipaddress.ip_address(one) in net for net in PRIVATE) or not is_public(one)
        ]


HOSTS = (
    *(
        "127.0.0.1",
        "0x7f.1",
        "0177.0.0.1",
        "2130706433",
        "127.1",
        "[::1]",
        "[::ffff:10.0.0.1]",
        "localhost",
    ),
    *("flip.example", "FLIP.example.", "①②⑦.0.0.1", "127。0。0。1", "[fe80::1%25eth0]", "0"),
    *(
        "u@flip.example",
        "flip.example:80@10.0.0.1",
        "10.0.0.1\\@flip.example",
        "flip.example#@10.0.0.1",
    ),
    *("169.254.169.254", "metadata.google.internal", "[64:ff9b::a9fe:a9fe]", "%31%32%37.0.0.1", ""),
)


def hostile_url(chance: random.Random) -> str:
    host = chance.choice(HOSTS) if chance.random() < 0.9 else f"[{private_address(chance)}]"
    port = chance.choice(("", ":80", ":8080", ":0", ":99999", ":-1", ": 80"))
    scheme = chance.choice(
        ("http://", "https://", "HTTP://", "http:/", "http:\\\\", " http://", "//")
    )
    spoiled = chance.choice(("", "", "", "\t", "\n", "\x00"))
    place = chance.randrange(len(host) + 1)
    return f"{scheme}{host[:place]}{spoiled}{host[place:]}{port}/x.safetensors"


def resolver(chance: random.Random) -> Callable[[], list[str]]:
    """Public first and private later, both at once, or private from the start."""
    private = private_address(chance)
    first, later = chance.choice(
        [([PUBLIC], [private]), ([PUBLIC, private],) * 2, ([private],) * 2, ([PUBLIC],) * 2]
    )
    answers = chain([first], repeat(later))
    return lambda: next(answers)


def test_no_hostile_url_leads_to_a_private_connection(
    rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, web = Network(monkeypatch), Web()
    monkeypatch.setattr("worker.pictures.store.PAUSES", ())
    keys = {"accessId": "i", "accessSecret": "s", "bucketName": "bucket"}
    for chance in rounds(300, 3000, share=2):
        url, network.answers = hostile_url(chance), resolver(chance)
        before = len(network.connected)
        ends = time.monotonic() + 5.0
        with (
            suppress(SourceInvalid, requests.RequestException),
            web.open(url, stall=1.0, deadline=ends),
        ):
            pytest.fail("nobody is there")
        if chance.random() < 0.05:  # the other client: a bucket that a request names
            with suppress(InvalidInput, UploadFailed):
                bucket = requested_bucket({"s3Config": {**keys, "endpointUrl": url}}, web)
                assert bucket is not None
                bucket.store("picture.png", b"x", "image/png")
        rounds.seen["public connections"] += len(network.connected) - before
        rounds.seen["private connections"] = len(network.private)
        assert not network.private, url
    assert network.connected
