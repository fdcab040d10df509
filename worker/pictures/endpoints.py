"""Which bucket, region and addresses an S3 endpoint means, in the forms in which stores write endpoints.

The region stands in the signature, so a wrong one makes every URL of a picture useless.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

MONTH = "%m-%y"
"""How the SDK's own upload names its buckets: `11-26`."""

ADDRESSING = ("auto", "path", "virtual")

DEFAULT_REGION = "us-east-1"
"""What a store of unknown name most likely takes: MinIO does, and most that name no region of their own."""

_BUCKET = r"(?:(?P<bucket>[a-z0-9][a-z0-9._-]*)\.)?"
_AWS = r"(?P<region>[a-z]{2,4}(?:-[a-z]+)+-\d)"
_ANY = r"(?P<region>[a-z]+[a-z0-9-]*)"


class Store(NamedTuple):
    """How one store writes its hosts."""

    host: str
    """A pattern of the whole host name; its groups are `bucket` and `region`, where they stand in it."""
    region: str = DEFAULT_REGION
    """The region where the host names none."""
    virtual: bool = False
    """Whether the bucket goes into the host, where the endpoint does not show it."""


STORES: tuple[Store, ...] = (
    # AWS: docs.aws.amazon.com/AmazonS3/latest/userguide/VirtualHosting.html and general/latest/gr/s3.html
    Store(
        rf"{_BUCKET}s3(?:-accesspoint)?(?:-fips)?(?:\.dualstack)?[.-]{_AWS}\.amazonaws\.(?:com(?:\.cn)?|eu)",
        virtual=True,
    ),
    Store(rf"{_BUCKET}s3(?:-external-1)?\.amazonaws\.com", virtual=True),
    Store(rf"{_BUCKET}s3-accelerate(?:\.dualstack)?\.amazonaws\.com", virtual=True),
    Store(rf"{_BUCKET}bucket\.vpce-[a-z0-9-]+\.s3\.{_AWS}\.vpce\.amazonaws\.com"),
    # Cloudflare R2: developers.cloudflare.com/r2/api/s3/api, with jurisdictions
    Store(
        rf"{_BUCKET}(?!(?:eu|fedramp)\.)[a-z0-9-]+(?:\.(?:eu|fedramp))?\.r2\.cloudflarestorage\.com",
        "auto",
    ),
    # Backblaze B2: backblaze.com/docs/cloud-storage-call-the-s3-compatible-api
    Store(rf"{_BUCKET}s3\.{_ANY}\.backblazeb2\.com"),
    # Google: cloud.google.com/storage/docs/request-endpoints; any region is taken
    Store(rf"{_BUCKET}storage\.(?P<region>[a-z]+-[a-z]+\d)\.rep\.googleapis\.com"),
    Store(rf"{_BUCKET}(?:storage|commondatastorage)(?:\.mtls)?\.googleapis\.com", "auto"),
    # DigitalOcean: docs.digitalocean.com/products/spaces/reference/s3-sdk-examples
    Store(rf"{_BUCKET}(?P<region>[a-z]{{3}}\d)\.digitaloceanspaces\.com"),
    # Others that name the region in the host
    Store(
        rf"{_BUCKET}s3\.{_ANY}\.(?:wasabisys\.com|scw\.cloud|(?:io|perf)\.cloud\.ovh\.(?:net|us|ca)"
        r"|cloud-object-storage\.appdomain\.cloud)"
    ),
    Store(rf"{_BUCKET}{_ANY}\.(?:your-objectstorage|linodeobjects|vultrobjects)\.com"),
    Store(rf"{_BUCKET}sos-{_ANY}\.exo\.io"),
    Store(rf"{_BUCKET}s3api-{_ANY}\.runpod\.io"),
    Store(rf"{_BUCKET}(?:s3\.)?oss-{_ANY}\.aliyuncs\.com", virtual=True),
    Store(rf"{_BUCKET}cos\.{_ANY}\.myqcloud\.com", virtual=True),
    Store(rf"{_BUCKET}s3\.wasabisys\.com"),
)
"""The first that fits counts."""

_LOOKS_LIKE_A_REGION = re.compile(r"(?:.+\.)?s3[.-]([a-z]+-[a-z0-9-]*\d)\..+\..+")
"""A store that is not among STORES."""

NO_STORE = {
    r".+\.cdn\.digitaloceanspaces\.com": "a CDN's host, which takes no uploads: leave `cdn.` out",
    r"(?:.+\.)?s3-website[.-].*\.amazonaws\.com": "the host of a website, which takes no uploads",
    r".+\.r2\.dev": "R2's host for readers; ACCOUNT.r2.cloudflarestorage.com takes uploads",
    r"f\d{3}\.backblazeb2\.com": "B2's host for readers; s3.REGION.backblazeb2.com takes uploads",
    r"storage\.cloud\.google\.com": "Google's page for people; storage.googleapis.com takes uploads",
}
"""Hosts that a store's pages show, and that are no S3 endpoint."""


@dataclass(frozen=True)
class Place:
    """Where pictures go."""

    endpoint: str
    """The store's URL, without the bucket."""
    bucket: str
    """Empty for the month's, as the SDK names it."""
    region: str
    virtual: bool
    """Whether the bucket stands in the host, else in the path."""
    prefix: str = ""
    """What each key begins with; empty, or with a slash at its end."""
    by_month: bool = False
    """Whether each key begins with the month, after the prefix."""

    @property
    def asked(self) -> str:
        """The URL of the host that uploads and readers ask."""
        if not self.virtual:
            return self.endpoint
        scheme, _, rest = self.endpoint.partition("://")
        return f"{scheme}://{self.bucket_now}.{rest}"

    @property
    def bucket_now(self) -> str:
        """The bucket's name; this month's if it has none of its own."""
        return self.bucket or time.strftime(MONTH)

    def key_of(self, name: str) -> str:
        """The key of an object that is called so."""
        month = time.strftime(f"{MONTH}/") if self.by_month else ""
        return f"{self.prefix}{month}{name}"

    def in_region(self, region: str) -> Place:
        """The same bucket in another region; AWS's endpoint for it is then that region's own."""
        host = urlsplit(self.endpoint).hostname or ""
        endpoint = self.endpoint
        if re.fullmatch(rf"s3(?:-external-1|[.-]{_AWS})?\.amazonaws\.com", host):
            endpoint = endpoint.replace(host, f"s3.{region}.amazonaws.com", 1)
        return replace(self, endpoint=endpoint, region=region)


def place_of(
    url: str, bucket: str = "", *, region: str = "", prefix: str = "", addressing: str = "auto"
) -> Place:
    """The place that an endpoint's URL means; what is empty is told from the URL.

    A bucket that stands in the URL counts; without a `bucket` beside it, keys begin with the month, as in
    the SDK's own upload. Raises: ValueError, whose text repeats nothing but the bucket's names.
    """
    parts = _split(url)
    host, path = parts.hostname or "", unquote(parts.path).strip("/")
    if fault := next((why for form, why in NO_STORE.items() if re.fullmatch(form, host)), None):
        raise ValueError(f"it is {fault}")
    store, told, own_region = _known(host)
    if not store and bucket and host.startswith(f"{bucket.lower()}."):
        told = bucket
    in_host = bool(told)
    if store and path and not told:
        told, _, path = path.partition("/")
    elif not store and bucket and path.split("/")[-1] == bucket:
        told, path = bucket, path[: -len(bucket)].rstrip("/")
    if told and bucket and told.lower() != bucket.lower():
        raise ValueError(f"it names the bucket {told!r}, and the bucket's name is {bucket!r}")
    rest = parts.netloc[len(told) + 1 :] if in_host else parts.netloc
    base, inner = ("", path) if store else (path, "")
    name = bucket or told
    in_names = in_host or (store is not None and store.virtual)
    # No certificate of a store covers a bucket with a dot in its name.
    covered = store is None or parts.scheme == "http" or "." not in name
    virtual = addressing == "virtual" or (addressing == "auto" and in_names and covered)
    return Place(
        endpoint=f"{parts.scheme}://{rest}" + (f"/{base}" if base else ""),
        bucket=name,
        region=region or own_region,
        virtual=virtual,
        prefix="".join(f"{part.strip('/')}/" for part in (inner, prefix) if part.strip("/")),
        by_month=bool(told and not bucket),
    )


def check_names(bucket: str = "", region: str = "") -> None:
    """Raises: ValueError if no store has such a bucket or region; empty ones are fine."""
    if bucket and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", bucket, re.ASCII):
        raise ValueError("what is given as a bucket is no bucket's name")
    if region and not re.fullmatch(r"[A-Za-z0-9-]{1,60}", region, re.ASCII):
        raise ValueError("what is given as a region is no region's name")


def _split(url: str) -> SplitResult:
    """The URL's parts. Raises: ValueError if it is no endpoint."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("it is no URL") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("it does not begin with https:// or http://")
    if not host or not re.fullmatch(r"[\w.-]+|[0-9a-f:.]+", host, re.ASCII):
        raise ValueError("it names no host")
    if "@" in parts.netloc:
        raise ValueError("it names a user; keys have settings of their own")
    if parts.query or parts.fragment:
        raise ValueError("it has a query or a fragment, which no endpoint has")
    if not re.fullmatch(r"[\w./%~-]*", parts.path, re.ASCII):
        raise ValueError("its path holds a blank or a character that no bucket has")
    return parts


def _known(host: str) -> tuple[Store | None, str, str]:
    """The store that a host belongs to, and the bucket and the region that it names."""
    for store in STORES:
        if found := re.fullmatch(store.host, host, re.ASCII):
            named = found.groupdict()
            return store, named["bucket"] or "", named.get("region") or store.region
    guessed = _LOOKS_LIKE_A_REGION.fullmatch(host)
    return None, "", guessed[1] if guessed else DEFAULT_REGION
