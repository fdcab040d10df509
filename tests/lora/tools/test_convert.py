"""Round trips through every naming, and other algorithms as a LoRA, against the engine's own weights."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo.networks import write_index
from lora.engine.stack import LoraUse
from lora.errors import ToolError
from lora.formats.header import read_header
from lora.formats.names.keys import Target
from lora.formats.names.naming import Naming
from lora.tools import TABLES
from lora.tools import convert as convert_module
from lora.tools.adapters.part_names import in_naming
from lora.tools.adapters.parts import Adapter, Part
from lora.tools.adapters.reading import read_adapter
from lora.tools.adapters.saving import WriteOptions, write_adapter
from lora.tools.convert import ConvertOptions, Goal, convert
from lora.tools.factors.ranks import RankPolicy
from lora.tools.models.checkpoints import Checkpoint
from tests.adapters import randn, write
from tests.conftest import ROOT
from tests.lora.tools import narrow
from tests.lora.tools.narrow import CONV, NORM, SELF

HOLDS = {
    "lora": {"kohya", "diffusers", "peft", "original"},
    "lora_text": {"kohya", "diffusers", "original"},
    "tucker": {"kohya", "original"},
    "dora": {"kohya", "diffusers", "peft", "original"},
    "dora_in": {"kohya", "original"},
    "loha": {"kohya", "peft", "original"},
    "lokr": {"kohya", "peft", "original"},
    "oft": {"kohya", "original"},
    "glora": {"kohya", "original"},
    "ia3": {"kohya", "original"},
    "full": {"kohya", "original"},
    "set_weight": {"kohya", "original"},
    "lora_bias": {"diffusers", "peft"},
    "peft_oft": {"peft"},
    "peft_ia3": {"peft"},
}
"""Algorithm -> the namings that have a place for it."""

WAYS = [(name, *way) for name, held in HOLDS.items() for way in product(sorted(held), sorted(held))]


def slots_in(path: Path, naming: Naming) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor, by module and slot, as a naming has it; alphas apart."""
    adapter = read_adapter(path, narrow.key_map())
    return {
        (str(part.target), slot): tensor
        for part in adapter.parts
        for slot, tensor in in_naming(part, naming).items()
        if slot not in ("alpha", "neumann_terms", "on_input")
        or (slot == "on_input" and "ia3_l" not in part.slots)
    }


@pytest.mark.parametrize(("name", "there", "back"), WAYS)
def test_round_trips_lose_nothing(tmp_path: Path, name: str, there: str, back: str) -> None:
    path = narrow.source(tmp_path, name)
    weights = narrow.merged(LoraUse(narrow.read(path)))
    key_map = narrow.key_map()
    first, second = tmp_path / "first", tmp_path / "second"
    for before, after, naming in ((path, first, there), (first, second, back)):
        write_adapter(after, read_adapter(before, key_map), WriteOptions(Naming(naming)))
        assert narrow.same(narrow.merged(LoraUse(narrow.read(after))), weights)
        one, other = (slots_in(p, Naming(naming)) for p in (path, after))
        assert one.keys() == other.keys()
        for place, tensor in one.items():
            assert torch.equal(tensor, other[place]), place
            assert tensor.dtype == other[place].dtype, place
        scalings = [
            {str(p.target): p.alpha for p in read_adapter(one, key_map).parts}
            for one in (path, after)
        ]
        assert scalings[0] == scalings[1]


@pytest.mark.parametrize("name", HOLDS)
def test_the_other_namings_refuse_the_algorithm(tmp_path: Path, name: str) -> None:
    adapter = read_adapter(narrow.source(tmp_path, name), narrow.key_map())
    for naming in set(Naming) - {Naming(held) for held in HOLDS[name]}:
        with pytest.raises(ToolError):
            write_adapter(tmp_path / "out", adapter, WriteOptions(naming))
        assert not (tmp_path / "out").exists()


DEMO = ROOT / "demo"


@pytest.mark.parametrize("name", ["stripes", "outline", "spiral", "night"])
def test_the_demos_adapters_go_through_every_naming_that_holds_them(
    tmp_path: Path, name: str
) -> None:
    path = DEMO / "loras" / f"demo-{name}.safetensors"
    held = {"night": ("kohya", "original", "peft"), "spiral": ("diffusers", "original", "kohya")}
    with Checkpoint.open(DEMO / "model") as model:
        before = path
        for naming in held.get(name, tuple(Naming)):
            after = tmp_path / f"{naming}"
            convert(before, after, ConvertOptions(WriteOptions(Naming(naming))), model)
            before = after
        key_map = model.key_map()
        one, other = read_adapter(path, key_map), read_adapter(before, key_map)
    assert {str(part.target) for part in one.parts} == {str(part.target) for part in other.parts}
    at = {str(part.target): part for part in other.parts}
    for part in one.parts:
        same = at[str(part.target)]
        assert part.alpha == same.alpha
        for slot in part.slots.keys() - {"alpha"}:
            assert torch.equal(part.slots[slot], same.slots[slot])


def test_sdxls_names_are_known_without_a_model(tmp_path: Path) -> None:
    path = DEMO / "loras" / "demo-stripes.safetensors"
    convert(path, tmp_path / "out.safetensors", ConvertOptions(WriteOptions(Naming.DIFFUSERS)))
    keys = set(read_header(tmp_path / "out.safetensors").tensors)
    assert "unet.down_blocks.0.resnets.0.conv1.lora_A.weight" in keys


def test_a_pickle_becomes_safetensors_with_the_same_tensors(tmp_path: Path) -> None:
    tensors = narrow.tensors_of("loha")
    torch.save(tensors, tmp_path / "a.pt")
    report = convert(tmp_path / "a.pt", tmp_path / "a.safetensors", ConvertOptions())
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert report.changes == ()
    assert report.modules == 2


def test_the_input_is_not_written_over(tmp_path: Path) -> None:
    path = narrow.source(tmp_path, "lora")
    before = path.read_bytes()
    with pytest.raises(ToolError) as caught:
        convert(path, path, ConvertOptions())
    assert "exists already" in str(caught.value)
    assert path.read_bytes() == before


# --- as a LoRA ----------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The narrow model as a checkpoint."""
    folder = tmp_path / "model"
    for name, root in narrow.components().items():
        root.save_pretrained(folder / name)  # type: ignore[operator]
    write_index(folder)
    return folder


def as_lora(path: Path, model: Path, policy: RankPolicy | None, dtype: torch.dtype | None = None):
    output = path.with_name("as-lora.safetensors")
    options = ConvertOptions(WriteOptions(dtype=dtype), Goal.LORA, policy)
    with Checkpoint.open(model) as checkpoint:
        report = convert(path, output, options, checkpoint)
    return output, report


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """What the file does to every parameter that it changes, in float64."""
    found: dict[str, torch.Tensor] = {}
    modules = {
        f"{name}.{path}": parameter
        for name, root in narrow.components().items()
        for path, parameter in root.named_parameters()
    }
    for layer in narrow.read(path).layers:
        name = f"{layer.target}.{layer.parameter}"
        change = layer.algorithm.delta(modules[name].detach()).double()
        found[name] = found[name] + change if name in found else change
    return found


@pytest.mark.parametrize("name", [n for n in HOLDS if n not in ("lora", "lora_text")])
def test_any_algorithm_becomes_a_lora_that_does_the_same_at_full_rank(
    tmp_path: Path, model: Path, name: str
) -> None:
    path = narrow.source(tmp_path, name, torch.float32)
    output, report = as_lora(path, model, RankPolicy(rank=96))
    assert set(narrow.read(output).algorithms) <= {"lora", "full"}
    before, after = deltas(path), deltas(output)
    assert before.keys() == after.keys()
    for parameter, change in before.items():
        error = (after[parameter] - change).norm() / change.norm()
        assert error < 2e-6, parameter
    assert report.relative_error < 2e-6


@pytest.mark.parametrize("name", ["loha", "lokr", "full", "tucker", "dora", "oft"])
def test_the_error_is_the_best_of_the_rank_and_as_told(
    tmp_path: Path, model: Path, name: str
) -> None:
    path = narrow.source(tmp_path, name, torch.float32)
    output, report = as_lora(path, model, RankPolicy(rank=2))
    before, after = deltas(path), deltas(output)
    by_name = {change.name: change for change in report.changes}
    for parameter, change in before.items():
        if change.dim() < 2:
            assert torch.equal(after[parameter], change)
            continue
        told = by_name.get(parameter.removesuffix(".weight"))
        assert told is not None
        matrix = change.flatten(1)
        best = torch.linalg.svdvals(matrix)[2:].norm()
        measured = (after[parameter].flatten(1) - matrix).norm()
        assert measured <= best * 1.01
        assert told.relative_error == pytest.approx(float(measured / matrix.norm()), rel=1e-3)
        assert told.rank == 2


@pytest.mark.parametrize(
    "name", ["dora", "oft", "glora", "ia3", "set_weight", "peft_oft", "peft_ia3"]
)
def test_what_depends_on_the_weights_needs_the_model(tmp_path: Path, name: str) -> None:
    adapter = read_adapter(narrow.source(tmp_path, name), narrow.key_map())
    options = ConvertOptions(algorithm=Goal.LORA, policy=RankPolicy(rank=4))
    with pytest.raises(ToolError) as caught:
        convert_module.as_lora(adapter, options)
    assert "--model" in str(caught.value)


def test_a_loha_needs_a_rank_and_shapes(tmp_path: Path, model: Path) -> None:
    path = narrow.source(tmp_path, "loha")
    with pytest.raises(ToolError) as caught:
        as_lora(path, model, None)
    assert "--rank" in str(caught.value)
    with pytest.raises(ToolError) as caught:
        convert(
            path,
            tmp_path / "out.safetensors",
            ConvertOptions(algorithm=Goal.LORA, policy=RankPolicy(rank=2)),
        )
    assert "--model" in str(caught.value)


def test_a_lora_stays_as_it_is_and_a_core_is_multiplied_out(tmp_path: Path, model: Path) -> None:
    tensors = narrow.tensors_of("tucker", torch.float32) | narrow.tensors_of("lora_text")
    path = write(tmp_path / "a.safetensors", tensors)
    output, report = as_lora(path, model, None)
    written = load_file(output)
    for key in narrow.tensors_of("lora_text"):
        assert torch.equal(written[key], tensors[key])
    assert f"{CONV}.lora_mid.weight" not in written
    assert report.changes == ()
    before, after = deltas(path), deltas(output)
    for parameter, change in before.items():
        assert (after[parameter] - change).norm() < 1e-6 * change.norm()


def test_all_that_changes_a_weight_goes_into_one_product(tmp_path: Path, model: Path) -> None:
    tensors = {
        f"{SELF}.lora_up.weight": randn(64, 4),
        f"{SELF}.lora_down.weight": randn(4, 64, seed=1),
        f"{SELF}.diff": randn(64, 64, seed=2),
    }
    path = write(tmp_path / "a.safetensors", tensors)
    output, report = as_lora(path, model, RankPolicy(rank=64))
    assert narrow.read(output).algorithms == ("lora",)
    (before,), (after,) = deltas(path).values(), deltas(output).values()
    assert (after - before).norm() < 2e-6 * before.norm()
    assert report.relative_error < 2e-6


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_table_of_rows_never_becomes_factors(name: str) -> None:
    target = Target("text_encoder", f"model.{name}", {"weight": (50, 32)}, "BASE")
    adapter = Adapter((Part(target, {"diff": randn(50, 32)}, target.path),))
    options = ConvertOptions(algorithm=Goal.LORA, policy=RankPolicy(rank=2))
    converted, changes = convert_module.as_lora(adapter, options)
    assert [sorted(part.slots) for part in converted.parts] == [["diff"]]
    assert changes == []


def test_a_tables_difference_is_added_to_its_factors() -> None:
    target = Target("text_encoder", "model.token_embedding", {"weight": (50, 32)}, "BASE")
    slots = {"diff": randn(50, 32), "lora_up": randn(50, 2), "lora_down": randn(2, 32)}
    adapter = Adapter((Part(target, slots, target.path),))
    (part,) = convert_module.as_lora(adapter, ConvertOptions(algorithm=Goal.LORA))[0].parts
    whole = slots["diff"] + slots["lora_up"] @ slots["lora_down"]
    assert part.slots.keys() == {"diff"}
    assert torch.allclose(part.slots["diff"], whole, atol=1e-5)


def test_new_values_of_a_norm_and_a_table_become_differences(tmp_path: Path, model: Path) -> None:
    table = "text_encoder.text_model.embeddings.token_embedding"
    tensors = {
        f"{NORM}.set_weight": randn(64),
        f"{NORM}.b_norm": randn(64, seed=1),
        f"{table}.diff": randn(50, 32),
    }
    path = write(tmp_path / "a.safetensors", tensors)
    output, report = as_lora(path, model, None)
    assert report.changes == ()
    assert torch.equal(load_file(output)[f"{table}.diff"], tensors[f"{table}.diff"])
    before, after = deltas(path), deltas(output)
    assert len(before) == 3
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_metadata_says_what_the_file_is_now(tmp_path: Path, model: Path) -> None:
    metadata = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "loha"}',
        "ss_network_dim": "3",
        "ss_output_name": "kept",
    }
    path = write(tmp_path / "a.safetensors", narrow.tensors_of("loha"), metadata)
    output, _ = as_lora(path, model, RankPolicy(rank=2))
    written = read_header(output).metadata
    assert written["ss_network_module"] == "networks.lora"
    assert written["ss_network_dim"] == "2"
    assert written["ss_output_name"] == "kept"
    assert "ss_network_args" not in written


def test_a_budget_is_kept(tmp_path: Path, model: Path) -> None:
    path = narrow.source(tmp_path, "loha", torch.float32)
    budget = 20_000
    output, report = as_lora(path, model, RankPolicy(max_bytes=budget))
    assert output.stat().st_size <= budget
    assert output.stat().st_size > budget / 2
    assert all(change.rank >= 1 for change in report.changes)


def test_unused_tensors_are_told_where_they_are_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {**narrow.tensors_of("lora"), "x": randn(2)})
    with pytest.raises(ToolError):
        convert(path, tmp_path / "b.safetensors", ConvertOptions())
    report = convert(path, tmp_path / "b.safetensors", ConvertOptions(allow_unused=True))
    assert [key for key, _ in report.unused] == ["x"]


def test_progress_is_told(tmp_path: Path, model: Path) -> None:
    told: list[tuple[int, int, str]] = []
    path = narrow.source(tmp_path, "loha")
    options = ConvertOptions(algorithm=Goal.LORA, policy=RankPolicy(rank=2))
    with Checkpoint.open(model) as checkpoint:
        convert(path, tmp_path / "b.safetensors", options, checkpoint, lambda *x: told.append(x))
    assert [done for done, _, _ in told] == [0, 1, 2]
    assert {total for _, total, _ in told} == {2}


# --- others read what we write -------------------------------------------------------------------


def test_diffusers_reads_its_own_naming_with_every_alpha(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    path = narrow.source(tmp_path, "lora", torch.float32)
    adapter = read_adapter(path, narrow.key_map())
    write_adapter(tmp_path / "out.safetensors", adapter, WriteOptions(Naming.DIFFUSERS))
    state, _, metadata = diffusers.StableDiffusionXLPipeline.lora_state_dict(
        tmp_path / "out.safetensors", return_lora_metadata=True
    )
    unet = copy.deepcopy(narrow.components()["unet"])
    unet.load_lora_adapter(state, prefix="unet", metadata=metadata)
    unet.fuse_lora()
    ours = narrow.merged(LoraUse(narrow.read(path)))
    theirs = dict(unet.named_parameters())
    assert len(ours) == 5
    for name, weight in ours.items():
        module, _, parameter = name.removeprefix("unet.").rpartition(".")
        fused = theirs[f"{module}.base_layer.{parameter}"]
        assert torch.allclose(fused, weight, rtol=1e-5, atol=1e-6), name


def test_diffusers_reads_text_encoders_with_and_without_text_model(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    stem = (
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"  # fc1 alone diffusers cannot read
    )
    more = {
        f"{stem}.lora_up.weight": randn(32, 3),
        f"{stem}.lora_down.weight": randn(3, 32, seed=1),
    }
    path = write(tmp_path / "a", {**narrow.tensors_of("lora_text", torch.float32), **more})
    adapter = read_adapter(path, narrow.key_map())
    write_adapter(tmp_path / "out.safetensors", adapter, WriteOptions(Naming.DIFFUSERS))
    pipeline = diffusers.StableDiffusionXLPipeline
    state, _, metadata = pipeline.lora_state_dict(
        tmp_path / "out.safetensors", return_lora_metadata=True
    )
    ours = narrow.merged(LoraUse(narrow.read(path)))
    for component in ("text_encoder", "text_encoder_2"):
        encoder = copy.deepcopy(narrow.components()[component])
        pipeline.load_lora_into_text_encoder(
            state, None, encoder, prefix=component, adapter_name="a", metadata=metadata
        )
        modules = dict(encoder.named_modules())
        names = [name for name in ours if name.startswith(f"{component}.")]
        assert len(names) == (1 if component == "text_encoder" else 2)
        for name in names:
            module = modules[name.removeprefix(f"{component}.").removesuffix(".weight")]
            merged = module.base_layer.weight + module.get_delta_weight("a")
            assert torch.allclose(merged, ours[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lora", "dora", "lora_bias", "loha", "peft_oft"])
def test_peft_reads_its_own_naming(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    path = narrow.source(tmp_path, name, torch.float32)
    adapter = read_adapter(path, narrow.key_map())
    if name == "lora_bias":  # peft merges it into layers with a bias alone
        adapter = replace(
            adapter, parts=tuple(p for p in adapter.parts if "lora_up_bias" in p.slots)
        )
    write_adapter(tmp_path / "peft", adapter, WriteOptions(Naming.PEFT))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] in ("LORA", "LOHA", "OFT")
    unet = copy.deepcopy(narrow.components()["unet"])
    loaded = peft.PeftModel.from_pretrained(unet, tmp_path / "peft")
    result = dict(loaded.merge_and_unload().named_parameters())
    ours = narrow.merged(LoraUse(narrow.read(tmp_path / "peft")))
    for key, weight in ours.items():
        found = result[key.removeprefix("unet.")]
        assert torch.allclose(found, weight, rtol=1e-4, atol=1e-5), key
