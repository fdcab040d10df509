import json
from pathlib import Path

import pytest

from lora.engine.engine import LoraEngine
from lora.errors import AccessDenied, DownloadFailed, LoraError, LoraNotFound
from lora.fetch.hub import Hub
from lora.fetch.sources import HubFile, Reference, RemoteFile, parse
from lora.fetch.web import USER_AGENT
from lora.volume.cache import Limits, VolumeCache
from lora.volume.loader import LoraLibrary
from tests.adapters import as_bytes, kohya, randn
from tests.server import LOOPBACK, LoopbackServer, Reply

ADAPTER = as_bytes(kohya())
COMMIT = "c" * 40


def make(root: Path, server: LoopbackServer, **limits: float) -> VolumeCache:
    hub = Hub("hf_canary", server.address)
    return VolumeCache(root, Limits(**limits), LOOPBACK, hub=hub)  # type: ignore[arg-type]


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
    assert server.headers["/api/models/u/many"]["Authorization"] == "Bearer hf_canary"


def test_safetensors_are_preferred_to_pickles(server: LoopbackServer) -> None:
    hub = Hub(endpoint=server.address)
    server.serve_repo("u/both", {"adapter_model.bin": b"1", "odd.safetensors": b"2"})
    server.serve_repo("u/old", {"pytorch_lora_weights.bin": b"1", "optimizer.pt": b"2"})
    server.serve_repo("u/one", {"README.md": b"1", "lora.ckpt": b"2"})
    chosen = [hub.ask(HubFile(f"u/{name}")).file_name for name in ("both", "old", "one")]
    assert chosen == ["odd.safetensors", "pytorch_lora_weights.bin", "lora.ckpt"]


def test_a_branch_is_looked_up_once_until_its_time_is_over(
    tmp_path: Path, server: LoopbackServer
) -> None:
    server.serve_repo("u/r", {"x.safetensors": ADAPTER})
    asked = "/api/models/u/r"
    for _ in range(2):  # the second is another worker on the same volume
        cache = make(tmp_path, server)
        place = cache.resolve(Reference("u/r"))
    assert server.hits[asked] == 1
    cache.resolve(Reference("u/r", refresh=True))
    assert server.hits[asked] == 2
    make(tmp_path, server, ttl=0.0).resolve(Reference("u/r"))
    assert server.hits[asked] == 3
    assert cache.resolve(Reference("u/r")) == place._replace(refresh=False)


def test_a_commit_is_looked_up_once_for_ever(tmp_path: Path, server: LoopbackServer) -> None:
    server.serve_repo("u/r", {"x.safetensors": ADAPTER})
    for _ in range(2):
        make(tmp_path, server, ttl=0.0).resolve(Reference("u/r", revision=COMMIT))
    assert server.hits[f"/api/models/u/r/revision/{COMMIT}"] == 1


def test_a_new_commit_is_a_new_entry_and_the_record_has_it(
    tmp_path: Path, server: LoopbackServer
) -> None:
    cache = make(tmp_path, server)
    server.serve_repo("u/r", {"x.safetensors": ADAPTER})
    old = cache.get(cache.resolve(Reference("u/r")))
    newer = as_bytes(kohya(seed=4))
    server.serve_repo("u/r", {"x.safetensors": newer}, commit="d" * 40)
    assert cache.get(cache.resolve(Reference("u/r"))).path == old.path
    new = cache.get(cache.resolve(Reference("u/r", refresh=True)))
    assert new.path.read_bytes() == newer
    assert old.path.read_bytes() == ADAPTER
    assert old.record.source == f"u/r@{'c' * 12}/x.safetensors"
    assert new.record.source == f"u/r@{'d' * 12}/x.safetensors"


def test_what_was_known_serves_while_the_hub_is_silent(
    tmp_path: Path, server: LoopbackServer
) -> None:
    server.serve_repo("u/r", {"x.safetensors": ADAPTER})
    cache = make(tmp_path, server, ttl=0.0)
    cache.get(cache.resolve(Reference("u/r")))
    server.serve("/api/models/u/r", status=503)
    entry = cache.get(cache.resolve(Reference("u/r")))
    assert entry.path.read_bytes() == ADAPTER
    assert "may be out of date: the hub did not answer" in entry.warnings[0]
    with pytest.raises(LoraError) as caught:
        cache.resolve(Reference("u/r", refresh=True))
    assert caught.value.code == "LORA_DOWNLOAD_FAILED"


def test_a_peft_repo_comes_with_its_config(
    tmp_path: Path, server: LoopbackServer, engine: LoraEngine
) -> None:
    name = next(key for key in kohya() if key.endswith(".lora_down.weight"))
    target = engine.key_map.find(name.removesuffix(".lora_down.weight"))
    assert target is not None
    inputs, outputs = target.parameters["weight"][1], target.parameters["weight"][0]
    tensors = {
        f"base_model.model.{target.path}.lora_A.weight": randn(4, inputs),
        f"base_model.model.{target.path}.lora_B.weight": randn(outputs, 4),
    }
    config = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 32}'
    server.serve_repo(
        "u/peft", {"adapter_model.safetensors": as_bytes(tensors), "adapter_config.json": config}
    )
    library = LoraLibrary(make(tmp_path, server), engine.key_map)
    for _ in range(2):  # the second from the cache
        loaded = library.load(Reference("u/peft"))
        assert loaded.entry.record.config == config.decode()
        assert loaded.warnings == ()
        part = loaded.file.layers[0].algorithm.low_rank()
        assert part is not None
        assert part.scaling == 8.0
    assert server.hits[f"/u/peft/resolve/{COMMIT}/adapter_config.json"] == 1


JINJA, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
SEVERAL = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({JINJA: "one"}, "one"),
        ({TOKENIZER: json.dumps({"chat_template": "two"})}, "two"),
        ({TOKENIZER: json.dumps({"chat_template": SEVERAL})}, "two"),
        ({TOKENIZER: json.dumps({"model_max_length": 5})}, None),
        ({JINJA: "one", TOKENIZER: "broken"}, "one"),
    ],
)
def test_a_peft_repo_comes_with_its_chat_template(
    tmp_path: Path, server: LoopbackServer, files: dict[str, str], template: str | None
) -> None:
    told = {name: text.encode() for name, text in files.items()}
    server.serve_repo("u/peft", {"adapter_model.safetensors": ADAPTER, **told})
    server.serve_repo("u/plain", {"x.safetensors": ADAPTER, **told})
    cache = make(tmp_path, server)
    for _ in range(2):  # the second from the cache
        assert cache.get(cache.resolve(Reference("u/peft"))).record.template == template
    assert cache.get(cache.resolve(Reference("u/plain"))).record.template is None


@pytest.mark.parametrize("broken", ["{", "[]", '{"chat_template": 3}', '{"chat_template": [3]}'])
def test_a_broken_chat_template_of_a_peft_repo_is_an_error(
    tmp_path: Path, server: LoopbackServer, broken: str
) -> None:
    files = {"adapter_model.safetensors": ADAPTER, TOKENIZER: broken.encode()}
    server.serve_repo("u/peft", files)
    cache = make(tmp_path, server)
    with pytest.raises(LoraError) as caught:
        cache.get(cache.resolve(Reference("u/peft")))
    assert caught.value.code == "LORA_CORRUPT" and "u/peft" in caught.value.sentence


def test_a_peft_repo_without_its_config_is_warned_of(
    tmp_path: Path, server: LoopbackServer, engine: LoraEngine
) -> None:
    tensors = {k: t for k, t in kohya().items() if not k.endswith(".alpha")}
    server.serve_repo("u/peft", {"adapter_model.safetensors": as_bytes(tensors)})
    library = LoraLibrary(make(tmp_path, server), engine.key_map)
    assert "alpha counts as the rank" in library.load(Reference("u/peft")).warnings[0]


def test_a_link_to_a_folder_means_what_is_in_it(server: LoopbackServer) -> None:
    hub = Hub(endpoint=server.address)
    files = {"a.safetensors": b"1", "one/b.safetensors": b"2", "one/notes.md": b"3"}
    files |= {"two/c.safetensors": b"4", "two/d.safetensors": b"5"}
    server.serve_repo("u/r", files)

    def chosen(path: str, weight_name: str | None = None) -> str:
        link = Reference(f"{server.address}/u/r/tree/main{path}", weight_name)
        place = parse(link, server.address)
        assert isinstance(place, HubFile)
        return hub.ask(place).url.rpartition(f"{COMMIT}/")[2]

    assert chosen("/one") == "one/b.safetensors"
    assert chosen("/two", "d.safetensors") == "two/d.safetensors"
    for path, said in (("/two", "weight_name: c.safetensors, d.safe"), ("/three", "no file three")):
        with pytest.raises(LoraNotFound) as caught:
            chosen(path)
        assert said in str(caught.value)


RATE = {"X-Error-Message": "We had to rate limit your IP"}


@pytest.mark.parametrize(
    ("headers", "waits"),
    [
        ({"Retry-After": "8"}, [8.0]),
        (
            {"RateLimit": '"api";r=0;t=7', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'},
            [7.0],
        ),
        ({"Retry-After": "8", "RateLimit": '"api";r=0;t=7'}, [8.0]),
        ({"Retry-After": "0"}, []),
        ({"RateLimit": '"api";r=12;t=70'}, []),
        ({}, []),
    ],
)
def test_the_hubs_rate_limit_is_waited_for(
    tmp_path: Path,
    server: LoopbackServer,
    monkeypatch: pytest.MonkeyPatch,
    headers: dict[str, str],
    waits: list[float],
) -> None:
    made: list[float] = []
    monkeypatch.setattr("lora.volume.resolver.time.sleep", made.append)
    server.serve_repo("u/r", {"x.safetensors": ADAPTER})
    busy = Reply(b'{"error": "We had to rate limit your IP"}', 429, {**RATE, **headers})
    server.replies["/api/models/u/r"].first = [busy]
    place = make(tmp_path, server).resolve(Reference("u/r")).location
    assert isinstance(place, RemoteFile)
    assert [pause for pause in made if pause >= 2] == waits
    assert len(made) == 1


def test_a_rate_limit_that_outlasts_the_deadline_is_told_at_once(
    tmp_path: Path, server: LoopbackServer
) -> None:
    server.serve("/api/models/u/r", status=429, headers={"Retry-After": "999"})
    with pytest.raises(DownloadFailed) as caught:
        make(tmp_path, server).resolve(Reference("u/r"))
    assert "the hub did not answer for u/r (rate limit, HTTP 429)" in str(caught.value)
    assert caught.value.hint == "The server asks to wait 999 s."
    assert server.hits["/api/models/u/r"] == 1


def test_nobody_waits_for_a_rate_limit_where_an_older_answer_serves(
    tmp_path: Path, server: LoopbackServer
) -> None:
    server.serve_repo("u/r", {"x.safetensors": ADAPTER})
    make(tmp_path, server).resolve(Reference("u/r"))
    server.serve("/api/models/u/r", status=429, headers={"Retry-After": "250"})
    resolved = make(tmp_path, server, ttl=0.0).resolve(Reference("u/r"))
    assert "may be out of date: the hub did not answer for u/r (rate limit" in str(resolved.warning)
    assert server.hits["/api/models/u/r"] == 2


def test_a_token_that_the_hub_does_not_know_is_named(server: LoopbackServer) -> None:
    told = {"X-Error-Message": "Invalid credentials in Authorization header"}
    server.serve("/api/models/u/r", b"{}", status=401, headers=told)
    with pytest.raises(AccessDenied) as caught:
        Hub("hf_canary", server.address).ask(HubFile("u/r"))
    assert "does not accept HF_TOKEN, with which it was asked for u/r" in str(caught.value)
    assert "have expired" in str(caught.value)
    assert server.headers["/api/models/u/r"]["User-Agent"] == USER_AGENT
