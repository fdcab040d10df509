"""Turns pictures into what the answer holds: data URIs, or URLs if there is a bucket."""

from __future__ import annotations

import base64
import io
import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora.errors import CodedError, SourceInvalid
from lora.fetch.web import Web
from settings import Settings
from validation import InvalidInput
from worker.embedded import JPEG_LIMIT, PNG_KEY, exif_of


class OutputTooLarge(CodedError):
    """The answer is larger than the platform carries."""

    code = "OUTPUT_TOO_LARGE"


class UploadFailed(CodedError):
    """The bucket did not take a picture."""

    code = "UPLOAD_FAILED"


@dataclass(frozen=True)
class Encoded:
    """One picture as a file."""

    data: bytes
    media_type: str

    @property
    def data_uri(self) -> str:
        """The file as a `data:` URI."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode()}"


def has_room(file_format: str, parameters: str) -> bool:
    """Whether a file of this format can hold the parameters: a JPEG has room for 64 kB."""
    return file_format != "jpeg" or len(exif_of(parameters)) <= JPEG_LIMIT


def encode(picture: Image.Image, file_format: str, quality: int, parameters: str) -> Encoded:
    """The picture as png, jpeg or webp, with the generation parameters as a text inside of it.

    It has none where there is no room for them (`has_room`).
    """
    buffer = io.BytesIO()
    if file_format == "png":
        text = PngInfo()
        text.add_text(PNG_KEY, parameters)
        picture.save(buffer, "PNG", pnginfo=text)
    else:
        room = parameters and has_room(file_format, parameters)
        exif = exif_of(parameters) if room else b""
        picture.save(buffer, file_format.upper(), quality=quality, exif=exif)
    return Encoded(buffer.getvalue(), f"image/{file_format}")


class S3Client(Protocol):
    """The two methods of boto3's S3 client that we use."""

    def put_object(self, **arguments: Any) -> Any:
        """Stores one object."""

    def generate_presigned_url(self, operation: str, **arguments: Any) -> str:
        """A URL under which the object can be fetched for a while."""


@dataclass(frozen=True)
class Bucket:
    """A bucket that pictures are uploaded to."""

    client: S3Client
    name: str
    """If empty, the bucket is named for the month (`11-26`), as in the SDK's own upload."""


def open_bucket(settings: Settings) -> Bucket | None:
    """The bucket that the settings name, or None if they name none."""
    if not settings.bucket_endpoint_url:
        return None
    client = _client(
        settings.bucket_endpoint_url,
        settings.bucket_access_key_id,
        settings.bucket_secret_access_key,
    )
    return Bucket(client, settings.bucket_name)


S3_FIELDS = ("endpointUrl", "accessId", "accessSecret", "bucketName")


def requested_bucket(job: Mapping[str, Any], web: Web) -> Bucket | None:
    """The bucket that a job names as `s3Config`, beside its input; None if it names none.

    Raises: InvalidInput if a field is missing, or the rules forbid the host.
    """
    config = job.get("s3Config")
    if not config:
        return None
    values = [config.get(name) for name in S3_FIELDS] if isinstance(config, Mapping) else []
    if not values or not all(isinstance(value, str) and value for value in values):
        raise InvalidInput(f"s3Config lacks one of {', '.join(S3_FIELDS)}")
    endpoint, key, secret, name = map(str, values)
    try:
        web.check(endpoint)
    except SourceInvalid as error:
        raise InvalidInput(f"s3Config.endpointUrl: {error.sentence}", error.hint) from error
    return Bucket(_client(endpoint, key, secret), name)


def _client(endpoint: str, key: str, secret: str) -> S3Client:
    import boto3
    from botocore.config import Config
    from runpod.serverless.utils.rp_upload import extract_region_from_url

    # Some S3-compatible stores refuse boto3's new default checksums.
    config = Config(
        signature_version="s3v4",
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client: S3Client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name=extract_region_from_url(endpoint) or None,
        config=config,
    )
    return client


def deliver(pictures: Sequence[Encoded], job_id: str, bucket: Bucket | None) -> list[str]:
    """Each picture's data URI, or if there is a bucket its URL there, which is valid for a week.

    Raises: UploadFailed.
    """
    if bucket is None:
        return [picture.data_uri for picture in pictures]
    from botocore.exceptions import BotoCoreError, ClientError

    urls = []
    bucket_name = bucket.name or time.strftime("%m-%y")
    for index, picture in enumerate(pictures):
        ending = picture.media_type.removeprefix("image/")
        name = {"Bucket": bucket_name, "Key": f"{job_id}/{index}-{uuid.uuid4().hex[:8]}.{ending}"}
        try:
            bucket.client.put_object(**name, Body=picture.data, ContentType=picture.media_type)
            urls.append(
                bucket.client.generate_presigned_url(
                    "get_object", Params=name, ExpiresIn=7 * 86_400
                )
            )
        except (BotoCoreError, ClientError) as error:
            raise UploadFailed(
                f"the bucket did not take the picture ({type(error).__name__})",
                "Check s3Config, or the BUCKET_* settings.",
            ) from error
    return urls


def sendable(value: Any) -> Any:
    """A copy of `value` that the SDK can post. Half surrogate pairs, which a file's or a client's text may
    hold, become U+FFFD; tuples become lists.

    Raises: TypeError, ValueError if strict JSON cannot express it (bytes, an object, NaN): the SDK would post
    nothing, and the job would never end.
    """
    if isinstance(value, str):
        if value.isascii():
            return value
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a finite number")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError("a name that is not text")
        return {sendable(name): sendable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [sendable(item) for item in value]
    raise TypeError(type(value).__name__)


def guard_size(answer: Mapping[str, Any], limit_mb: float) -> None:
    """Raises: OutputTooLarge if the answer as JSON is over the limit, and so the platform would lose it."""
    size = len(json.dumps(answer, allow_nan=False).encode())
    if size > limit_mb * 1e6:
        raise OutputTooLarge(
            f"the answer has {size / 1e6:.1f} MB, over the limit of {limit_mb:g} MB",
            "Ask for jpeg or webp, fewer or smaller pictures, or set a bucket.",
        )
