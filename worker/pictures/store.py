"""Stores pictures in a bucket that speaks S3, and gives URLs that open."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from lora.errors import CodedError, SourceInvalid
from lora.fetch.rules import WebRules
from lora.fetch.web import checked_pools
from worker.pictures.endpoints import Place

WEEK = 7 * 86_400
"""Seconds for which a URL is valid: the longest that a signature may be."""

GIVE_UP = 30.0
"""Seconds after which a store that does not answer is given up."""

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try, where the store says that it is busy or the connection broke."""

SILENCE, NO_CONNECTION, NO_TRUST = "silence", "no connection", "no trust"
FORBIDDEN = "forbidden"

BUSY = (408, 425, 429, 500, 502, 503, 504)

Made = TypeVar("Made")


class UploadFailed(CodedError):
    """The bucket did not take a picture."""

    code = "UPLOAD_FAILED"


class S3Client(Protocol):
    """The two methods of boto3's S3 client that we use."""

    def put_object(self, **arguments: Any) -> Any:
        """Stores one object."""

    def generate_presigned_url(self, operation: str, **arguments: Any) -> str:
        """A URL under which the object can be fetched for a while."""


class Names(NamedTuple):
    """What the person who named a bucket calls its fields."""

    endpoint: str
    key_id: str
    secret: str
    bucket: str
    region: str


SETTINGS = Names(
    "BUCKET_ENDPOINT_URL",
    "BUCKET_ACCESS_KEY_ID",
    "BUCKET_SECRET_ACCESS_KEY",
    "BUCKET_NAME",
    "BUCKET_REGION",
)
S3_CONFIG = Names(
    "s3Config.endpointUrl",
    "s3Config.accessId",
    "s3Config.accessSecret",
    "s3Config.bucketName",
    "s3Config.region",
)


class _Refused(Exception):
    """The store answered with an error, or not at all."""

    def __init__(self, cause: str, status: int = 0, region: str | None = None) -> None:
        super().__init__(cause)
        self.cause, self.status = cause, status
        self.region = region
        """The region that the store says the bucket is in."""


@dataclass
class Bucket:
    """A bucket that pictures are uploaded to. Serves all threads."""

    place: Place
    key_id: str = field(repr=False)
    secret: str = field(repr=False)
    names: Names = SETTINGS
    rules: WebRules | None = field(default=None, repr=False)
    """Where its connections may lead; None for an operator's own bucket."""
    client: S3Client = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.client = self._client()

    def store(self, name: str, data: bytes, media_type: str) -> str:
        """Stores an object under this name, and returns a URL that opened just now and is valid for a week.

        A store that says in which region its bucket is, is asked there from now on. Raises: UploadFailed.
        """
        ends = time.monotonic() + GIVE_UP
        where = {"Bucket": self.place.bucket_now, "Key": self.place.key_of(name)}
        put = {**where, "Body": data, "ContentType": media_type}
        self._in_its_region(lambda: self.client.put_object(**put), ends, reading=False)
        return self._in_its_region(lambda: self._opened(where), ends, reading=True)

    def _opened(self, where: Mapping[str, str]) -> str:
        """A URL of the object, after its first byte was read from there."""
        from botocore.awsrequest import AWSRequest

        url = self.client.generate_presigned_url("get_object", Params=where, ExpiresIn=WEEK)
        request = AWSRequest("GET", url, headers={"Range": "bytes=0-0"}).prepare()
        # The client's own connections: they know its proxies and certificates.
        answer = self.client._endpoint.http_session.send(request)  # type: ignore[attr-defined]
        if answer.status_code not in (200, 206):
            raise _refusal_of(answer.status_code, answer.headers, answer.text)
        return url

    def _in_its_region(self, work: Callable[[], Made], ends: float, *, reading: bool) -> Made:
        """Does the work, once more in the region that the store tells. Raises: UploadFailed."""
        try:
            try:
                return _patiently(work, ends)
            except _Refused as refused:
                if refused.region in (None, self.place.region):
                    raise
                self.place = self.place.in_region(str(refused.region))
                self.client = self._client()
                return _patiently(work, ends)
        except _Refused as refused:
            raise self._failed(refused, reading=reading) from None

    def _failed(self, refused: _Refused, *, reading: bool) -> UploadFailed:
        what = "the stored picture cannot be read" if reading else "the picture could not be stored"
        if refused.status in BUSY:
            return UploadFailed(f"{what}: the store is busy ({refused.cause})", "Try again later.")
        words = _words(self.names, self.place.bucket_now, reading=reading)
        said, look = words.get(
            refused.cause, (f"the store says {refused.cause}", "the bucket and its keys")
        )
        if refused.region:
            said, look = f"the bucket is in the region {refused.region}", self.names.region
        return UploadFailed(f"{what}: {said}", f"Check {look}.")

    def _client(self) -> S3Client:
        from boto3.session import Session
        from botocore.config import Config

        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "virtual" if self.place.virtual else "path"},
            # Some S3-compatible stores refuse boto3's newer checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            connect_timeout=GIVE_UP / 3,
            read_timeout=GIVE_UP / 2,
            retries={"total_max_attempts": 1},
            proxies={} if self.rules else None,  # those of the environment go around the rules
        )
        client: S3Client = Session().client(
            "s3",
            endpoint_url=self.place.endpoint,
            region_name=self.place.region,
            aws_access_key_id=self.key_id,
            aws_secret_access_key=self.secret,
            config=config,
        )
        if self.rules:
            # Each connection goes to an address that was checked, whatever the host's name says next.
            manager = client._endpoint.http_session._manager  # type: ignore[attr-defined]
            manager.pool_classes_by_scheme = checked_pools(self.rules)
        return client


def _words(names: Names, bucket: str, *, reading: bool) -> dict[str, tuple[str, str]]:
    """A store's code -> what it means, and where to look."""
    may = "read what it stored" if reading else "write there"
    signature = "the secret access key does not fit the access key id", names.secret
    return {
        "InvalidAccessKeyId": ("the store does not know the access key id", names.key_id),
        "SignatureDoesNotMatch": signature,
        "AccessDenied": (f"the access key may not {may}", f"its rights, and {names.bucket}"),
        "NoSuchBucket": (f"there is no bucket {bucket!r}", names.bucket),
        "InvalidBucketName": (f"{bucket!r} is no bucket's name", names.bucket),
        "ParamValidation": (f"{bucket!r} is no bucket's name", names.bucket),
        "RequestTimeTooSkewed": ("this machine's clock is wrong", "the clock"),
        SILENCE: (f"the store did not answer within {GIVE_UP:.0f} s", names.endpoint),
        NO_CONNECTION: ("the store cannot be reached", names.endpoint),
        FORBIDDEN: ("its host leads to an address that may not be asked", names.endpoint),
        NO_TRUST: ("the store's certificate is not trusted", names.endpoint),
    }


def _patiently(work: Callable[[], Made], ends: float) -> Made:
    """Does the work, again if the store is busy. A silent store is not asked twice. Raises: _Refused."""
    for pause in (*PAUSES, None):
        try:
            return _translated(work)
        except _Refused as refused:
            passes = refused.status in BUSY or refused.cause == NO_CONNECTION
            if not passes or pause is None or time.monotonic() + pause > ends - GIVE_UP / 2:
                raise
            time.sleep(pause)
    raise AssertionError("unreachable")


def _translated(work: Callable[[], Made]) -> Made:
    """Does the work. Raises: _Refused in place of botocore's errors, whose text may hold the URL."""
    from botocore import exceptions as their

    try:
        return work()
    except their.ClientError as error:
        told = error.response.get("ResponseMetadata", {})
        about = error.response.get("Error", {})
        status, headers = told.get("HTTPStatusCode", 0), told.get("HTTPHeaders", {})
        raise _refusal(status, headers, about.get("Code", ""), about.get("Region", "")) from None
    except (their.ReadTimeoutError, their.ConnectTimeoutError):
        raise _Refused(SILENCE) from None
    except their.SSLError:
        raise _Refused(NO_TRUST) from None
    except their.ParamValidationError:
        raise _Refused("ParamValidation") from None
    except (their.HTTPClientError, their.ConnectionError) as error:
        forbidden = isinstance(error.kwargs.get("error"), SourceInvalid)
        raise _Refused(FORBIDDEN if forbidden else NO_CONNECTION) from None
    except their.BotoCoreError as error:
        raise _Refused(type(error).__name__) from None


def _refusal_of(status: int, headers: Mapping[str, str], text: str) -> _Refused:
    """An answer with an error, as S3 writes it in XML."""
    code, region = (
        found[1] if (found := re.search(rf"<{tag}>([^<]*)</{tag}>", text)) else ""
        for tag in ("Code", "Region")
    )
    return _refusal(status, headers, code, region)


def _refusal(status: int, headers: Mapping[str, str], code: str, region: str) -> _Refused:
    """Only words that look like a code and a region are repeated."""
    region = region or headers.get("x-amz-bucket-region", "")
    known = code if re.fullmatch(r"[A-Za-z]{1,60}", code, re.ASCII) else ""
    about_regions = status in (301, 307, 400) and re.fullmatch(r"[a-z0-9-]{1,40}", region, re.ASCII)
    with_status = f"{known} (HTTP {status})" if known else f"HTTP {status}"
    cause = known if known in _words(SETTINGS, "", reading=False) else with_status
    return _Refused(cause, status, region if about_regions else None)
