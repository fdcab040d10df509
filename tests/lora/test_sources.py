import pytest

from lora.errors import LoraError, SourceInvalid
from lora.sources import CachedName, Hub, HubFile, Reference, RemoteFile, parse, redact_url
from tests.server import LoopbackServer


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("name.safetensors", CachedName("name.safetensors")),
        ("name", CachedName("name")),
        ("folder/name.safetensors", CachedName("folder/name.safetensors")),
        ("user/repo", HubFile("user/repo")),
        ("user/repo/file.safetensors", HubFile("user/repo", "file.safetensors")),
        ("user/repo/a/b.safetensors", HubFile("user/repo", "a/b.safetensors")),
    ],
)
def test_what_a_reference_means(path: str, expected: object) -> None:
    assert parse(Reference(path)) == expected


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
     "host.com/a/x.safetensors?token=canary", "https:/h/x?token=canary", "//u:canary@h/x"],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(path: str) -> None:
    with pytest.raises(SourceInvalid) as caught:
        parse(Reference(path))
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("path", ["https://h/x.safetensors", "name", "u/r/file.safetensors"])
def test_weight_name_goes_with_a_repo_alone(path: str) -> None:
    with pytest.raises(SourceInvalid) as caught:
        parse(Reference(path, weight_name="w.safetensors"))
    assert "weight_name and revision say nothing of" in str(caught.value)


def test_redacted_urls_keep_host_port_and_path_alone() -> None:
    assert redact_url("https://a:b@h.example:8/p/f.bin?x=1#y") == "https://h.example:8/p/f.bin"
    assert redact_url("user/repo") == "user/repo"
    assert redact_url("http://[bad?token=1") == "http://[bad"
    assert redact_url("https:/h/x?token=1") == "https:/h/x"
    assert redact_url("//u:pw@h/x") == "h/x"


def test_hub_chooses_the_file(server: LoopbackServer) -> None:
    hub = Hub(endpoint=server.address)
    server.serve_repo("u/one", {"README.md": b"x", "some.safetensors": b"12345"})
    server.serve_repo("u/two", {"b.safetensors": b"1", "pytorch_lora_weights.safetensors": b"2"})
    one = hub.ask(HubFile("u/one"))
    assert one.url == f"{server.address}/u/one/resolve/{'c' * 40}/some.safetensors"
    assert (one.size, one.file_name) == (5, "some.safetensors")
    assert hub.ask(HubFile("u/two")).file_name == "pytorch_lora_weights.safetensors"
    assert hub.ask(HubFile("u/two", "b.safetensors")).file_name == "b.safetensors"


def test_hub_errors_have_their_codes(server: LoopbackServer) -> None:
    hub = Hub(endpoint=server.address, token="hf_canary")
    server.serve_repo("u/many", {"a.safetensors": b"1", "b.safetensors": b"2"})
    server.serve_repo("u/none", {"README.md": b"1"})
    gated = {"X-Error-Code": "GatedRepo"}
    server.serve("/api/models/u/gated", status=403, headers=gated)
    server.serve("/api/models/u/broken", status=503)
    server.serve(
        "/api/models/u/many/revision/v9", status=404, headers={"X-Error-Code": "RevisionNotFound"}
    )
    cases = {
        HubFile("u/many"): ("LORA_NOT_FOUND", "a.safetensors, b.safetensors"),
        HubFile("u/many", "c.safetensors"): ("LORA_NOT_FOUND", "a.safetensors, b.safetensors"),
        HubFile("u/many", None, "v9"): ("LORA_NOT_FOUND", "v9"),
        HubFile("u/none"): ("LORA_NOT_FOUND", "no .safetensors file"),
        HubFile("u/gone"): ("LORA_NOT_FOUND", "no repo u/gone"),
        HubFile("u/gated"): ("LORA_ACCESS_DENIED", "HF_TOKEN"),
        HubFile("u/broken"): ("LORA_DOWNLOAD_FAILED", "u/broken"),
    }
    for hub_file, (code, said) in cases.items():
        with pytest.raises(LoraError) as caught:
            hub.ask(hub_file)
        assert str(caught.value).startswith(code), hub_file
        assert said in str(caught.value)
        assert "hf_canary" not in str(caught.value)
    assert server.headers["/api/models/u/many"]["authorization"] == "Bearer hf_canary"
