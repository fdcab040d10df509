import base64
import io
import json
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
from moto.server import ThreadedMotoServer
from PIL import Image

from lora.fetch.web import Web
from settings import Settings
from tests.server import LOOPBACK
from validation import InvalidInput
from worker.pictures.outputs import (
    Encoded,
    OutputTooLarge,
    deliver,
    encode,
    guard_size,
    open_bucket,
    requested_bucket,
    sendable,
)
from worker.pictures.store import UploadFailed


def test_png_is_lossless_and_carries_the_text() -> None:
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    encoded = encode(picture, "png", 95, "a cat\nSteps: 20")
    again = Image.open(io.BytesIO(encoded.data))
    np.testing.assert_array_equal(np.asarray(again), np.asarray(picture))
    assert again.text["parameters"] == "a cat\nSteps: 20"  # type: ignore[attr-defined]
    head, body = encoded.data_uri.split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(body) == encoded.data


def test_quality_makes_smaller_files() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    for kind in ("jpeg", "webp"):
        low, high = (encode(picture, kind, quality, "") for quality in (10, 95))
        assert len(low.data) < len(high.data)
        assert low.media_type == f"image/{kind}"


def test_no_bucket_without_an_endpoint() -> None:
    assert open_bucket(Settings()) is None
    settings = Settings(
        bucket_endpoint_url="http://127.0.0.1:9",
        bucket_access_key_id="a",
        bucket_secret_access_key="b",
    )
    assert open_bucket(settings) is not None


def test_the_size_guard_counts_the_json() -> None:
    answer = {"images": ["x" * 2_000_000]}
    guard_size(answer, 2.1)
    with pytest.raises(OutputTooLarge) as caught:
        guard_size(answer, 1.5)
    assert "2.0 MB, over the limit of 1.5 MB" in str(caught.value)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server that speaks S3."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


def test_with_a_bucket_the_answer_holds_urls_that_open(s3: str) -> None:
    bucket = open_bucket(
        Settings(
            bucket_endpoint_url=s3,
            bucket_name="pictures",
            bucket_access_key_id="id",
            bucket_secret_access_key="canary",
            bucket_prefix="/year/2026/",
        )
    )
    assert bucket is not None
    bucket.client.create_bucket(Bucket="pictures")  # type: ignore[attr-defined]
    pictures = [Encoded(b"1", "image/png"), Encoded(b"2", "image/webp")]
    urls = deliver(pictures, "job-1", bucket)
    assert len(set(urls)) == 2
    for url, picture in zip(urls, pictures, strict=True):
        assert "/pictures/year/2026/job-1/" in url
        assert "canary" not in url
        fetched = requests.get(url, timeout=60)
        assert fetched.content == picture.data
        assert fetched.headers["Content-Type"] == picture.media_type


def test_a_request_brings_its_own_bucket(s3: str) -> None:
    given = {"endpointUrl": s3, "accessId": "id", "accessSecret": "canary", "bucketName": "mine"}
    bucket = requested_bucket({"id": "j", "s3Config": given}, LOOPBACK)
    assert bucket is not None
    bucket.client.create_bucket(Bucket="mine")  # type: ignore[attr-defined]
    (url,) = deliver([Encoded(b"picture", "image/webp")], "job-1", bucket)
    assert "/mine/job-1/" in url
    assert requests.get(url, timeout=60).content == b"picture"
    options = {"region": "eu-west-1", "prefix": "p", "addressing": "path", "bucketName": "gone"}
    other = requested_bucket({"s3Config": {**given, **options}}, LOOPBACK)
    assert other is not None
    assert (other.place.region, other.place.prefix) == ("eu-west-1", "p/")
    with pytest.raises(UploadFailed) as caught:
        deliver([Encoded(b"1", "image/png")], "job-1", other)
    assert "there is no bucket 'gone'. Check s3Config.bucketName." in str(caught.value)


def test_a_requests_bucket_is_whole_and_on_a_host_that_may_be_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = {"endpointUrl": "http://127.0.0.1:9", "accessId": "a", "accessSecret": "canary"}
    named = {**whole, "bucketName": "b-1"}
    assert requested_bucket({}, LOOPBACK) is None
    assert requested_bucket({"s3Config": {}}, LOOPBACK) is None
    cases: list[tuple[object, str]] = [
        (whole, "lacks one of"),
        ({**whole, "bucketName": ""}, "lacks one of"),
        ({**named, "accessSecret": None}, "lacks one of"),
        ("canary", "lacks one of"),
        ({**whole, "bucketName": 5}, "s3Config.bucketName is not a text"),
        ({**named, "canary": "canary"}, "has a field that is none of"),
        ({**named, "bucketName": "canary@h/"}, "is no bucket's name"),
        ({**named, "region": "canary canary"}, "is no region's name"),
        ({**named, "addressing": "canary"}, "addressing is none of auto, path, virtual"),
        (named, "is not on the open internet"),
        ({**named, "endpointUrl": "ftp://canary/"}, "does not begin with https://"),
        ({**named, "endpointUrl": "https://c-1.s3.eu-west-1.amazonaws.com"}, "the bucket 'c-1'"),
    ]
    for given, said in cases:
        with pytest.raises(InvalidInput) as caught:
            requested_bucket({"s3Config": given}, Web())
        assert said in str(caught.value)
        assert "canary" not in str(caught.value)


def test_the_host_that_is_asked_is_the_one_that_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bucket in the host's name, that name counts."""
    asked: list[str] = []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        address = "10.0.0.1" if host.startswith("b-1.") else "93.184.216.34"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    given = {"endpointUrl": "https://evil.example", "accessId": "a", "accessSecret": "s"}
    given |= {"bucketName": "b-1", "addressing": "virtual"}
    with pytest.raises(InvalidInput) as caught:
        requested_bucket({"s3Config": given}, Web())
    assert "b-1.evil.example is not on the open internet" in str(caught.value)
    assert requested_bucket({"s3Config": {**given, "addressing": "path"}}, Web()) is not None
    assert asked == ["b-1.evil.example", "evil.example"]


def test_what_is_sendable_is_strict_json_and_nothing_else() -> None:
    value = {"a": (1, 2.5, None, True), "half \ud83d": "whole \U0001f600", "b": ["\udc00"]}
    sent = sendable(value)
    assert sent == {"a": [1, 2.5, None, True], "half \ufffd": "whole \U0001f600", "b": ["\ufffd"]}
    assert json.loads(json.dumps(sent, allow_nan=False, ensure_ascii=False).encode()) == sent
    for worst in (float("nan"), b"x", {1, 2}, {1: 2}, object(), [float("inf")]):
        with pytest.raises((TypeError, ValueError)):
            sendable({"x": worst})
