"""Adapter files read and written: every tensor accounted for, scalings equal, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from lora.engine.stack import LoraUse
from lora.errors import LoraCorrupt, LoraIncompatible, LoraNotFound, LoraUnsupported, ToolError
from lora.formats.header import read_header
from lora.formats.names.keys import KeyMap
from lora.formats.names.naming import Naming
from lora.tools.adapters.hashes import hashes_of
from lora.tools.adapters.parts import Adapter, Part
from lora.tools.adapters.peft_configs import ConfigPart, config_of
from lora.tools.adapters.reading import read_adapter
from lora.tools.adapters.saving import Format, WriteOptions, write_adapter
from tests.adapters import randn, write
from tests.lora.tools import narrow
from tests.lora.tools.narrow import CONV, CONV_DIFFUSERS, SELF, SELF_DIFFUSERS


def slots(adapter: Adapter) -> dict[str, dict[str, torch.Tensor]]:
    return {str(part.target): dict(part.slots) for part in adapter.parts}


def target(path: str) -> Part:
    found = narrow.key_map().find(path)
    assert found is not None
    return Part(
        found, {"lora_up": randn(64, 2), "lora_down": randn(2, 64), "alpha": torch.tensor(1.0)}
    )


@pytest.mark.parametrize("name", narrow.NAMES)
def test_every_tensor_of_a_file_is_in_a_part(tmp_path: Path, name: str) -> None:
    path = narrow.source(tmp_path, name)
    for key_map in (narrow.key_map(), None):
        adapter = read_adapter(path, key_map)
        keys = [key for part in adapter.parts for key in part.keys.values()]
        assert sorted(keys) == sorted(narrow.tensors_of(name))
        assert adapter.unused == ()
        for part in adapter.parts:
            for slot, key in part.keys.items():
                assert torch.equal(part.slots[slot], narrow.tensors_of(name)[key])


@pytest.mark.parametrize("name", narrow.NAMES)
def test_a_file_written_under_its_own_keys_is_the_same(tmp_path: Path, name: str) -> None:
    path = narrow.source(tmp_path, name)
    for key_map in (narrow.key_map(), None):
        options = WriteOptions(overwrite=True)
        write_adapter(tmp_path / "out.safetensors", read_adapter(path, key_map), options)
        before, after = load_file(path), load_file(tmp_path / "out.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert all(before[key].dtype == after[key].dtype for key in before)


def test_a_tensor_that_no_algorithm_has_is_an_error_unless_allowed(tmp_path: Path) -> None:
    tensors = {**narrow.tensors_of("lora"), f"{SELF}.what": randn(3), "nothing.known": randn(3)}
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ToolError) as caught:
        read_adapter(path, narrow.key_map())
    assert "cannot be carried" in str(caught.value)
    adapter = read_adapter(path, narrow.key_map(), allow_unused=True)
    reasons = {one.key: one.reason for one in adapter.unused}
    # the module with the unknown tensor is left out whole
    assert set(reasons) == {k for k in tensors if k.startswith(f"{SELF}.")} | {"nothing.known"}
    assert "no module of this model" in reasons["nothing.known"]


def test_half_a_layer_is_not_carried(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {f"{SELF}.lora_up.weight": randn(64, 2)})
    with pytest.raises(LoraUnsupported) as caught:
        read_adapter(path)
    assert "missing" in str(caught.value)


def test_a_layer_of_another_shape_is_not_carried_for_a_model(tmp_path: Path) -> None:
    tensors = {f"{SELF}.lora_up.weight": randn(32, 2), f"{SELF}.lora_down.weight": randn(2, 64)}
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(LoraIncompatible) as caught:
        read_adapter(path, narrow.key_map())
    assert "do not fit the layer" in str(caught.value)
    assert len(read_adapter(path, narrow.key_map(), check_shapes=False).parts) == 1


def test_words_for_the_prompt_are_carried(tmp_path: Path) -> None:
    word = {"bundle_emb.cat.clip_l": randn(2, 32)}
    path = write(tmp_path / "a.safetensors", {**narrow.tensors_of("lora"), **word})
    write_adapter(tmp_path / "b.safetensors", read_adapter(path), WriteOptions())
    written = load_file(tmp_path / "b.safetensors")
    assert torch.equal(written["bundle_emb.cat.clip_l"], word["bundle_emb.cat.clip_l"])


def test_a_pickle_is_read_as_its_tensors(tmp_path: Path) -> None:
    tensors = narrow.tensors_of("lora")
    torch.save({"state_dict": tensors}, tmp_path / "a.pt")
    adapter = read_adapter(tmp_path / "a.pt", narrow.key_map())
    found = {k: p.slots[s] for p in adapter.parts for s, k in p.keys.items()}
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path: Path) -> None:
    tensors = {f"{SELF}.diff": randn(64, 64)}
    filler = "x"
    while int.from_bytes(save(tensors, {"a": filler})[:2], "little") not in (0x0280, 0x0480):
        filler += "x" * 8
    path = write(tmp_path / "a.safetensors", tensors, {"a": filler})
    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04")
    assert len(read_adapter(path).parts) == 1


def test_what_is_no_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(LoraNotFound):
        read_adapter(tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoraNotFound):
        read_adapter(tmp_path / "empty")
    (tmp_path / "web.safetensors").write_text("<html>log in</html>")
    with pytest.raises(LoraCorrupt):
        read_adapter(tmp_path / "web.safetensors")
    torch.save({"a": print}, tmp_path / "code.pt")
    with pytest.raises(LoraUnsupported):
        read_adapter(tmp_path / "code.pt")


def peft_folder(folder: Path, config: dict[str, object]) -> Path:
    folder.mkdir()
    path = SELF_DIFFUSERS.removeprefix("unet.")
    tensors = {
        f"base_model.model.{path}.lora_A.weight": randn(4, 64),
        f"base_model.model.{path}.lora_B.weight": randn(64, 4, seed=1),
    }
    write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"lora_alpha": 8}, 8.0),
        ({"lora_alpha": 8, "use_rslora": True}, 16.0),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 3}}, 3.0),
        ({}, 8.0),
    ],
)
def test_a_peft_folders_scaling_is_in_the_parts_alpha(
    tmp_path: Path, config: dict[str, object], alpha: float
) -> None:
    folder = peft_folder(tmp_path / "peft", config)
    for key_map in (narrow.key_map(), None):
        (part,) = read_adapter(folder, key_map).parts
        assert part.alpha == alpha
        assert part.rank == 4


def test_rs_lora_becomes_a_plain_alpha_in_every_naming(tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 3, "use_rslora": True}
    adapter = read_adapter(peft_folder(tmp_path / "peft", config), narrow.key_map())
    weights = narrow.merged(LoraUse(narrow.read(tmp_path / "peft")))
    for naming in Naming:
        output = tmp_path / f"{naming}.safetensors"
        write_adapter(output, adapter, WriteOptions(naming))
        assert narrow.same(narrow.merged(LoraUse(narrow.read(output))), weights)
    written = json.loads((tmp_path / "peft.safetensors" / "adapter_config.json").read_text())
    assert written["lora_alpha"] == 6.0
    assert written["use_rslora"] is False


def test_a_config_tells_layers_with_another_rank_or_alpha_apart(tmp_path: Path) -> None:
    adapter = read_adapter(narrow.source(tmp_path, "lora"), narrow.key_map())
    write_adapter(tmp_path / "out.safetensors", adapter, WriteOptions(Naming.DIFFUSERS))
    metadata = read_header(tmp_path / "out.safetensors").metadata
    config = json.loads(metadata["lora_adapter_metadata"])
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    assert config["unet.r"] in (2, 4)
    found = {
        path: (
            config["unet.rank_pattern"].get(path, config["unet.r"]),
            config["unet.alpha_pattern"].get(path, config["unet.lora_alpha"]),
        )
        for path in (f"{block}.attn1.to_q", f"{block}.attn2.to_k", "conv_in")
    }
    assert found == {
        f"{block}.attn1.to_q": (4, 1.5),
        f"{block}.attn2.to_k": (3, 3.0),  # no alpha: alpha = rank
        "conv_in": (2, 1.5),
    }


def test_a_name_that_ends_anothers_has_an_entry_of_its_own(tmp_path: Path) -> None:
    # PEFT takes the first entry that the name ends in: `conv_in` would also catch `deep.conv_in`.
    one = {"lora_up": randn(4, 2), "lora_down": randn(2, 4)}
    parts = [
        ConfigPart("conv_in", one, 2, 5.0),
        ConfigPart("deep.conv_in", one, 2, 2.0),
        ConfigPart("other.x", one, 2, 2.0),
    ]
    config = config_of(parts)
    assert config["lora_alpha"] == 2.0
    assert list(config["alpha_pattern"].items()) == [("deep.conv_in", 2.0), ("conv_in", 5.0)]
    shapes = {part.path: {"weight": (4, 4)} for part in parts}
    key_map = KeyMap({"unet": shapes})
    adapter = Adapter(
        tuple(
            Part(t, {s: v.clone() for s, v in one.items()} | {"alpha": torch.tensor(p.alpha)})
            for p in parts
            if (t := key_map.find(f"unet.{p.path}"))
        ),
        key_map=key_map,
    )
    write_adapter(tmp_path / "out.safetensors", adapter, WriteOptions(Naming.DIFFUSERS))
    read = read_adapter(tmp_path / "out.safetensors", key_map)
    assert {p.target.path: p.alpha for p in read.parts} == {p.path: p.alpha for p in parts}


def test_alphas_stay_exact_when_the_dtype_changes(tmp_path: Path) -> None:
    part = target(SELF_DIFFUSERS)
    exact = Part(part.target, {**part.slots, "alpha": torch.tensor(1 / 3)})
    adapter = Adapter((exact,), key_map=narrow.key_map())
    for naming in Naming:
        output = tmp_path / f"{naming}"
        write_adapter(output, adapter, WriteOptions(naming, torch.bfloat16))
        (read,) = read_adapter(output, narrow.key_map()).parts
        assert read.alpha == float(torch.tensor(1 / 3))
        assert read.slots["lora_up"].dtype == torch.bfloat16


def test_a_number_that_overflows_the_dtype_is_an_error(tmp_path: Path) -> None:
    part = target(SELF_DIFFUSERS)
    large = Part(part.target, {**part.slots, "lora_up": torch.full((64, 2), 1e6)})
    with pytest.raises(ToolError) as caught:
        write_adapter(
            tmp_path / "out.safetensors",
            Adapter((large,), key_map=narrow.key_map()),
            WriteOptions(Naming.KOHYA, torch.float16),
        )
    assert "overflows float16" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "naming"),
    [
        ("tucker", Naming.DIFFUSERS),
        ("loha", Naming.DIFFUSERS),
        ("full", Naming.PEFT),
        ("lora_text", Naming.PEFT),
        ("dora_in", Naming.PEFT),
        ("lora_bias", Naming.KOHYA),
        ("peft_ia3", Naming.ORIGINAL),
    ],
)
def test_what_a_naming_cannot_hold_is_refused_and_leaves_nothing(
    tmp_path: Path, name: str, naming: Naming
) -> None:
    adapter = read_adapter(narrow.source(tmp_path, name), narrow.key_map())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ToolError):
        write_adapter(tmp_path / "out.safetensors", adapter, WriteOptions(naming))
    assert sorted(tmp_path.iterdir()) == before


def test_pefts_dora_is_for_all_layers_or_for_none(tmp_path: Path) -> None:
    tensors = narrow.tensors_of("dora")
    del tensors[f"{CONV}.dora_scale"]
    adapter = read_adapter(write(tmp_path / "a.safetensors", tensors), narrow.key_map())
    with pytest.raises(ToolError) as caught:
        write_adapter(tmp_path / "peft", adapter, WriteOptions(Naming.PEFT))
    assert "DoRA for all layers or for none" in str(caught.value)


def test_names_need_a_model(tmp_path: Path) -> None:
    adapter = read_adapter(narrow.source(tmp_path, "lora"))
    with pytest.raises(ToolError) as caught:
        write_adapter(tmp_path / "out.safetensors", adapter, WriteOptions(Naming.DIFFUSERS))
    assert "--model" in str(caught.value)


def test_kohyas_hashes_are_kohyas(tmp_path: Path) -> None:
    """As sd-scripts computes them, on a file that reaches behind the first MiB."""
    tensors = {f"{SELF}.diff": randn(64, 64), f"{CONV}.diff": randn(600, 1000)}
    metadata = {"ss_network_dim": "4", "modelspec.title": "ü", "sshs_model_hash": "stale"}
    path = write(tmp_path / "a.safetensors", tensors, metadata)
    write_adapter(tmp_path / "b.safetensors", read_adapter(path))
    stream = BytesIO(save(tensors, {"ss_network_dim": "4"}))
    length = int.from_bytes(stream.read(8), "little")
    stream.seek(8 + length)
    model_hash = hashlib.sha256(stream.read()).hexdigest()
    stream.seek(0x100000)
    legacy_hash = hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]
    written = read_header(tmp_path / "b.safetensors").metadata
    assert written["sshs_model_hash"] == model_hash
    assert written["sshs_legacy_hash"] == legacy_hash
    assert written["modelspec.hash_sha256"] == f"0x{model_hash}"
    assert written["modelspec.title"] == "ü"
    told = hashes_of(tmp_path / "b.safetensors")
    assert (told.model_hash, told.legacy_hash) == (model_hash, legacy_hash)


def test_kohyas_hash_of_a_file_without_trainers_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {f"{CONV}.diff": randn(600, 1000)})
    write_adapter(tmp_path / "b.safetensors", read_adapter(path))
    written = read_header(tmp_path / "b.safetensors").metadata["sshs_legacy_hash"]
    assert written == hashes_of(tmp_path / "b.safetensors").legacy_hash


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    metadata = {f"ss_{letter}": letter for letter in "abcdefghijklmnop"}
    path = write(tmp_path / "a.safetensors", narrow.tensors_of("lora"), metadata)
    for name in ("one", "two"):
        write_adapter(tmp_path / name, read_adapter(path))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_pytorch_file_holds_the_tensors_alone(tmp_path: Path) -> None:
    adapter = read_adapter(narrow.source(tmp_path, "lora"), narrow.key_map())
    options = WriteOptions(Naming.KOHYA, format=Format.PYTORCH)
    write_adapter(tmp_path / "out.pt", adapter, options)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(narrow.tensors_of("lora")) <= set(found)
    diffusers = WriteOptions(Naming.DIFFUSERS, format=Format.PYTORCH)
    with pytest.raises(ToolError) as caught:
        write_adapter(tmp_path / "lost.pt", adapter, diffusers)
    assert "metadata" in str(caught.value)
    assert not (tmp_path / "lost.pt").exists()


@pytest.mark.parametrize(("name", "kind"), [("a.safetensors", "pytorch"), ("a.pt", "safetensors")])
def test_a_file_is_not_named_as_the_other_format(tmp_path: Path, name: str, kind: str) -> None:
    adapter = read_adapter(narrow.source(tmp_path, "lora"), narrow.key_map())
    with pytest.raises(ToolError, match=f"no name for a {kind} file"):
        write_adapter(tmp_path / name, adapter, WriteOptions(format=Format(kind)))
    assert not (tmp_path / name).exists()


def test_a_peft_folder_in_pytorchs_format_is_read_again(tmp_path: Path) -> None:
    adapter = read_adapter(narrow.source(tmp_path, "lora"), narrow.key_map())
    write_adapter(tmp_path / "peft", adapter, WriteOptions(Naming.PEFT, format=Format.PYTORCH))
    assert sorted(p.name for p in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.bin",
    ]
    read = read_adapter(tmp_path / "peft", narrow.key_map())
    alphas = {str(part.target): part.alpha for part in adapter.parts}
    assert {str(part.target): part.alpha for part in read.parts} == alphas


def test_a_folder_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    adapter = read_adapter(narrow.source(tmp_path, "lora"), narrow.key_map())
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "mine").write_text("kept")
    with pytest.raises(ToolError):
        write_adapter(tmp_path / "peft", adapter, WriteOptions(Naming.PEFT))
    assert [p.name for p in (tmp_path / "peft").iterdir()] == ["mine"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    adapter = read_adapter(narrow.source(tmp_path, "lora"), narrow.key_map())
    with pytest.raises(ToolError) as caught:
        write_adapter(tmp_path / "none" / "out.safetensors", adapter)
    assert "cannot be written" in str(caught.value)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ToolError):
        write_adapter(tmp_path / "folder", adapter)
    assert sorted(tmp_path.rglob("*")) == before


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may become longer than 4 KB: what a write then gets is what a full disk gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("naming", [None, Naming.DIFFUSERS, Naming.PEFT])
@pytest.mark.parametrize("written", Format)
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, naming: Naming | None, written: Format
) -> None:
    tensors = {k: t for k, t in narrow.tensors_of("lora").items() if "alpha" not in k}
    adapter = read_adapter(write(tmp_path / "a.safetensors", tensors), narrow.key_map())
    output = tmp_path / "out"
    if naming is not Naming.PEFT:
        output.write_text("before")
    before = sorted(tmp_path.rglob("*"))
    with full_disk(), pytest.raises(ToolError) as caught:
        write_adapter(output, adapter, WriteOptions(naming, format=written, overwrite=True))
    assert "no room on the disk" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert naming is Naming.PEFT or output.read_text() == "before"


def test_a_reader_of_what_was_there_goes_on_reading_it(tmp_path: Path) -> None:
    adapter = read_adapter(narrow.source(tmp_path, "lora"))
    output = tmp_path / "out"
    output.write_text("before")
    with output.open() as reader:
        write_adapter(output, adapter, WriteOptions(overwrite=True))
        assert reader.read() == "before"
    assert len(read_adapter(output).parts) == 5


def test_a_file_of_a_model_that_is_not_known_keeps_its_names(tmp_path: Path) -> None:
    stem = "diffusion_model.blocks.0"
    tensors = {
        f"{stem}.self_attn.q.lora_down.weight": randn(2, 8),
        f"{stem}.self_attn.q.lora_up.weight": randn(8, 2),
        f"{stem}.self_attn.q.diff_b": randn(8),
        f"{stem}.diff_m": randn(1, 6, 8),
        f"{stem}.norm3.diff": randn(8),
    }
    path = write(tmp_path / "wan.safetensors", tensors)
    adapter = read_adapter(path)
    assert {part.name for part in adapter.parts} == {stem, f"{stem}.self_attn.q", f"{stem}.norm3"}
    assert adapter.naming is Naming.ORIGINAL
    shapes = {
        "blocks.0": {"modulation": (1, 6, 8)},
        "blocks.0.self_attn.q": {"weight": (8, 8), "bias": (8,)},
        "blocks.0.norm3": {"weight": (8,), "bias": (8,)},
    }
    known = read_adapter(path, KeyMap({"transformer": shapes}))
    write_adapter(tmp_path / "out.safetensors", known, WriteOptions(Naming.ORIGINAL))
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    assert written.keys() - tensors.keys() == {f"{stem}.self_attn.q.alpha"}


def test_1x1_shaped_factors_of_a_linear_layer_get_its_axes(tmp_path: Path) -> None:
    tensors = {
        f"{SELF}.lora_up.weight": randn(64, 2, 1, 1),
        f"{SELF}.lora_down.weight": randn(2, 64, 1, 1, seed=1),
    }
    adapter = read_adapter(write(tmp_path / "a.safetensors", tensors), narrow.key_map())
    write_adapter(tmp_path / "out.safetensors", adapter, WriteOptions(Naming.DIFFUSERS))
    written = load_file(tmp_path / "out.safetensors")
    assert written[f"{SELF_DIFFUSERS}.lora_B.weight"].shape == (64, 2)
    assert torch.equal(
        written[f"{SELF_DIFFUSERS}.lora_A.weight"].flatten(),
        tensors[f"{SELF}.lora_down.weight"].flatten(),
    )


def test_magnitudes_have_each_namings_shape(tmp_path: Path) -> None:
    path = narrow.source(tmp_path, "dora")
    adapter = read_adapter(path, narrow.key_map())
    write_adapter(tmp_path / "d.safetensors", adapter, WriteOptions(Naming.DIFFUSERS))
    written = load_file(tmp_path / "d.safetensors")
    assert written[f"{SELF_DIFFUSERS}.lora_magnitude_vector"].shape == (64,)
    assert written[f"{CONV_DIFFUSERS}.lora_magnitude_vector"].shape == (1, 32, 1, 1)
    back = read_adapter(tmp_path / "d.safetensors", narrow.key_map())
    write_adapter(tmp_path / "k.safetensors", back, WriteOptions(Naming.KOHYA))
    before, after = load_file(path), load_file(tmp_path / "k.safetensors")
    for stem in (SELF, CONV):
        assert torch.equal(before[f"{stem}.dora_scale"], after[f"{stem}.dora_scale"])
