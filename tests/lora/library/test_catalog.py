"""The library's catalogue: what it finds, what it says of each adapter, and what activation checks."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora.engine.engine import LoraEngine
from lora.errors import LoraCorrupt, LoraError, LoraNotFound, SourceInvalid
from lora.fetch.sources import Reference
from lora.formats.adapter import load
from lora.library.catalog import TRAINING, Catalog, Query
from lora.library.states import read_state
from lora.volume.cache import Limits, VolumeCache
from lora.volume.loader import LoraLibrary
from tests.adapters import SELF_ATTENTION, as_bytes, kohya, loha, randn, sd15, write

BASE = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture
def cache(tmp_path: Path) -> VolumeCache:
    found = VolumeCache(tmp_path / "loras", Limits())
    found.shelf.prepare()
    return found


@pytest.fixture
def root(cache: VolumeCache) -> Path:
    return cache.shelf.root


@pytest.fixture
def training(tmp_path: Path) -> Path:
    folder = tmp_path / "training"
    folder.mkdir()
    return folder


@pytest.fixture
def catalog(cache: VolumeCache, engine: LoraEngine, training: Path) -> Catalog:
    return Catalog(cache, engine.key_map, training, BASE)


def peft_tensors(rank: int = 4) -> dict[str, torch.Tensor]:
    stem = f"base_model.model.{SELF_ATTENTION}"
    return {
        f"{stem}.lora_A.weight": randn(rank, 64, seed=1),
        f"{stem}.lora_B.weight": randn(64, rank, seed=2),
    }


def peft(folder: Path, ending: str = ".safetensors", **config: Any) -> Path:
    """A folder as PEFT saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    if ending == ".safetensors":
        save_file(peft_tensors(), folder / "adapter_model.safetensors")
    else:
        torch.save(peft_tensors(), folder / f"adapter_model{ending}")
    fields = {"r": 4, "lora_alpha": 16, "peft_type": "LORA", "base_model_name_or_path": BASE}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return folder


def listed(catalog: Catalog, **query: Any) -> list[str]:
    return [item.name for item in catalog.page(Query(**query)).items]


def standing(catalog: Catalog) -> dict[str, str]:
    return {item.name: str(item.state.state) for item in catalog.page(Query(per_page=1000)).items}


# --- finding -------------------------------------------------------------------------------------


def test_a_scan_finds_files_and_peft_folders_on_the_volume_and_where_trainers_write(
    catalog: Catalog, root: Path, training: Path
) -> None:
    write(root / "b.safetensors", kohya())
    (root / "styles").mkdir()
    write(root / "styles" / "a.safetensors", loha())
    torch.save(kohya(), root / "old.pt")
    peft(root / "peft" / "fox")
    peft(training / "run" / "checkpoint-500")
    write(training / "run" / "last.safetensors", kohya())
    for name in ("optimizer.pt", "scheduler.bin", "rng_state_0.pth", "training_args.bin"):
        torch.save({"a": torch.ones(1)}, training / "run" / "checkpoint-500" / name)
    write(root / ".incoming" / "x.safetensors", kohya())
    scanned = catalog.scan()
    assert listed(catalog) == [
        "b.safetensors",
        "old.pt",
        "peft/fox",
        "styles/a.safetensors",
        "training:run/checkpoint-500",
        "training:run/last.safetensors",
    ]
    assert (dict(scanned.standings), scanned.looked_at) == ({"discovered": 6}, 6)
    assert (root / "b.safetensors.state.json").is_file()
    assert (root / "peft" / "fox.state.json").is_file()
    assert (training / "run" / "checkpoint-500.state.json").is_file()
    assert catalog.scan().looked_at == 0


def test_the_header_alone_tells_what_an_adapter_is(catalog: Catalog, root: Path) -> None:
    tags = {"10_ohwx woman": {"portrait": 9, "smile": 4}, "bad": {}}
    about = {
        "modelspec.trigger_phrase": "wtrclr, by hand",
        "ss_tag_frequency": json.dumps(tags),
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    write(root / "a.safetensors", kohya(), about)
    write(root / "b.safetensors", loha(), {"ss_tag_frequency": "[1"})
    write(root / "c.safetensors", {**sd15(), "bundle_emb.fox.clip_l": torch.ones(1, 32)})
    peft(root / "d")
    catalog.scan()
    states = {item.name: item.state for item in catalog.page(Query()).items}
    a = states["a.safetensors"]
    assert (a.algorithm, a.rank, a.layers, a.base) == ("lora", 4, 3, "SDXL")
    assert a.words == ("wtrclr", "by hand", "ohwx woman", "bad", "portrait", "smile")
    b = states["b.safetensors"]
    assert (b.algorithm, b.rank, b.layers, b.words) == ("loha", 3, 1, ())
    c = states["c.safetensors"]
    assert (c.algorithm, c.base, c.words) == ("lora+textual inversion", "SD 1.5", ("fox",))
    assert (states["d"].algorithm, states["d"].rank) == ("lora", 4)


def test_what_already_the_header_shows_is_failed(catalog: Catalog, root: Path) -> None:
    whole = write(root / "a.safetensors", kohya()).read_bytes()
    (root / "cut.safetensors").write_bytes(whole[:-10])
    (root / "page.safetensors").write_bytes(b"<!doctype html>")
    torch.save(kohya(), root / "cut.pt")
    os.truncate(root / "cut.pt", 5000)
    (peft(root / "noconfig") / "adapter_config.json").unlink()
    (peft(root / "noweights") / "adapter_model.safetensors").unlink()
    os.truncate(peft(root / "cutpeft") / "adapter_model.safetensors", 1000)
    scanned = catalog.scan()
    assert dict(scanned.standings) == {"failed": 6, "discovered": 1}
    reasons = {item.name: item.state.reason or "" for item in catalog.page(Query()).items}
    assert "10 bytes are missing" in reasons["cut.safetensors"]
    assert "web page" in reasons["page.safetensors"]
    assert reasons["cut.pt"] == "the pickle was cut off"
    assert reasons["noconfig"].startswith("the folder has no adapter_config.json")
    assert reasons["noweights"].startswith(
        "the folder has adapter_config.json and no adapter_model"
    )
    assert "bytes are missing" in reasons["cutpeft"]
    assert not reasons["a.safetensors"]


def test_a_folder_that_is_itself_what_peft_saved_is_found(catalog: Catalog, training: Path) -> None:
    peft(training)
    assert catalog.activate("training:adapter_model").state.state == "active"
    (training / "adapter_config.json").rename(training / "aside")
    assert catalog.scan().standings["failed"] == 1
    (training / "aside").rename(training / "adapter_config.json")
    (training / "adapter_model.safetensors").unlink()
    assert catalog.scan().standings["failed"] == 1
    assert standing(catalog)["training:adapter_config.json"] == "failed"
    assert catalog.activate("training:adapter_config.json").state.state == "failed"
    catalog.delete("training:adapter_config.json")
    assert list(training.glob("adapter_config*")) == []


@pytest.mark.parametrize("change", ["weights", "config"])
def test_a_changed_adapter_is_discovered_again(catalog: Catalog, root: Path, change: str) -> None:
    folder = peft(root / "fox")
    assert catalog.activate("fox").state.state == "active"
    if change == "weights":
        save_file(peft_tensors(rank=8), folder / "adapter_model.safetensors")
    else:
        peft(folder, lora_alpha=32)
    assert standing(catalog) == {"fox": "discovered"}
    assert catalog.scan().looked_at == 1
    assert catalog.activate("fox").state.state == "active"


def test_a_scan_undoes_no_activation(catalog: Catalog, root: Path) -> None:
    write(root / "a.safetensors", kohya())
    catalog.activate("a")
    catalog.scan()
    assert standing(catalog) == {"a.safetensors": "active"}


@pytest.mark.parametrize("decision", ["activate", "deactivate"])
@pytest.mark.parametrize("others", [0, 1, 2])
@pytest.mark.parametrize("late", [False, True])
def test_a_decision_in_the_midst_of_scans_stays(
    catalog: Catalog, root: Path, decision: str, others: int, late: bool, monkeypatch: Any
) -> None:
    """A scan takes an old state away; just before, or after that and other scans, somebody decides."""
    write(root / "a.safetensors", kohya())
    catalog.activate("a")
    folder = peft(root / "a-fox")  # not the same adapter: it must not be touched
    write(root / "a.safetensors", kohya(rank=8))
    moved, rename = 0, Path.rename

    def busy(path: Path, target: Path) -> Path:
        nonlocal moved
        moved += 1
        if moved > 1:
            return rename(path, target)
        if not late:
            getattr(catalog, decision)("a")
        result = rename(path, target)
        for _ in range(others):
            catalog.scan()
        if late:
            getattr(catalog, decision)("a")
        return result

    monkeypatch.setattr(Path, "rename", busy)
    catalog.scan()
    assert moved >= 1
    expected = "active" if decision == "activate" else "discovered"
    state = read_state(root / "a.safetensors.state.json")
    assert state
    assert (state.state, state.decided) == (expected, True)
    assert standing(catalog)["a.safetensors"] == expected
    assert folder.is_dir()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"state": "active"}',
        '{"state": "splendid", "size": 1, "mtime_ns": 2}',
    ],
)
def test_a_state_that_makes_no_sense_counts_as_none(
    catalog: Catalog, root: Path, text: str
) -> None:
    path = write(root / "a.safetensors", kohya())
    (root / "a.safetensors.state.json").write_text(text)
    assert standing(catalog) == {"a.safetensors": "discovered"}
    assert catalog.scan().looked_at == 1
    state = read_state(root / "a.safetensors.state.json")
    assert state
    assert state.size == path.stat().st_size


def test_a_state_with_fields_of_the_wrong_type_counts_as_none(catalog: Catalog, root: Path) -> None:
    write(root / "a.safetensors", kohya())
    catalog.activate("a")
    path = root / "a.safetensors.state.json"
    good = json.loads(path.read_text())
    for field, value in (
        ("words", [5]),
        ("source", 7),
        ("rank", "x"),
        ("at", None),
        ("layers", 1.5),
    ):
        path.write_text(json.dumps({**good, field: value}))
        assert read_state(path) is None, field
    path.write_text(json.dumps({**good, "of_a_newer_version": 1}))
    assert standing(catalog) == {"a.safetensors": "active"}


def test_states_of_adapters_that_are_gone_are_swept_after_a_day(
    catalog: Catalog, root: Path
) -> None:
    for name in ("old", "new"):
        write(root / f"{name}.safetensors", kohya())
    catalog.scan()
    for name in ("old", "new"):
        (root / f"{name}.safetensors").unlink()
    long_ago = time.time() - 90_000
    os.utime(root / "old.safetensors.state.json", (long_ago, long_ago))
    catalog.scan()
    assert [path.name for path in root.glob("*.state.json")] == ["new.safetensors.state.json"]
    assert listed(catalog) == []


def test_what_another_worker_did_shows_at_once(
    catalog: Catalog, cache: VolumeCache, engine: LoraEngine, root: Path, training: Path
) -> None:
    other = Catalog(cache, engine.key_map, training, BASE)
    write(root / "a.safetensors", kohya())
    write(root / "b.safetensors", kohya())
    assert listed(catalog) == ["a.safetensors", "b.safetensors"]
    other.activate("a")
    assert standing(catalog) == {"a.safetensors": "active", "b.safetensors": "discovered"}
    other.deactivate("a")
    assert standing(catalog)["a.safetensors"] == "discovered"
    other.delete("b")
    assert listed(catalog) == ["a.safetensors"]


def test_a_read_only_training_folder_is_listed_and_told(
    catalog: Catalog, training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(training / "a.safetensors", kohya())
    (training / ".incoming").write_text("nobody can make a folder of this name")
    scanned = catalog.scan()
    assert dict(scanned.standings) == {"discovered": 1}
    assert scanned.warnings[0].startswith("1 states could not be kept (")
    assert listed(catalog) == ["training:a.safetensors"]


def test_a_training_folder_that_is_not_there_is_told_and_not_made(
    catalog: Catalog, training: Path
) -> None:
    training.rmdir()
    assert catalog.scan().warnings == ("the training folder (LORA_TRAINING_DIR) is not there",)
    assert not training.exists()


def test_links_that_lead_out_of_the_folder_are_passed_over(
    catalog: Catalog, root: Path, training: Path, tmp_path: Path
) -> None:
    outside = write(tmp_path / "secret.safetensors", kohya())
    write(root / "in.safetensors", kohya())
    for folder in (root, training):
        (folder / "out.safetensors").symlink_to(outside)
    (root / "alias.safetensors").symlink_to("in.safetensors")
    assert listed(catalog) == ["alias.safetensors", "in.safetensors"]
    for name in ("out", f"{TRAINING}out"):
        with pytest.raises(SourceInvalid):
            catalog.activate(name)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", f"{TRAINING}../loras/a", "a\0b", "", "gone"]
)
def test_names_that_are_none_are_refused(catalog: Catalog, root: Path, name: str) -> None:
    write(root / "a.safetensors", kohya())
    for action in (catalog.activate, catalog.deactivate, catalog.delete):
        with pytest.raises(LoraNotFound):
            action(name)
    assert (root / "a.safetensors").exists()


# --- listing -------------------------------------------------------------------------------------


def test_a_list_is_filtered_sorted_and_paged(catalog: Catalog, root: Path) -> None:
    for number in range(7):
        about = {"modelspec.trigger_phrase": f"word{number}, Common"}
        write(root / f"lora{number}.safetensors", kohya(seed=number), about)
    write(root / "other.safetensors", loha())
    write(root / "sd.safetensors", sd15())
    catalog.scan()
    catalog.activate("lora3")
    assert listed(catalog, state="active") == ["lora3.safetensors"]
    assert listed(catalog, algorithm="LoHa") == ["other.safetensors"]
    assert listed(catalog, base="sd 1.5") == ["sd.safetensors"]
    assert listed(catalog, word="WORD5") == ["lora5.safetensors"]
    assert listed(catalog, word="ord5") == []
    assert listed(catalog, text="THER") == ["other.safetensors"]
    assert listed(catalog, text="ord2") == ["lora2.safetensors"]
    page = catalog.page(Query(word="common", page=2, per_page=3))
    assert [item.name[4] for item in page.items] == ["3", "4", "5"]
    assert (page.total, page.pages) == (7, 3)
    assert catalog.page(Query(page=99)).items == ()


def test_a_list_of_many_adapters_opens_none_of_them_again(
    catalog: Catalog, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = write(root / "0.safetensors", kohya(rank=1)).read_bytes()
    for number in range(2000):
        (root / f"{number}.safetensors").write_bytes(small)
    assert catalog.scan().looked_at == 2000
    catalog.page(Query())
    opened: list[object] = []
    io_open = io.open

    def noted(file: object, *how: Any, **more: Any) -> Any:
        opened.append(file)
        return io_open(file, *how, **more)

    monkeypatch.setattr(io, "open", noted)
    page = catalog.page(Query(text="77", state="discovered"))
    assert page.total == sum("77" in str(number) for number in range(2000))
    assert opened == []
    catalog.activate("0")
    assert opened  # so they are seen


# --- activating ----------------------------------------------------------------------------------


def test_activation_checks_what_a_load_needs(catalog: Catalog, root: Path) -> None:
    write(root / "a.safetensors", kohya())
    item = catalog.activate("a")
    state = item.state
    assert (state.state, state.reason, item.file) == ("active", None, "a.safetensors")
    assert (state.algorithm, state.rank, state.layers) == ("lora", 4, 3)
    assert state.sha256
    assert [(one.name, one.state) for one in catalog.page(Query()).items] == [(item.name, state)]
    assert json.loads(json.dumps(item.as_answer()))["state"] == "active"


def test_a_pickle_is_activated_as_a_job_reads_it(catalog: Catalog, root: Path) -> None:
    torch.save(kohya(), root / "old.pt")
    assert catalog.activate("old").state.state == "active"
    peft(root / "fox", ".bin")
    assert catalog.activate("fox").state.state == "active"


def nan() -> dict[str, torch.Tensor]:
    return {name: tensor * float("nan") for name, tensor in kohya().items()}


def half_unknown() -> dict[str, torch.Tensor]:
    return {**kohya(), "lora_unet_no_such_layer.lora_up.weight": torch.ones(4, 4)}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (nan, "holds NaN or infinity"),
        (sd15, "the file was made for SD 1.5"),
        (half_unknown, "1 of 10 tensors cannot be used (lora_unet_no_such_layer.lora_up.weight"),
        (lambda: {f"{SELF_ATTENTION}.weight": torch.ones(64, 64)}, "holds a model's own weights"),
    ],
)
def test_what_does_not_load_is_failed_with_the_reason(
    catalog: Catalog, root: Path, make: Any, reason: str
) -> None:
    write(root / "a.safetensors", make())
    item = catalog.activate("a")
    assert item.state.state == "failed"
    assert reason in (item.state.reason or "")
    assert catalog.page(Query()).items[0].state == item.state


def break_config(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "the folder has no adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda f: os.truncate(f / "adapter_model.safetensors", 900), "bytes are missing"),
        (lambda f: os.truncate(f / "adapter_model.safetensors", 0), "the file is empty"),
        (lambda f: break_config(f, "{"), "adapter_config.json is no JSON object"),
        (lambda f: break_config(f, "[1]"), "adapter_config.json is no JSON object"),
        (lambda f: break_config(f, '{"lora_alpha": "x"}'), "adapter_config.json is malformed"),
        (lambda f: break_config(f, '{"base_model_name_or_path": 5}'), "base_model_name_or_path is"),
        (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe"), "is no text"),
        (
            lambda f: peft(f, base_model_name_or_path="someone/flux"),
            "it was trained on 'someone/flux'",
        ),
        (lambda f: peft(f, base_model_name_or_path="/secret/place/m"), "it was trained on 'm'"),
    ],
)
@pytest.mark.parametrize("where", ["cache", "training"])
def test_each_fault_of_a_peft_folder_is_failed_with_its_reason(
    catalog: Catalog, root: Path, training: Path, fault: Any, reason: str, where: str
) -> None:
    fault(peft((root if where == "cache" else training) / "fox"))
    before = sorted(root.rglob("*"))
    item = catalog.activate("fox" if where == "cache" else "training:fox")
    assert item.state.state == "failed", item
    assert reason in (item.state.reason or "")
    assert "secret" not in (item.state.reason or "")
    if where == "training":
        assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    "base",
    ["", None, BASE, BASE.upper(), "/models/stable-diffusion-xl-base-1.0", "FOLDER"],
)
def test_a_base_model_that_is_ours_or_is_there_or_is_not_told_is_no_fault(
    catalog: Catalog, root: Path, tmp_path: Path, base: str | None
) -> None:
    (tmp_path / "some-model").mkdir()
    base = str(tmp_path / "some-model") if base == "FOLDER" else base
    peft(root / "fox", base_model_name_or_path=base)
    assert catalog.activate("fox").state.reason is None


def test_a_job_may_name_what_failed(
    catalog: Catalog, cache: VolumeCache, engine: LoraEngine, root: Path
) -> None:
    write(root / "a.safetensors", half_unknown())
    assert catalog.activate("a").state.state == "failed"
    assert LoraLibrary(cache, engine.key_map).load(Reference("a")).file.layers


def test_a_deactivated_adapter_is_discovered(catalog: Catalog, root: Path) -> None:
    write(root / "a.safetensors", kohya())
    catalog.activate("a")
    assert catalog.deactivate("a").state.state == "discovered"
    catalog.scan()
    assert standing(catalog) == {"a.safetensors": "discovered"}


# --- the training folder -------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_a_trainers_adapter_is_published_with_its_config(
    catalog: Catalog,
    cache: VolumeCache,
    engine: LoraEngine,
    training: Path,
    root: Path,
    ending: str,
) -> None:
    folder = peft(training / "run" / "checkpoint-500", ending)
    item = catalog.activate("training:run/checkpoint-500")
    assert item.state.state == "active"
    assert item.file
    assert item.file.startswith("run_checkpoint-500-")
    loaded = LoraLibrary(cache, engine.key_map).load(Reference(item.file))
    assert loaded.warnings == ()
    plain = training / "plain.safetensors"
    save_file(peft_tensors(), plain)
    config = (folder / "adapter_config.json").read_text()
    beside = load(plain, engine.key_map, "x", config=config)
    weight = torch.zeros(64, 64)
    ours, theirs = (one.layers[0].algorithm.delta(weight) for one in (loaded.file, beside))
    assert torch.equal(ours, theirs)
    assert torch.allclose(
        ours, 4.0 * load(plain, engine.key_map, "x").layers[0].algorithm.delta(weight)
    )
    assert standing(catalog)[item.file] == "active"
    assert loaded.entry.record.source == "training:run/checkpoint-500"
    assert loaded.file.sha256 == item.state.sha256
    assert list((root / ".incoming").iterdir()) == []


def test_a_published_file_keeps_its_bytes_where_there_is_no_config(
    catalog: Catalog, training: Path, root: Path
) -> None:
    path = write(training / "last.safetensors", kohya(), {"ss_network_dim": "4"})
    item = catalog.activate("training:last")
    assert item.file
    assert (root / item.file).read_bytes() == path.read_bytes()


def test_a_newer_version_is_published_beside_the_older(catalog: Catalog, training: Path) -> None:
    peft(training / "fox")
    first = catalog.activate("training:fox").file
    peft(training / "fox", lora_alpha=1)
    second = catalog.activate("training:fox").file
    assert first != second
    assert catalog.activate("training:fox").file == second
    assert {first, second} <= standing(catalog).keys()


def test_an_output_that_still_grows_is_failed_until_it_is_whole(
    catalog: Catalog, training: Path
) -> None:
    whole = write(training / "a.safetensors", kohya()).read_bytes()
    (training / "a.safetensors").write_bytes(whole[:5000])
    catalog.scan()
    assert standing(catalog) == {"training:a.safetensors": "failed"}
    (training / "a.safetensors").write_bytes(whole)
    assert standing(catalog) == {"training:a.safetensors": "discovered"}
    assert catalog.activate("training:a").state.state == "active"


def test_an_adapter_over_the_limit_is_not_published(
    engine: LoraEngine, tmp_path: Path, training: Path
) -> None:
    cache = VolumeCache(tmp_path / "small", Limits(file_bytes=1000))
    write(training / "a.safetensors", kohya())
    item = Catalog(cache, engine.key_map, training).activate("training:a")
    assert (item.state.state, item.file) == ("failed", None)
    assert "over the limit" in (item.state.reason or "")


# --- deleting ------------------------------------------------------------------------------------


def test_what_is_deleted_leaves_nothing(catalog: Catalog, cache: VolumeCache, root: Path) -> None:
    write(root / "a.safetensors", kohya())
    folder = peft(root / "fox")
    (folder / "README.md").write_text("mine")
    for name in ("a", "fox"):
        catalog.activate(name)
        cache.pin(name)
    assert catalog.page(Query()).items[0].adapter.pinned
    assert catalog.delete("a") == "a.safetensors"
    assert catalog.delete("fox") == "fox"
    left = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    assert left == ["fox/README.md"]
    assert catalog.scan().standings == {}


def test_half_a_folder_can_be_deleted(catalog: Catalog, root: Path) -> None:
    (peft(root / "fox") / "adapter_model.safetensors").unlink()
    assert catalog.activate("fox").state.state == "failed"
    assert catalog.delete("fox") == "fox"
    assert listed(catalog) == []


def test_an_adapter_that_changes_while_it_is_checked_is_not_decided(
    catalog: Catalog, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(root / "a.safetensors", kohya())
    read = shutil.copyfile(path, root.parent / "copy")

    def slow(*given: Any, **more: Any) -> Any:
        write(path, kohya(rank=8))
        return load(read, *given[1:], **more)

    monkeypatch.setattr("lora.library.activation.load", slow)
    with pytest.raises(LoraCorrupt) as caught:
        catalog.activate("a")
    assert "was changed while it was checked" in str(caught.value)
    assert standing(catalog) == {"a.safetensors": "discovered"}


@pytest.mark.parametrize("text", ['{"precious": true}', "", "[]", '{"state": "active"}', "\udcff"])
def test_files_that_only_are_named_as_states_are_not_swept(
    catalog: Catalog, root: Path, training: Path, text: str
) -> None:
    long_ago = time.time() - 900_000
    foreign = [
        root / "notes.state.json",
        training / "run" / "optimizer.state.json",
        training / ".git" / "x.state.json",
        root / ".trash" / "y.state.json",
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, errors="surrogateescape")
        os.utime(path, (long_ago, long_ago))
    catalog.scan()
    assert all(path.exists() for path in foreign)


def test_a_hidden_state_of_ours_is_not_swept_either(catalog: Catalog, root: Path) -> None:
    write(root / "a.safetensors", kohya())
    catalog.scan()
    hidden = root / ".trash" / "a.safetensors.state.json"
    hidden.parent.mkdir()
    (root / "a.safetensors.state.json").rename(hidden)
    os.utime(hidden, (1, 1))
    catalog.scan()
    assert hidden.exists()


def test_a_scan_of_a_folder_that_others_change_all_the_time_ends_well(
    catalog: Catalog, root: Path
) -> None:
    ended = threading.Event()

    def churn(number: int) -> None:
        chance, body = random.Random(number), as_bytes(kohya())
        while not ended.is_set():
            folder = root / f"d{chance.randrange(3)}"
            with suppress(OSError):
                folder.mkdir(exist_ok=True)
                file = folder / f"f{chance.randrange(9)}.safetensors"
                file.write_bytes(body[: chance.randrange(len(body))])
                (folder / "loop").symlink_to(folder / "loop")
                if chance.random() < 0.3:
                    shutil.rmtree(folder)

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            catalog.scan()
            catalog.page(Query())
            catalog._shelf.describe()
            catalog._shelf.names()
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("name", ["x" * 300, "画" * 100, "a/" * 2000 + "b", "x\0y", "x" * 240])
def test_names_that_no_file_can_have_are_not_there(catalog: Catalog, name: str) -> None:
    for action in (catalog.activate, catalog.deactivate, catalog.delete):
        with pytest.raises(LoraError) as caught:
            action(name)
        assert caught.value.code in ("LORA_NOT_FOUND", "LORA_SOURCE_INVALID")
