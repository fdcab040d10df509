import pytest

from lora.errors import SourceInvalid
from lora.fetch.sources import (
    CachedName,
    CivitaiFile,
    HubFile,
    Reference,
    RemoteFile,
    parse,
)

HF = "https://huggingface.co"
CIV = "https://civitai.com"

SAFETENSOR, FILE = (("format", "SafeTensor"),), (("fileId", "67"),)

MEANINGS = {
    "name.safetensors": CachedName("name.safetensors"),
    "name": CachedName("name"),
    " name ": CachedName("name"),
    "name.pt": CachedName("name.pt"),
    "folder/name.safetensors": CachedName("folder/name.safetensors"),
    "folder/name.ckpt": CachedName("folder/name.ckpt"),
    "my folder/name": CachedName("my folder/name"),
    "user/repo": HubFile("user/repo"),
    "user/repo@v1.0": HubFile("user/repo", None, "v1.0"),
    "user/repo@refs/pr/3": HubFile("user/repo", None, "refs/pr/3"),
    "user/repo/file.safetensors": HubFile("user/repo", "file.safetensors"),
    "user/repo/a/b.safetensors": HubFile("user/repo", "a/b.safetensors"),
    "user/repo/adapter_model.bin": HubFile("user/repo", "adapter_model.bin"),
    "user/repo@v1/a/b.safetensors": HubFile("user/repo", "a/b.safetensors", "v1"),
    "user/repo@refs/pr/3/b.safetensors": HubFile("user/repo", "b.safetensors", "refs/pr/3"),
    "hf://user/repo": HubFile("user/repo"),
    "hf://user/repo@main/b.safetensors": HubFile("user/repo", "b.safetensors", "main"),
    "hf://models/user/repo": HubFile("user/repo"),
    f"{HF}/user/repo": HubFile("user/repo"),
    f"{HF}/user/repo/": HubFile("user/repo"),
    f"{HF}/user/repo/tree/main": HubFile("user/repo", None, "main"),
    f"{HF}/user/repo/blob/main/a/b.safetensors": HubFile("user/repo", "a/b.safetensors", "main"),
    f"{HF}/user/repo/resolve/v1/b%20c.safetensors?download=true": HubFile(
        "user/repo", "b c.safetensors", "v1"
    ),
    f"{HF}/user/repo/raw/main/b.safetensors": HubFile("user/repo", "b.safetensors", "main"),
    f"{HF}/user/repo/tree/v1/sub": HubFile("user/repo", "sub", "v1"),
    f"{HF}/user/repo?not-for-all-audiences=true&utm_source=x": HubFile("user/repo"),
    f"{HF}/user/repo?show_file_info=a%2Fb.safetensors": HubFile("user/repo", "a/b.safetensors"),
    f"{HF}/user/repo/resolve/refs%2Fpr%2F3/b.pt": HubFile("user/repo", "b.pt", "refs/pr/3"),
    "https://hf.co/user/repo/blob/main/b.safetensors": HubFile(
        "user/repo", "b.safetensors", "main"
    ),
    "civitai:12": CivitaiFile(12, None),
    "civitai:12@345": CivitaiFile(12, 345),
    "urn:air:sdxl:lora:civitai:12@345": CivitaiFile(12, 345),
    "urn:air:sdxl:lora:civitai:12": CivitaiFile(12, None),
    "urn:air:sdxl:lora:civitai:12@345.safetensors": CivitaiFile(12, 345, None, SAFETENSOR),
    "air:sdxl:lora:civitai:12@345": CivitaiFile(12, 345),
    "sdxl:lora:civitai:12@345+67": CivitaiFile(12, 345, None, FILE),
    "urn:air:sdxl:lora:civitai:12@345+67.ckpt": CivitaiFile(
        12, 345, None, (("format", "PickleTensor"), *FILE)
    ),
    "civitai:12@345+67": CivitaiFile(12, 345, None, FILE),
    f"{CIV}/models/12": CivitaiFile(12, None),
    f"{CIV}/models/12/some-name": CivitaiFile(12, None),
    f"{CIV}/models/12/some-name?modelVersionId=345": CivitaiFile(12, 345),
    f"{CIV}/models/12?sync-account=red&utm_medium=x#download": CivitaiFile(12, None),
    f"{CIV}/models/12?modelVersionId=345&fileId=67": CivitaiFile(12, 345, None, FILE),
    f"{CIV}/model-versions/345": CivitaiFile(None, 345),
    f"{CIV}/api/v1/model-versions/345": CivitaiFile(None, 345),
    f"{CIV}/api/v1/models/12": CivitaiFile(12, None),
    "https://civitai.red/models/12/x?modelVersionId=345": CivitaiFile(12, 345),
    "https://www.civitai.red/api/download/models/345": CivitaiFile(None, 345),
    "https://civitai.green/models/12": CivitaiFile(12, None),
    f"{CIV}/api/download/models/345": CivitaiFile(None, 345),
    f"{CIV}/api/download/models/345?fileId=67&token=": CivitaiFile(None, 345, None, FILE),
    f"{CIV}/api/download/models/345?modelVersionId=345": CivitaiFile(None, 345),
    f"{CIV}/api/download/models/345?type=Pruned%20Model&size=pruned&fp=fp16&quantType=Q8_0": CivitaiFile(
        None,
        345,
        None,
        (("type", "Pruned Model"), ("size", "pruned"), ("fp", "fp16"), ("quantType", "Q8_0")),
    ),
    f"{CIV}/api/download/models/345?type=Model&format=SafeTensor&token=t": CivitaiFile(
        None, 345, None, (("type", "Model"), ("format", "SafeTensor"))
    ),
}


@pytest.mark.parametrize(("path", "expected"), MEANINGS.items(), ids=MEANINGS.keys())
def test_what_a_reference_means(path: str, expected: object) -> None:
    assert parse(Reference(path)) == expected


def test_own_servers_speak_for_the_hub_and_civitai() -> None:
    hub, civitai = "http://10.0.0.7:8080", "https://mirror.example"
    page = Reference(f"{hub}/user/repo/resolve/main/b.safetensors")
    assert parse(page, hub, civitai) == HubFile("user/repo", "b.safetensors", "main")
    assert parse(Reference(f"{civitai}/models/12"), hub, civitai) == CivitaiFile(12, None)
    assert isinstance(parse(page), RemoteFile)


def test_weight_name_and_revision_choose_in_a_repo() -> None:
    options = {"weight_name": "w.safetensors", "revision": "v1"}
    assert parse(Reference("user/repo", **options)) == HubFile("user/repo", "w.safetensors", "v1")
    assert parse(Reference("civitai:1@2", "w.pt")) == CivitaiFile(1, 2, "w.pt")
    assert parse(Reference(f"{HF}/user/repo", "w.pt")) == HubFile("user/repo", "w.pt")


def test_other_pages_of_the_hubs_are_plain_urls() -> None:
    for url in (f"{HF}/docs", f"{HF}/datasets/a/b/resolve/main/x.pt", f"{CIV}/images/12"):
        assert isinstance(parse(Reference(url)), RemoteFile)


def test_signatures_are_not_part_of_what_a_url_means() -> None:
    def identity(url: str) -> str:
        place = parse(Reference(url))
        assert isinstance(place, RemoteFile)
        assert place.url == url
        return place.identity

    plain = "https://bucket.example/x.safetensors?versionId=3"
    signed = "&X-Amz-Signature=abc&X-Amz-Date=1&X-Amz-Credential=c"
    assert identity(plain + signed) == identity(plain + "&x-amz-signature=def") == identity(plain)
    assert identity(plain) != identity(plain.replace("3", "4"))
    assert identity("https://h/x?b=%20c&a") == "https://h/x?b=%20c&a"  # as it was written


def test_a_url_is_a_remote_file_named_by_its_path() -> None:
    place = parse(Reference("https://u:p@host.example/x/my%20lora.safetensors?token=secret#f"))
    assert isinstance(place, RemoteFile)
    assert place.file_name == "my lora.safetensors"
    assert place.shown == "https://host.example/x/my%20lora.safetensors"
    assert "secret" not in repr(place)


@pytest.mark.parametrize(
    "path",
    ["", " ", "../../etc/passwd", "/etc/passwd", "~/x", "a/../b.safetensors", "ftp://host/x",
     "file:///etc/passwd", "https://", "http://[bad", "a\\b", "a\0b", "a" * 300, "x\ud800",
     "hf://", "hf://user", "hf://user/repo/../x", "user/repo@", "user/repo/../../x.pt", "http://h:x/",
     "user@canary", "x/y/z@canary", "civitai:", "civitai:x", "civitai:1@", "urn:air:sdxl:lora:hub:1@2",
     "user/repo@v 1", "\u2066name", "http://[::1", "hf://u:canary@user/repo?x",
     "host.com/a/x.safetensors?token=canary", "https:/h/x?token=canary", "//u:canary@h/x"],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(path: str) -> None:
    with pytest.raises(SourceInvalid) as caught:
        parse(Reference(path))
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (f"{HF}/u/r?weight=canary", "weight in its link's query means nothing here"),
        (f"{HF}/u/r/blob/main/x.pt?token=canary", "token in its link's query means nothing here"),
        (f"{HF}/u/r/blob/main/x.pt?show_file_info=canary", "show_file_info another"),
        (f"{CIV}/models/12?canary canary=1", "a part in its link's query means nothing here"),
        (
            f"{CIV}/models/12?modelVersionId=canary",
            "modelVersionId in its link's query is no number",
        ),
        (f"{CIV}/models/12?fileId=1&fileId=2", "two values of fileId"),
        (f"{CIV}/api/download/models/3?token=canary&token=other", "two values of token"),
        (f"{CIV}/api/download/models/3?modelVersionId=4", "are two versions"),
        (f"{CIV}/api/download/models/3?primary=canary", "primary in its link's query"),
        ("https://me:canary@civitai.com/models/12", "names a user"),
        ("urn:air:sdxl:lora:civitai:12@3.diffuser", "in the format diffuser"),
    ],
)
def test_nothing_that_a_link_says_is_ignored(path: str, said: str) -> None:
    with pytest.raises(SourceInvalid) as caught:
        parse(Reference(path))
    assert said in str(caught.value)
    assert "canary" not in str(caught.value)


def test_a_links_token_is_kept_and_never_shown() -> None:
    place = parse(Reference(f"{CIV}/api/download/models/345?type=Model&token=canary"))
    assert isinstance(place, CivitaiFile)
    assert place.token == "canary"
    assert "canary" not in repr(place)


def test_weight_name_chooses_in_a_folder_of_a_repo() -> None:
    place = parse(Reference(f"{HF}/user/repo/tree/v1/sub", "w.safetensors"))
    assert place == HubFile("user/repo", "sub/w.safetensors", "v1")


@pytest.mark.parametrize(
    "path",
    [
        "https://h/x.safetensors",
        "name",
        "u/r/file.safetensors",
        f"{HF}/u/r/blob/main/x.safetensors",
    ],
)
def test_weight_name_goes_with_a_repo_alone(path: str) -> None:
    with pytest.raises(SourceInvalid) as caught:
        parse(Reference(path, weight_name="w.safetensors"))
    assert "weight_name and revision do not apply to" in str(caught.value)
