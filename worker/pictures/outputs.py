"""Turns pictures into what the answer holds: data URIs, or URLs if there is a bucket."""

from __future__ import annotations

import base64
import io
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora.errors import CodedError, SourceInvalid
from lora.fetch.web import Web
from settings import Settings
from validation import InvalidInput
from worker.pictures.embedded import JPEG_LIMIT, PNG_KEY, exif_of
from worker.pictures.endpoints import ADDRESSING, Place, check_names, place_of
from worker.pictures.store import S3_CONFIG, Bucket


class OutputTooLarge(CodedError):
    """The answer is larger than the platform carries."""

    code = "OUTPUT_TOO_LARGE"


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


def open_bucket(settings: Settings) -> Bucket | None:
    """The bucket that the settings name, or None if they name none. Raises: ValueError, as `place_of`."""
    if not settings.bucket_endpoint_url:
        return None
    place = place_of(
        settings.bucket_endpoint_url,
        settings.bucket_name,
        region=settings.bucket_region,
        prefix=settings.bucket_prefix,
        addressing=settings.bucket_addressing,
    )
    return Bucket(place, settings.bucket_access_key_id, settings.bucket_secret_access_key)


S3_FIELDS = ("endpointUrl", "accessId", "accessSecret", "bucketName")
S3_OPTIONS = ("region", "prefix", "addressing")
"""They mean what the settings BUCKET_REGION, BUCKET_PREFIX and BUCKET_ADDRESSING do."""


def requested_bucket(job: Mapping[str, Any], web: Web) -> Bucket | None:
    """The bucket that a job names as `s3Config`, beside its input; None if it names none.

    `bucketName` may be left out where the endpoint names the bucket. Raises: InvalidInput if a field is
    missing, unknown or wrong, or the rules forbid the host.
    """
    config = job.get("s3Config")
    if not config:
        return None
    values = config if isinstance(config, Mapping) else {}
    given = {str(name): value for name, value in values.items() if value not in (None, "")}
    if set(given) - {*S3_FIELDS, *S3_OPTIONS}:
        known = ", ".join((*S3_FIELDS, *S3_OPTIONS))
        raise InvalidInput(f"s3Config has a field that is none of {known}")
    if wrong := [name for name, value in given.items() if not isinstance(value, str)]:
        raise InvalidInput(f"s3Config.{wrong[0]} is not a text")
    place = _asked_for(given) if "endpointUrl" in given else None
    if not place or not place.bucket or not {"accessId", "accessSecret"} <= set(given):
        raise InvalidInput(f"s3Config lacks one of {', '.join(S3_FIELDS)}")
    try:
        web.check(place.asked)
    except SourceInvalid as error:
        raise InvalidInput(f"s3Config.endpointUrl: {error.sentence}", error.hint) from error
    return Bucket(place, given["accessId"], given["accessSecret"], S3_CONFIG, web.rules)


def _asked_for(given: Mapping[str, str]) -> Place:
    """The place that a job names. Raises: InvalidInput."""
    name, options = (
        given.get("bucketName", ""),
        {key: given[key] for key in S3_OPTIONS if key in given},
    )
    if options.get("addressing", "auto") not in ADDRESSING:
        raise InvalidInput(f"s3Config.addressing is none of {', '.join(ADDRESSING)}")
    try:
        check_names(name, options.get("region", ""))
    except ValueError as error:
        raise InvalidInput(f"s3Config: {error}") from None
    try:
        return place_of(given["endpointUrl"], name, **options)
    except ValueError as error:
        raise InvalidInput(f"s3Config.endpointUrl: {error}") from None


def deliver(pictures: Sequence[Encoded], job_id: str, bucket: Bucket | None) -> list[str]:
    """Each picture's data URI, or if there is a bucket its URL there, which is valid for a week.

    Raises: UploadFailed.
    """
    if bucket is None:
        return [picture.data_uri for picture in pictures]
    urls = []
    for index, picture in enumerate(pictures):
        ending = picture.media_type.removeprefix("image/")
        name = f"{job_id}/{index}-{uuid.uuid4().hex[:8]}.{ending}"
        urls.append(bucket.store(name, picture.data, picture.media_type))
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
        text = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return value if text == value else text
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
