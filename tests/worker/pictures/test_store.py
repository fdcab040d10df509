"""Uploads to a store that is slow, wrong, busy or elsewhere; the sentences name what is in the way."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import requests

from tests.worker.pictures.stores import Store, serving
from worker.pictures.endpoints import place_of
from worker.pictures.store import GIVE_UP, S3_CONFIG, SETTINGS, Bucket, Names, UploadFailed

PICTURE = ("job/0.png", b"picture", "image/png")


def bucket_at(endpoint: str, name: str = "b-1", names: Names = SETTINGS, **options: str) -> Bucket:
    return Bucket(place_of(endpoint, name, **options), "canary-id", "canary-secret", names)


@contextmanager
def aws(monkeypatch: pytest.MonkeyPatch, store: Store) -> Iterator[Store]:
    with serving(store, monkeypatch):
        for name in store.regions:
            store.make(name)
        yield store


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made; none of them takes any time."""
    made: list[float] = []
    monkeypatch.setattr("worker.pictures.store.time.sleep", made.append)
    return made


@pytest.mark.parametrize(
    ("endpoint", "host"),
    [
        ("http://s3.amazonaws.com", "b-1.s3.us-west-2.amazonaws.com"),
        ("http://b-1.s3.amazonaws.com", "b-1.s3.us-west-2.amazonaws.com"),
        ("http://s3.eu-west-1.amazonaws.com", "b-1.s3.us-west-2.amazonaws.com"),
        ("http://s3-accelerate.amazonaws.com", "b-1.s3-accelerate.amazonaws.com"),
        ("http://minio.lan", "minio.lan"),
    ],
)
def test_a_store_that_says_its_region_is_believed(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, host: str
) -> None:
    with aws(monkeypatch, Store({"b-1": "us-west-2"})) as store:
        bucket = bucket_at(endpoint)
        url = bucket.store(*PICTURE)
        assert url.startswith(f"http://{host}/")
        assert requests.get(url, timeout=60).content == b"picture"
        store.asked.clear()
        bucket.store(*PICTURE)
        assert {region for *_, region in store.asked} == {"us-west-2"}, "it is remembered"


def test_a_store_that_does_not_say_its_region_is_told_by_its_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with aws(monkeypatch, Store({"b-1": "us-west-2"}, tells_region=False)) as store:
        with pytest.raises(UploadFailed) as caught:
            bucket_at("http://minio.lan").store(*PICTURE)
        assert "the store says AuthorizationHeaderMalformed (HTTP 400)" in str(caught.value)
        assert bucket_at("http://minio.lan", region="us-west-2").store(*PICTURE)
        assert store.asked[-1][3] == "us-west-2"


@pytest.mark.parametrize(
    ("status", "code", "said", "settings", "s3_config"),
    [
        (403, "InvalidAccessKeyId", "does not know the access key id", "ACCESS_KEY_ID", "accessId"),
        (403, "SignatureDoesNotMatch", "secret access key does not fit", "SECRET", "accessSecret"),
        (403, "AccessDenied", "may not write there", "BUCKET_NAME", "s3Config.bucketName"),
        (404, "NoSuchBucket", "there is no bucket 'b-1'", "BUCKET_NAME", "s3Config.bucketName"),
        (400, "EntityTooLarge", "says EntityTooLarge (HTTP 400)", "the bucket", "the bucket"),
        (400, "canary canary", "says HTTP 400", "the bucket", "the bucket"),
    ],
)  # fmt: skip
def test_errors_name_their_cause_and_the_field_that_was_used(
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    said: str,
    settings: str,
    s3_config: str,
) -> None:
    for names, look in ((SETTINGS, settings), (S3_CONFIG, s3_config)):
        store = Store({"b-1": "us-east-1"}, before=[(status, code)])
        with aws(monkeypatch, store), pytest.raises(UploadFailed) as caught:
            bucket_at("http://minio.lan", names=names).store(*PICTURE)
        assert said in str(caught.value)
        assert look in caught.value.hint
        assert "canary" not in str(caught.value)


def test_a_url_that_does_not_open_is_not_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with aws(monkeypatch, Store({"b-1": "us-east-1"})) as store:
        bucket = bucket_at("http://minio.lan")
        put = bucket.client.put_object

        def and_then_refuse(**given: object) -> None:
            put(**given)
            store.before.append((403, "AccessDenied"))

        monkeypatch.setattr(bucket.client, "put_object", and_then_refuse)
        with pytest.raises(UploadFailed) as caught:
            bucket.store(*PICTURE)
        assert "cannot be read: the access key may not read what it stored" in str(caught.value)


@pytest.mark.parametrize("code", ["SlowDown", "ServiceUnavailable"])
def test_a_busy_store_is_asked_again_and_told(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float], code: str
) -> None:
    with aws(monkeypatch, Store({"b-1": "us-east-1"}, before=[(503, code)] * 2)) as store:
        bucket = bucket_at("http://minio.lan")
        assert bucket.store(*PICTURE)
        assert len(pauses) == 2
        store.before += [(503, code)] * 9
        with pytest.raises(UploadFailed) as caught:
            bucket.store(*PICTURE)
        assert f"the store is busy ({code} (HTTP 503))" in str(caught.value)
        assert caught.value.hint == "Try again later."
        assert len(store.before) == 4, "five tries"


def test_a_silent_store_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own limits, added up, are within the time; they are shortened here."""
    config = bucket_at("http://minio.lan").client.meta.config  # type: ignore[attr-defined]
    assert config.connect_timeout + config.read_timeout <= GIVE_UP == 30
    assert config.retries["total_max_attempts"] == 1
    monkeypatch.setattr("worker.pictures.store.GIVE_UP", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UploadFailed) as caught:
        bucket_at(f"http://127.0.0.1:{silent.getsockname()[1]}").store(*PICTURE)
    assert "the store did not answer within" in str(caught.value)
    assert caught.value.hint == "Check BUCKET_ENDPOINT_URL."


def test_a_store_that_cannot_be_reached_is_told_without_its_address() -> None:
    with pytest.raises(UploadFailed) as caught:
        bucket_at("http://127.0.0.1:9", names=S3_CONFIG).store(*PICTURE)
    assert "the store cannot be reached" in str(caught.value)
    assert caught.value.hint == "Check s3Config.endpointUrl."
    assert "127.0.0.1" not in str(caught.value)
