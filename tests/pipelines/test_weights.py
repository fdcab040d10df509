import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import (
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipelines import weights
from pipelines.baking import bake, files_to_bake, repos_to_bake
from pipelines.loading import load_models
from pipelines.obtaining import download_place, obtain
from pipelines.weights import (
    CACHED,
    DEMO_MODEL,
    Reading,
    WeightsIncomplete,
    WeightsMissing,
    baked_hub,
    check,
    find_weights,
    hubs,
    read_ahead,
    weight_files,
)
from settings import STOCK_MODEL, STOCK_REFINER, STOCK_VAE, Settings
from tests.adapters import as_bytes, kohya

SDXL_BASE = [
    "README.md", "model_index.json", "sd_xl_base_1.0.safetensors", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/flax_model.msgpack", "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors", "text_encoder/model.onnx", "tokenizer/merges.txt",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/model.onnx",
    "unet/diffusion_pytorch_model.fp16.safetensors", "vae_1_0/config.json",
]  # fmt: skip


def test_half_precision_is_baked_and_nothing_twice() -> None:
    assert files_to_bake(SDXL_BASE) == [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "tokenizer/merges.txt", "unet/config.json", "vae_1_0/config.json",
        "text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
    ]  # fmt: skip


def test_a_repo_without_half_precision_gives_what_it_has() -> None:
    names = ["config.json", "diffusion_pytorch_model.safetensors", "sdxl_vae.safetensors"]
    assert files_to_bake(names) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_repos_to_bake_are_those_that_the_settings_name(tmp_path: Path) -> None:
    assert repos_to_bake(Settings()) == [STOCK_MODEL, STOCK_REFINER, STOCK_VAE]
    assert repos_to_bake(Settings(model="demo")) == []
    assert repos_to_bake(Settings(model=str(tmp_path))) == []
    file = tmp_path / "m.safetensors"
    file.write_bytes(b"x")
    assert repos_to_bake(Settings(model=str(file))) == [STOCK_MODEL]


def test_find_weights_knows_the_demo_and_folders_and_asks_no_network(tmp_path: Path) -> None:
    assert find_weights("demo", [tmp_path]) == DEMO_MODEL
    assert find_weights(str(DEMO_MODEL), []) == DEMO_MODEL
    for missing in ("nobody/nothing", str(tmp_path / "gone")):
        with pytest.raises(WeightsMissing) as caught:
            find_weights(missing, [tmp_path, tmp_path / "b"])
        assert "download_weights.py" in str(caught.value)
        assert f"{tmp_path} or {tmp_path / 'b'};" in str(caught.value)


def test_check_names_the_file_that_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(WeightsIncomplete):
        check(tmp_path)
    (tmp_path / "unet").mkdir()
    file = tmp_path / "unet" / "model.safetensors"
    file.write_bytes(as_bytes(kohya()))
    check(tmp_path)
    file.write_bytes(as_bytes(kohya())[:-5])
    with pytest.raises(WeightsIncomplete) as caught:
        check(tmp_path)
    assert "unet/model.safetensors" in str(caught.value)


def test_check_wants_weights_for_every_network_of_the_index(tmp_path: Path) -> None:
    index = {"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "image_encoder": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.safetensors").write_bytes(as_bytes(kohya()))
    with pytest.raises(WeightsIncomplete) as caught:
        check(tmp_path)
    assert "unet holds no" in str(caught.value)
    check(DEMO_MODEL)


def test_bake_tries_again_when_the_hub_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def refuse(self: object, repo: str, revision: str | None) -> None:
        tries.append(repo)
        raise httpx2.ConnectError("no")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    pauses: list[float] = []
    with pytest.raises(WeightsMissing):
        bake("a/b", None, pause=pauses.append)
    assert tries == ["a/b"] * 4
    assert pauses == [5.0, 10.0, 20.0]


# --- hub caches ---------------------------------------------------------------------------------

REPO = "artist/my-sdxl"


def in_hub(hub: Path, commit: str, repo: str = REPO, *, main: bool = True) -> Path:
    """The demo model as a commit of a repo in a hub's cache: links to blobs, as the client makes them."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    for file in DEMO_MODEL.rglob("*.*"):
        blob = folder / "blobs" / f"{commit}-{file.parent.name}-{file.name}"
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(DEMO_MODEL)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if main:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
    return snapshot


def test_the_commit_that_main_names_is_taken(tmp_path: Path) -> None:
    in_hub(tmp_path, "aaa", main=False)
    named = in_hub(tmp_path, "bbb")
    in_hub(tmp_path, "ccc", main=False)
    assert find_weights(REPO, [tmp_path]) == named


def test_no_repo_is_taken_for_another_whose_folder_has_its_name(tmp_path: Path) -> None:
    in_hub(tmp_path, "aaa", "a/b--c", main=False)
    for repo in ("a/b--c", "a--b/c"):
        with pytest.raises(WeightsMissing):
            find_weights(repo, [tmp_path])


def test_the_only_commit_is_taken_without_a_ref(tmp_path: Path) -> None:
    only = in_hub(tmp_path, "aaa", main=False)
    assert find_weights(REPO, [tmp_path]) == only
    in_hub(tmp_path, "bbb", main=False)
    with pytest.raises(WeightsIncomplete, match="refs/main names none of its 2 commits"):
        find_weights(REPO, [tmp_path])


def remove_blob(snapshot: Path) -> None:
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").resolve().unlink()


def cut_blob(snapshot: Path) -> None:
    blob = (snapshot / "vae" / "diffusion_pytorch_model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1])


def remove_config(snapshot: Path) -> None:
    (snapshot / "text_encoder" / "config.json").unlink()


def break_index(snapshot: Path) -> None:
    (snapshot / "model_index.json").resolve().write_text("[]")


def remove_commit(snapshot: Path) -> None:
    shutil.rmtree(snapshot)
    (snapshot.parent / "another").mkdir()


FAULTS: dict[Callable[[Path], None], str] = {
    remove_blob: "unet/diffusion_pytorch_model.safetensors is not whole",
    cut_blob: "vae/diffusion_pytorch_model.safetensors is not whole",
    remove_config: "text_encoder has no config.json",
    break_index: "model_index.json is no JSON object",
    remove_commit: "refs/main names the commit abc, which is not there",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_whole_is_passed_over_or_refused(
    tmp_path: Path, fault: Callable[[Path], None]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fault(in_hub(first, "abc"))
    with pytest.raises(WeightsIncomplete) as caught:
        find_weights(REPO, [first, second])
    assert f"{REPO} in {first}: {FAULTS[fault]}" in str(caught.value)
    whole = in_hub(second, "def")
    assert find_weights(REPO, [first, second]) == whole


def test_the_image_comes_before_cached_models_and_these_before_the_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "baked"))
    monkeypatch.setattr(weights, "CACHED", tmp_path / "cached")
    volume = tmp_path / "volume"
    for name in ("volume", "cached", "baked"):
        made = in_hub(tmp_path / name, "abc")
        assert find_weights(REPO, hubs(Settings(weights_dir=volume))) == made
    for name in ("baked", "cached", "volume"):
        settings = Settings(weights=name, weights_dir=volume)
        assert find_weights(REPO, hubs(settings)).is_relative_to(tmp_path / name)


def test_where_the_image_and_runpod_keep_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path("/runpod-volume/huggingface-cache/hub") == CACHED
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", "/models/huggingface")
    assert baked_hub() == Path("/models/huggingface/hub")
    monkeypatch.delenv("HF_HOME")
    assert baked_hub() == Path.home() / ".cache" / "huggingface" / "hub"


def test_a_model_from_a_hub_cache_is_loaded_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    in_hub(tmp_path, "abc")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for chosen in ("volume", "download"):
        settings = Settings(model=REPO, device="cpu", weights=chosen, weights_dir=tmp_path)
        assert load_models(settings).name == "my-sdxl"


def test_what_is_nowhere_is_downloaded_only_if_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = list[object]()

    def bake(repo: str, token: str | None, place: Path, **_: object) -> None:
        fetched.append((repo, token, place))
        in_hub(place, "abc", repo)

    monkeypatch.setattr("pipelines.baking.bake", bake)
    for chosen in ("auto", "baked", "cached", "volume"):
        with pytest.raises(WeightsMissing):
            load_models(Settings(model=REPO, weights=chosen, weights_dir=tmp_path))
    assert not fetched
    settings = Settings(model=REPO, device="cpu", weights="download", weights_dir=tmp_path)
    assert load_models(settings).name == "my-sdxl"
    assert load_models(settings).name == "my-sdxl"
    assert fetched == [(REPO, None, tmp_path)]


def test_what_a_broken_off_download_left_is_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_blob(in_hub(tmp_path, "abc"))

    def bake(repo: str, token: str | None, place: Path, **_: object) -> None:
        shutil.rmtree(place)
        in_hub(place, "abc", repo)

    monkeypatch.setattr("pipelines.baking.bake", bake)
    with pytest.raises(WeightsIncomplete):
        obtain(REPO, Settings(weights="auto", weights_dir=tmp_path))
    found = obtain(REPO, Settings(weights="download", weights_dir=tmp_path))
    assert (found / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_folder_that_is_not_whole_is_not_taken_for_a_repo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.baking.bake", lambda *_, **__: pytest.fail("it was downloaded"))
    with pytest.raises(WeightsIncomplete):
        obtain(str(tmp_path), Settings(weights="download", weights_dir=tmp_path))


def test_without_a_volume_the_image_holds_what_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "baked"))
    here = Settings(weights_dir=tmp_path / "volume" / "hub")
    assert download_place(here) == tmp_path / "volume" / "hub"
    gone = Settings(weights_dir=Path("/no-such-volume/huggingface/hub"))
    assert download_place(gone) == tmp_path / "baked"


def test_a_revision_is_that_one_and_no_other(tmp_path: Path) -> None:
    main, tagged = in_hub(tmp_path, "aaa"), in_hub(tmp_path, "bbb", main=False)
    (tagged.parent.parent / "refs" / "v1").write_text("bbb")
    assert find_weights(REPO, [tmp_path]) == main
    assert find_weights(REPO, [tmp_path], "v1") == tagged
    with pytest.raises(WeightsMissing):
        find_weights(REPO, [tmp_path], "v2")
    shutil.rmtree(main)
    with pytest.raises(WeightsMissing):  # the only one that is left is not `v2` either
        find_weights(REPO, [tmp_path], "v2")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RevisionNotFoundError, "has no revision v1"),
        (RepositoryNotFoundError, "there is no repo a/b"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE"),
    ],
)
def test_what_the_hub_will_not_change_its_mind_about_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], said: str
) -> None:
    tries: list[str | None] = []

    def refuse(self: object, repo: str, revision: str | None) -> None:
        tries.append(revision)
        answer = httpx2.Response(404, request=httpx2.Request("GET", "https://hub"))
        raise error("no") if error is OfflineModeIsEnabled else error("no", response=answer)  # type: ignore[call-arg]

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(WeightsMissing, match=said):
        bake("a/b", None, revision="v1", pause=lambda _: pytest.fail("it waited"))
    assert tries == ["v1"]


# --- which files are loaded, and reading them ahead ------------------------------------------------


def test_half_precision_is_loaded_where_it_is_there(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.fp16.safetensors"):
        (tmp_path / name).write_bytes(as_bytes(kohya()))
    assert [one.name for one in weight_files(tmp_path)] == ["model.fp16.safetensors"]


def test_every_part_that_an_index_names_must_be_there(tmp_path: Path) -> None:
    parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"a": parts[0], "b": parts[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / parts[0]).write_bytes(as_bytes(kohya()))
    with pytest.raises(WeightsIncomplete, match=f"{parts[1]} is not whole"):
        check(tmp_path)
    (tmp_path / parts[1]).write_bytes(as_bytes(kohya()))
    check(tmp_path)


def test_an_index_of_weights_that_were_not_fetched_asks_for_nothing(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.fp16.safetensors").write_bytes(as_bytes(kohya()))
    check(tmp_path)


def test_reading_ahead_reads_every_byte_that_will_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "PIECE", 1 << 16)
    snapshot = in_hub(tmp_path, "abc")
    opened = set[Path]()
    own = Path.open

    def noted(file: Path, *args: object, **options: object) -> object:
        opened.add(file)
        return own(file, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", noted)
    reading = read_ahead(Settings(model=REPO, weights_dir=tmp_path))
    reading.wait()
    assert opened >= set(snapshot.rglob("*.safetensors"))
    assert reading.seconds > 0


def test_nothing_that_is_missing_stops_reading_ahead(tmp_path: Path) -> None:
    read_ahead(Settings(model="nobody/nothing", weights_dir=tmp_path)).wait()
    Reading([tmp_path / "gone", DEMO_MODEL / "model_index.json", tmp_path]).wait()
