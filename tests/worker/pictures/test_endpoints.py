"""What the endpoints mean that stores' documentation names, and that pictures can be fetched there."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from tests.worker.pictures.stores import Store, serving
from worker.pictures.endpoints import check_names, place_of
from worker.pictures.outputs import Encoded, deliver
from worker.pictures.store import Bucket

B = "my-bucket"

BACK = "dualstack.amazonaws.com"
VPC = "bucket.vpce-1a2b-5e6f.s3.us-east-1.vpce.amazonaws.com"
GOV = "s3-fips.dualstack.us-gov-west-1.amazonaws.com"

TABLE = [
    # AWS
    ("s3.us-west-2.amazonaws.com", "us-west-2", f"{B}.s3.us-west-2.amazonaws.com/"),
    ("s3-us-west-2.amazonaws.com", "us-west-2", f"{B}.s3-us-west-2.amazonaws.com/"),
    ("s3.us-west-2.amazonaws.com/my-bucket", "us-west-2", f"{B}.s3.us-west-2.amazonaws.com/"),
    (f"{B}.s3.us-west-2.amazonaws.com", "us-west-2", f"{B}.s3.us-west-2.amazonaws.com/"),
    (f"{B}.s3-us-west-2.amazonaws.com", "us-west-2", f"{B}.s3-us-west-2.amazonaws.com/"),
    ("s3.amazonaws.com", "us-east-1", f"{B}.s3.amazonaws.com/"),
    (f"{B}.s3.amazonaws.com", "us-east-1", f"{B}.s3.amazonaws.com/"),
    ("s3-external-1.amazonaws.com", "us-east-1", f"{B}.s3-external-1.amazonaws.com/"),
    ("s3.dualstack.eu-west-1.amazonaws.com", "eu-west-1", f"{B}.s3.dualstack.eu-west-1.amazonaws.com/"),
    (f"{B}.s3.dualstack.eu-west-1.amazonaws.com", "eu-west-1", f"{B}.s3.dualstack.eu-west-1.amazonaws.com/"),
    ("s3-fips.us-east-2.amazonaws.com", "us-east-2", f"{B}.s3-fips.us-east-2.amazonaws.com/"),
    (GOV, "us-gov-west-1", f"{B}.{GOV}/"),
    (f"{B}.s3.cn-north-1.amazonaws.com.cn", "cn-north-1", f"{B}.s3.cn-north-1.amazonaws.com.cn/"),
    ("s3-accelerate.amazonaws.com", "us-east-1", f"{B}.s3-accelerate.amazonaws.com/"),
    (f"{B}.s3-accelerate.{BACK}", "us-east-1", f"{B}.s3-accelerate.{BACK}/"),
    (VPC, "us-east-1", f"{VPC}/{B}/"),
    # Cloudflare R2
    ("0a1b2c3d.r2.cloudflarestorage.com", "auto", f"0a1b2c3d.r2.cloudflarestorage.com/{B}/"),
    ("0a1b2c3d.r2.cloudflarestorage.com/my-bucket", "auto", f"0a1b2c3d.r2.cloudflarestorage.com/{B}/"),
    (f"{B}.0a1b2c3d.r2.cloudflarestorage.com", "auto", f"{B}.0a1b2c3d.r2.cloudflarestorage.com/"),
    ("0a1b2c3d.eu.r2.cloudflarestorage.com", "auto", f"0a1b2c3d.eu.r2.cloudflarestorage.com/{B}/"),
    (f"{B}.0a1b2c3d.eu.r2.cloudflarestorage.com", "auto", f"{B}.0a1b2c3d.eu.r2.cloudflarestorage.com/"),
    ("0a1b2c3d.fedramp.r2.cloudflarestorage.com", "auto", f"0a1b2c3d.fedramp.r2.cloudflarestorage.com/{B}/"),
    # Backblaze B2
    ("s3.us-west-004.backblazeb2.com", "us-west-004", f"s3.us-west-004.backblazeb2.com/{B}/"),
    (f"{B}.s3.eu-central-003.backblazeb2.com", "eu-central-003", f"{B}.s3.eu-central-003.backblazeb2.com/"),
    # Google Cloud Storage
    ("storage.googleapis.com", "auto", f"storage.googleapis.com/{B}/"),
    ("storage.googleapis.com/my-bucket/", "auto", f"storage.googleapis.com/{B}/"),
    (f"{B}.storage.googleapis.com", "auto", f"{B}.storage.googleapis.com/"),
    ("storage.us-central1.rep.googleapis.com", "us-central1", f"storage.us-central1.rep.googleapis.com/{B}/"),
    ("storage.mtls.googleapis.com", "auto", f"storage.mtls.googleapis.com/{B}/"),
    # MinIO
    ("minio", "us-east-1", f"minio/{B}/"),
    ("minio/my-bucket", "us-east-1", f"minio/{B}/"),
    ("minio.lan", "us-east-1", f"minio.lan/{B}/"),
    (f"{B}.minio.lan", "us-east-1", f"{B}.minio.lan/"),
    ("play.min.io", "us-east-1", f"play.min.io/{B}/"),
    # DigitalOcean Spaces
    ("nyc3.digitaloceanspaces.com", "nyc3", f"nyc3.digitaloceanspaces.com/{B}/"),
    (f"{B}.fra1.digitaloceanspaces.com", "fra1", f"{B}.fra1.digitaloceanspaces.com/"),
    ("sgp1.digitaloceanspaces.com/my-bucket", "sgp1", f"sgp1.digitaloceanspaces.com/{B}/"),
    # Others
    ("s3.eu-central-1.wasabisys.com", "eu-central-1", f"s3.eu-central-1.wasabisys.com/{B}/"),
    ("fsn1.your-objectstorage.com", "fsn1", f"fsn1.your-objectstorage.com/{B}/"),
    ("s3.fr-par.scw.cloud", "fr-par", f"s3.fr-par.scw.cloud/{B}/"),
    ("s3.gra.io.cloud.ovh.net", "gra", f"s3.gra.io.cloud.ovh.net/{B}/"),
    ("us-east-1.linodeobjects.com", "us-east-1", f"us-east-1.linodeobjects.com/{B}/"),
    ("oss-cn-hangzhou.aliyuncs.com", "cn-hangzhou", f"{B}.oss-cn-hangzhou.aliyuncs.com/"),
    ("s3.eu-north-7.of-nobody.example", "eu-north-7", f"s3.eu-north-7.of-nobody.example/{B}/"),
]  # fmt: skip
"""An endpoint without its scheme, the region, and where objects are, by the stores' documentation."""


@pytest.mark.parametrize(("endpoint", "region", "base"), TABLE, ids=[row[0] for row in TABLE])
def test_pictures_go_where_the_documentation_says_and_open_there(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, region: str, base: str
) -> None:
    store = Store({B: region})
    with serving(store, monkeypatch):
        bucket = Bucket(place_of(f"http://{endpoint}", B), "AK", "SK")
        store.make(B)
        (url,) = deliver([Encoded(b"picture", "image/png")], "job", bucket)
        parts = urlsplit(url)
        assert f"{parts.netloc}{parts.path}".startswith(f"{base}job/0-")
        assert parse_qs(parts.query)["X-Amz-Credential"][0].split("/")[2] == region
        assert [(method, signed) for method, _, _, signed in store.asked] == [
            ("PUT", region),
            ("GET", region),
        ]
        assert requests.get(url, timeout=60).content == b"picture"


@pytest.mark.parametrize(
    ("endpoint", "key"),
    [
        (f"https://{B}.s3.us-west-2.amazonaws.com", "11-26/x"),
        ("https://a.r2.cloudflarestorage.com/my-bucket", "11-26/x"),
        ("https://s3.us-west-2.amazonaws.com/my-bucket/deep/er", "deep/er/11-26/x"),
    ],
)
def test_without_a_name_the_endpoints_bucket_counts_and_the_month_is_a_folder(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, key: str
) -> None:
    monkeypatch.setattr(
        "worker.pictures.endpoints.time.strftime", lambda form: form.replace("%m-%y", "11-26")
    )
    place = place_of(endpoint)
    assert (place.bucket_now, place.key_of("x")) == (B, key)
    assert place_of(endpoint, B).key_of("x") == key.replace("11-26/", "")
    assert place_of(endpoint, B, prefix="/p/q/").key_of("x") == key.replace("11-26/x", "p/q/x")


def test_the_month_is_the_bucket_where_nothing_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "worker.pictures.endpoints.time.strftime", lambda form: form.replace("%m-%y", "11-26")
    )
    for endpoint in ("https://s3.us-west-2.amazonaws.com", "http://minio:9000"):
        place = place_of(endpoint)
        assert (place.bucket_now, place.key_of("x")) == ("11-26", "x")
    assert place_of("https://s3.us-west-2.amazonaws.com").asked.startswith("https://11-26.s3.us-")


def test_what_is_said_goes_before_what_is_told_from_the_endpoint() -> None:
    aws = "https://s3.us-west-2.amazonaws.com"
    assert place_of(aws, B, region="eu-west-1").region == "eu-west-1"
    assert place_of(aws, B, addressing="path").asked == aws
    assert place_of("http://minio:9000", B, addressing="virtual").asked == f"http://{B}.minio:9000"
    assert place_of("https://x.supabase.co/storage/v1/s3", B).asked.endswith("/storage/v1/s3")
    dotted = place_of("https://s3.us-west-2.amazonaws.com", "my.bucket")
    assert not dotted.virtual, "no certificate covers it"
    assert not place_of("https://my.bucket.s3.us-west-2.amazonaws.com", "my.bucket").virtual


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("s3.us-west-2.amazonaws.com", "does not begin with https://"),
        ("htps://x", "does not begin with https://"),
        ("https://", "names no host"),
        ("https://s3 .example", "names no host"),
        ("https://[canary", "is no URL"),
        ("https://h:canary", "is no URL"),
        ("https://me:canary@h.example", "names a user"),
        ("https://h.example?canary", "has a query"),
        ("https://s3.amazonaws.com/my bucket", "holds a blank"),
        ("https://other.s3.us-west-2.amazonaws.com", "names the bucket 'other', and"),
        ("https://a.r2.cloudflarestorage.com/other", "names the bucket 'other', and"),
        ("https://my-bucket.nyc3.cdn.digitaloceanspaces.com", "leave `cdn.` out"),
        ("https://my-bucket.s3-website.us-west-2.amazonaws.com", "takes no uploads"),
        ("https://pub-0a1b.r2.dev", "ACCOUNT.r2.cloudflarestorage.com"),
        ("https://f004.backblazeb2.com/file/my-bucket", "s3.REGION.backblazeb2.com"),
        ("https://storage.cloud.google.com/my-bucket", "storage.googleapis.com"),
    ],
)
def test_what_is_no_endpoint_is_refused_by_its_fault(endpoint: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^its? ") as caught:
        place_of(endpoint, B)
    assert said in str(caught.value)
    assert "canary" not in str(caught.value)


def test_names_that_no_store_has_are_refused() -> None:
    check_names("my.bucket-1", "eu-ro-1")
    check_names()
    for bucket, region in (("a/b", ""), ("x@169.254.169.254/", ""), ("", "us east")):
        with pytest.raises(ValueError, match="what is given as a"):
            check_names(bucket, region)
