"""A request's own bucket is asked at an address that was checked, whatever its host's name says next."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lora.fetch.rules import WebRules
from lora.fetch.web import Web
from tests.server import LoopbackServer
from worker.pictures.endpoints import Place
from worker.pictures.outputs import requested_bucket
from worker.pictures.store import S3_CONFIG, Bucket, UploadFailed

PUBLIC, PRIVATE = "93.184.216.34", "127.0.0.1"

KEYS = {"accessId": "id", "accessSecret": "secret", "bucketName": "pictures"}


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lets every name have these addresses, one after the other; returns the hosts that were looked up."""

    def use(*addresses: str) -> list[str]:
        left, asked = list(addresses), list[str]()

        def look_up(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
            asked.append(host)
            address = left.pop(0) if len(left) > 1 else left[0]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(port)))]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        return asked

    return use


def test_a_name_that_changes_its_address_after_the_check_is_not_followed(
    server: LoopbackServer, resolve: Callable[..., list[str]]
) -> None:
    server.serve_bucket("pictures")
    given = {**KEYS, "endpointUrl": f"http://flip.example:{server.port}"}
    asked = resolve(PUBLIC, PRIVATE)
    bucket = requested_bucket({"s3Config": given}, Web())
    assert bucket is not None
    with pytest.raises(UploadFailed) as caught:
        bucket.store("x.png", b"secret picture", "image/png")
    assert "may not be asked" in str(caught.value)
    assert "s3Config.endpointUrl" in str(caught.value)
    assert server.connections == 0
    assert len(asked) == 2


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_no_proxy_of_the_environment_gets_a_strangers_keys(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with LoopbackServer() as proxy:
        monkeypatch.setenv(variable, proxy.address)
        endpoint = server.serve_bucket("pictures")
        place = Place(endpoint, "pictures", "us-east-1", virtual=False)
        bucket = Bucket(place, "id", "secret", S3_CONFIG, WebRules(allow_private=True))
        bucket.client.put_object(Bucket="pictures", Key="x", Body=b"x")
        assert proxy.connections == 0
    assert server.stored == {"/pictures/x": b"x"}


@pytest.mark.parametrize("body", [b"", b"x", b"x" * 3_000_000], ids=len)
def test_pictures_of_any_size_arrive(server: LoopbackServer, body: bytes) -> None:
    endpoint = server.serve_bucket("pictures")
    place = Place(endpoint, "pictures", "us-east-1", virtual=False)
    bucket = Bucket(place, "id", "secret", S3_CONFIG, WebRules(allow_private=True))
    bucket.client.put_object(Bucket="pictures", Key="x", Body=body)
    assert server.stored == {"/pictures/x": body}


@pytest.fixture(params=[301, 307, 308])
def moved(request: pytest.FixtureRequest, server: LoopbackServer) -> Iterator[LoopbackServer]:
    with LoopbackServer() as inside:
        headers = {"Location": inside.url("/x"), "x-amz-bucket-region": "us-west-2"}
        server.serve("/pictures/x.png", status=request.param, headers=headers)
        yield inside


def test_a_store_cannot_send_us_elsewhere(server: LoopbackServer, moved: LoopbackServer) -> None:
    rules = WebRules(own=frozenset({server.address}))
    place = Place(server.address, "pictures", "us-east-1", virtual=False)
    with pytest.raises(UploadFailed):
        Bucket(place, "id", "secret", S3_CONFIG, rules).store("x.png", b"x", "image/png")
    assert moved.connections == 0
