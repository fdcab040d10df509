"""What counts as an adapter in a folder, and what belongs to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora.volume.adapters import StoredAdapter, adapter_at, adapters_in, delete
from lora.volume.records import pin_path, record_path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"1234")
    return path


def peft(folder: Path, *weights: str) -> Path:
    for name in (*weights, "adapter_config.json"):
        touch(folder / name)
    return folder


def found(root: Path) -> dict[str, tuple[str | None, str | None]]:
    """Name -> weights and config of each adapter."""
    return {one.path: (one.weights, one.config) for one in adapters_in(root)}


def at(root: Path, path: str) -> StoredAdapter:
    adapter = adapter_at(root, path)
    assert adapter
    return adapter


def left(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_files_and_peft_folders_are_adapters(tmp_path: Path) -> None:
    for name in ("a.safetensors", "sub/b.pt", "notes.txt", "sub/config.json"):
        touch(tmp_path / name)
    peft(tmp_path / "fox", "adapter_model.safetensors", "adapter_model.bin")
    peft(tmp_path / "half")
    touch(tmp_path / "bare" / "adapter_model.bin")
    assert found(tmp_path) == {
        "a.safetensors": ("a.safetensors", None),
        "sub/b.pt": ("sub/b.pt", None),
        "fox": ("fox/adapter_model.safetensors", "fox/adapter_config.json"),
        "half": (None, "half/adapter_config.json"),
        "bare": ("bare/adapter_model.bin", None),
    }


def test_a_root_that_peft_saved_is_named_by_its_file(tmp_path: Path) -> None:
    peft(tmp_path)
    assert found(tmp_path) == {"adapter_config.json": (None, "adapter_config.json")}
    touch(tmp_path / "adapter_model.safetensors")
    both = "adapter_model.safetensors", "adapter_config.json"
    assert found(tmp_path) == {"adapter_model.safetensors": both}


def test_hidden_names_and_links_that_lead_out_are_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in (".hidden.safetensors", ".incoming/a.safetensors", "a.safetensors"):
        touch(root / name)
    (root / "out.safetensors").symlink_to(touch(tmp_path / "secret.safetensors"))
    (root / "folder").symlink_to(peft(tmp_path / "elsewhere", "adapter_model.safetensors"))
    (root / "alias.safetensors").symlink_to("a.safetensors")
    (root / "dangling.safetensors").symlink_to("nothing")
    (root / "circle.safetensors").symlink_to("circle.safetensors")
    assert found(root).keys() == {"a.safetensors", "alias.safetensors"}


def test_one_adapter_is_what_the_walk_says_of_it(tmp_path: Path) -> None:
    for name in ("a.safetensors", "sub/b.bin"):
        pin_path(touch(tmp_path / name)).touch()
    peft(tmp_path / "sub" / "fox", "adapter_model.safetensors")
    peft(tmp_path / "half")
    peft(tmp_path)
    adapters = list(adapters_in(tmp_path))
    assert len(adapters) == 5
    for adapter in adapters:
        assert adapter_at(tmp_path, adapter.path) == adapter
    assert at(tmp_path, "sub/fox/adapter_model.safetensors").path == "sub/fox"
    for path in ("", "sub", "gone", "half/adapter_config.json", "a.safetensors.pin", "a\0b"):
        assert adapter_at(tmp_path, path) is None


def test_another_size_or_time_of_weights_or_config_is_another_version(tmp_path: Path) -> None:
    folder = peft(tmp_path / "fox", "adapter_model.safetensors")
    versions = {at(tmp_path, "fox").version}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_bytes(b"more than four")
        versions.add(at(tmp_path, "fox").version)
    (folder / "adapter_config.json").unlink()
    versions.add(at(tmp_path, "fox").version)
    assert len(versions) == 4


@pytest.mark.parametrize("name", ["a.safetensors", "fox", "half"])
def test_what_is_deleted_leaves_nothing_and_the_others_stay(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "other.safetensors")
    touch(tmp_path / "a.safetensors")
    peft(tmp_path / "fox", "adapter_model.safetensors", "adapter_model.bin")
    peft(tmp_path / "half")
    for weights in [
        path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".bin")
    ]:
        record_path(weights).write_text(json.dumps({}))
        pin_path(weights).touch()
    adapter = at(tmp_path, name)
    adapter.state_path.touch()
    others = [path for path in left(tmp_path) if not path.startswith(name)]
    delete(adapter)
    assert left(tmp_path) == others


def test_a_folder_with_something_else_in_it_stays(tmp_path: Path) -> None:
    touch(peft(tmp_path / "fox", "adapter_model.safetensors") / "README.md")
    delete(at(tmp_path, "fox"))
    assert left(tmp_path) == ["fox", "fox/README.md"]


def test_the_state_goes_before_the_weights_and_these_before_their_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft(tmp_path / "fox", "adapter_model.safetensors")
    adapter = at(tmp_path, "fox")
    adapter.state_path.touch()
    gone: list[str] = []
    unlink = Path.unlink

    def noted(self: Path, missing_ok: bool = False) -> None:
        if self.exists():
            gone.append(self.name)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", noted)
    delete(adapter)
    assert gone == ["fox.state.json", "adapter_model.safetensors", "adapter_config.json"]
