"""Pictures -> what the answer carries: data URIs, or URLs where a bucket is set."""

from __future__ import annotations

import base64
import io
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora.errors import CodedError
from settings import Settings


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


def encode(picture: Image.Image, file_format: str, quality: int, parameters: str) -> Encoded:
    """The picture as png (with the generation parameters as text), jpeg or webp."""
    buffer = io.BytesIO()
    if file_format == "png":
        text = PngInfo()
        text.add_text("parameters", parameters)
        picture.save(buffer, "PNG", pnginfo=text)
    else:
        picture.save(buffer, file_format.upper(), quality=quality)
    return Encoded(buffer.getvalue(), f"image/{file_format}")


def parameters_text(values: Mapping[str, Any], loras: Sequence[tuple[str, float, str]]) -> str:
    """The generation parameters in the form that the common web UIs write and read.

    Three lines: the prompt with `<lora:name:scale>` tags, the negative prompt, and `Key: value` pairs.
    `loras` are (name, scale, sha256).
    """
    tags = "".join(f" <lora:{name}:{scale:g}>" for name, scale, _ in loras)
    lines = [f"{values['prompt']}{tags}"]
    if values["negative_prompt"]:
        lines.append(f"Negative prompt: {values['negative_prompt']}")
    pairs = {
        "Steps": values["steps"],
        "Sampler": values["scheduler"],
        "CFG scale": f"{values['guidance_scale']:g}",
        "Seed": values["seed"],
        "Size": values["size"],
        "Model": values["model"],
    }
    if loras:
        hashes = ", ".join(f"{name}: {sha256[:12]}" for name, _, sha256 in loras)
        pairs["Lora hashes"] = json.dumps(hashes)
    lines.append(", ".join(f"{key}: {value}" for key, value in pairs.items()))
    return "\n".join(lines)


class Bucket(Protocol):
    """The two calls of boto3's S3 client that are used."""

    def put_object(self, **arguments: Any) -> Any:
        """Stores one object."""

    def generate_presigned_url(self, operation: str, **arguments: Any) -> str:
        """A URL under which the object can be fetched for a while."""


def open_bucket(settings: Settings) -> Bucket | None:
    """The S3 client that the settings name, or None if they name none."""
    if not settings.bucket_endpoint_url:
        return None
    import boto3
    from botocore.config import Config
    from runpod.serverless.utils.rp_upload import extract_region_from_url

    # boto3's new default checksums are refused by some S3-compatible stores.
    config = Config(
        signature_version="s3v4",
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client: Bucket = boto3.client(
        "s3",
        endpoint_url=settings.bucket_endpoint_url,
        aws_access_key_id=settings.bucket_access_key_id,
        aws_secret_access_key=settings.bucket_secret_access_key,
        region_name=extract_region_from_url(settings.bucket_endpoint_url) or None,
        config=config,
    )
    return client


def deliver(
    pictures: Sequence[Encoded], job_id: str, bucket: Bucket | None, bucket_name: str
) -> list[str]:
    """Where the answer's reader finds each picture: a data URI, or a URL good for a week.

    An empty bucket name is the month's (`11-26`), as the SDK's own upload has it. Raises: UploadFailed.
    """
    if bucket is None:
        return [picture.data_uri for picture in pictures]
    from botocore.exceptions import BotoCoreError, ClientError

    urls = []
    bucket_name = bucket_name or time.strftime("%m-%y")
    for index, picture in enumerate(pictures):
        ending = picture.media_type.removeprefix("image/")
        name = {"Bucket": bucket_name, "Key": f"{job_id}/{index}-{uuid.uuid4().hex[:8]}.{ending}"}
        try:
            bucket.put_object(**name, Body=picture.data, ContentType=picture.media_type)
            urls.append(
                bucket.generate_presigned_url("get_object", Params=name, ExpiresIn=7 * 86_400)
            )
        except (BotoCoreError, ClientError) as error:
            raise UploadFailed(
                f"the bucket did not take the picture ({type(error).__name__})",
                "Check the BUCKET_* settings.",
            ) from error
    return urls


def guard_size(answer: Mapping[str, Any], limit_mb: float) -> None:
    """Raises OutputTooLarge if the answer as JSON is over the limit; the platform would lose it."""
    size = len(json.dumps(answer, allow_nan=False).encode())
    if size > limit_mb * 1e6:
        raise OutputTooLarge(
            f"the answer has {size / 1e6:.1f} MB, over the limit of {limit_mb:g} MB",
            "Ask for jpeg or webp, fewer or smaller pictures, or set a bucket.",
        )
