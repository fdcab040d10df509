"""Extraction: the error against exact SVDs, merging back, what is left out, and bad input."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora.engine.stack import LoraUse
from lora.errors import ToolError
from lora.formats.adapter import load
from lora.formats.names.naming import Naming
from lora.tools import Format
from lora.tools.extract import run as extract_run
from lora.tools.extract.options import Conv, ExtractOptions
from lora.tools.extract.plan import Planned, ranks_within
from lora.tools.extract.report import ExtractReport, LayerReport
from lora.tools.extract.run import extract
from lora.tools.factors.ranks import RankPolicy
from lora.tools.merge import MergeOptions, merge
from lora.tools.models.checkpoints import Checkpoint, Place
from lora.tools.writing import StreamWriter, write_errors
from tests.adapters import randn
from tests.conftest import ROOT
from tests.lora.tools import pairs
from tests.lora.tools.pairs import write_model, write_pair

EPS = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def extracted(
    folder: Path, source: Path, target: Path, output: str = "lora.safetensors", **options: Any
) -> ExtractReport:
    options = {"policy": RankPolicy(rank=8), "dtype": torch.float32} | options
    with Checkpoint.open(source) as before, Checkpoint.open(target) as after:
        return extract(before, after, folder / output, ExtractOptions(**options))


def merged(source: Path, lora: Path) -> dict[str, Tensor]:
    output = lora.with_name("merged.safetensors")
    with Checkpoint.open(source) as model:
        merge(model, [LoraUse(lora)], output, MergeOptions())
    return load_file(output)


def layers_of(report: ExtractReport) -> dict[str, LayerReport]:
    return {layer.name.removeprefix("transformer."): layer for layer in report.layers}


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_the_error_is_within_a_hundredth_of_the_best_for_linear_layers_and_convolutions(
    tmp_path: Path, rank: int
) -> None:
    source, target = write_pair(tmp_path, noise=0.002)
    report = extracted(tmp_path, source, target, policy=RankPolicy(rank=rank))
    one, other = load_file(source), load_file(target)
    back = merged(source, report.output)
    for name in pairs.MATRICES:
        difference = (other[name].double() - one[name].double()).flatten(1)
        values = torch.linalg.svdvals(difference)
        best = float(values[rank:].norm())
        mine = float((back[name].double() - other[name].double()).norm())
        layer = layers_of(report)[name]
        assert layer.rank == rank
        assert mine <= 1.01 * best
        assert layer.relative_error == pytest.approx(best / float(values.norm()), rel=0.01)
        assert layer.kept == pytest.approx(1 - (best / float(values.norm())) ** 2, abs=1e-3)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("stored", EPS)
def test_a_rank_as_high_as_the_planted_one_gives_the_target_back(
    tmp_path: Path, dtype: torch.dtype, stored: torch.dtype
) -> None:
    source, target = write_pair(tmp_path, dtype)
    # In half precision the target's own rounding is noise of full rank, below half of its last digit.
    report = extracted(tmp_path, source, target, dtype=stored, verify=True)
    back, wanted = merged(source, report.output), load_file(target)
    for name in wanted:
        if name not in pairs.MATRICES:
            assert torch.equal(back[name], wanted[name]), name
            continue
        apart = (back[name].double() - wanted[name].double()).abs()
        # One rounding of the model's, those of both factors (each of four products is off by two), and
        # what float32 leaves of the decomposition, relative to the change's norm of about 2.
        bound = EPS[dtype] * wanted[name].double().abs().amax() + 2 * EPS[stored] * 0.2 + 1e-6
        assert float(apart.amax()) <= float(bound), name
    assert report.verified is not None
    largest = max(float((back[n].float() - wanted[n].float()).abs().amax()) for n in pairs.MATRICES)
    assert report.verified.largest == pytest.approx(largest)
    assert report.verified.numbers == sum(w.numel() for w in wanted.values()) - 96 * 80
    unequal = sum(int((back[n] != wanted[n]).sum()) for n in wanted)
    assert report.verified.unequal == unequal


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("stored", EPS)
def test_diff_only_gives_the_target_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, stored: torch.dtype
) -> None:
    source, target = write_pair(tmp_path, dtype, noise=0.01)
    report = extracted(tmp_path, source, target, dtype=stored, diff_only=True)
    back, wanted = merged(source, report.output), load_file(target)
    assert {layer.kind for layer in report.layers} == {"diff"}
    assert not report.inexact
    assert all(torch.equal(back[name].float(), wanted[name].float()) for name in wanted)


def test_diff_only_of_float32_says_where_it_is_not_exact(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path, noise=0.01)
    tensors = load_file(target)
    tensors[pairs.LINEAR][0, 0] = 1e-12  # no float32 leads from 0.1 to it
    write_model(target, tensors)
    report = extracted(tmp_path, source, target, diff_only=True)
    back = merged(source, report.output)
    unequal = {n: int((back[n] != tensors[n]).sum()) for n in tensors}
    assert unequal[pairs.LINEAR] > 0
    told = {name: layer.unequal for name, layer in layers_of(report).items()}
    assert told == {name: count for name, count in unequal.items() if name != pairs.SAME}


def test_what_is_no_matrix_is_stored_as_it_differs(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path, torch.bfloat16)
    report = extracted(tmp_path, source, target, dtype=torch.bfloat16)
    found, _ = pairs.read(report.output)
    kinds = {name: layer.kind for name, layer in layers_of(report).items()}
    assert {name for name, kind in kinds.items() if kind == "lora"} == set(pairs.MATRICES)
    stems = {key.removeprefix("diffusion_model.") for key in found}
    assert {"blocks.0.modulation.diff_m", "head.modulation.diff_m"}.isdisjoint(stems)
    assert {"blocks.0.diff_m", "head.diff_m", "blocks.0.self_attn.q.diff_b"} <= stems
    assert {"blocks.0.norm3.diff", "token_embedding.diff", "blocks.1.small.diff"} <= stems
    assert report.unchanged == 1
    assert not report.left_out


def test_convolutions_have_the_shapes_that_trainers_give_them(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path)
    found, _ = pairs.read(extracted(tmp_path, source, target).output)
    shapes = {key.removeprefix("diffusion_model."): tuple(t.shape) for key, t in found.items()}
    assert shapes["blocks.1.conv.lora_down.weight"] == (8, 48, 3, 3)
    assert shapes["blocks.1.conv.lora_up.weight"] == (64, 8, 1, 1)
    assert shapes["blocks.1.point.lora_down.weight"] == (8, 96, 1, 1)
    assert shapes["patch_embedding.lora_down.weight"] == (8, 4, 1, 4, 4)
    assert shapes["blocks.0.self_attn.q.lora_down.weight"] == (8, 80)
    assert float(found["diffusion_model.blocks.0.self_attn.q.alpha"]) == 8


def test_tucker_finds_a_planted_core_and_is_smaller(tmp_path: Path) -> None:
    tensors = pairs.base()
    source = write_model(tmp_path / "source.safetensors", tensors)
    core = torch.einsum(
        "om,mnhw,ni->oihw", randn(64, 5, seed=1), randn(5, 5, 3, 3, seed=2), randn(5, 48, seed=3)
    )
    target = write_model(
        tmp_path / "target.safetensors",
        tensors | {pairs.CONV: tensors[pairs.CONV] + 0.01 * core},
    )
    policy = RankPolicy(rank=5)
    flat = extracted(tmp_path, source, target, "flat.safetensors", policy=policy)
    report = extracted(tmp_path, source, target, policy=policy, conv=Conv.TUCKER)
    (layer,) = report.layers
    found, _ = pairs.read(report.output)
    assert layer.kind == "tucker"
    assert found["diffusion_model.blocks.1.conv.lora_mid.weight"].shape == (5, 5, 3, 3)
    assert layer.relative_error < 1e-5
    assert layer.bytes < flat.layers[0].bytes / 2
    back = merged(source, report.output)
    assert torch.allclose(back[pairs.CONV], load_file(target)[pairs.CONV], atol=1e-5)


def test_tucker_is_within_the_bound_of_its_kind(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path, noise=0.01)
    report = extracted(tmp_path, source, target, policy=RankPolicy(rank=6), conv=Conv.TUCKER)
    change = (load_file(target)[pairs.CONV] - load_file(source)[pairs.CONV]).double()
    tails = [
        float(torch.linalg.svdvals(change.movedim(axis, 0).flatten(1))[6:].square().sum())
        for axis in (0, 1)
    ]
    layer = layers_of(report)[pairs.CONV]
    # No core of this rank is nearer than the larger tail; HOSVD is within the sum of both.
    assert max(tails) ** 0.5 * 0.999 <= layer.error**0.5 <= sum(tails) ** 0.5 * 1.001


def test_energy_ratio_and_threshold_choose_each_layers_rank(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path, noise=1e-4)
    for policy in (RankPolicy(energy=0.99), RankPolicy(ratio=0.05), RankPolicy(threshold=0.05)):
        report = extracted(tmp_path, source, target, policy=policy, overwrite=True)
        ranks = {layer.rank for layer in report.layers if layer.kind == "lora"}
        assert ranks == {4}, policy


@pytest.mark.parametrize("allowed", [120_000, 160_000, 400_000])
def test_a_budget_is_kept_and_spent_where_it_gains_most(tmp_path: Path, allowed: int) -> None:
    source, target = write_pair(tmp_path, rank=20, noise=0.002)
    policy = RankPolicy(max_bytes=allowed)
    report = extracted(tmp_path, source, target, policy=policy, dtype=torch.float16)
    assert report.output.stat().st_size <= allowed
    thin = [layer for layer in report.layers if layer.kind == "lora"]
    spent = sum(layer.bytes for layer in thin)
    even = max(
        rank
        for rank in range(1, 60)
        if rank * sum(math.prod(x.shape[1:]) + x.shape[0] for x in thin) * 2 <= spent
    )
    plain = extracted(
        tmp_path, source, target, "even.safetensors", policy=RankPolicy(even), dtype=torch.float16
    )
    assert report.relative_error < plain.relative_error
    told = {one.name for one in report.left_out} | {layer.name for layer in report.layers}
    assert {f"transformer.{name}" for name in pairs.MATRICES} <= told


def test_a_budget_looks_again_where_a_layer_takes_all_that_was_looked_for() -> None:
    shape = (400, 400)
    layers = [
        Planned(Place("transformer", path, "weight"), shape, {}, low_rank=True)
        for path in ("strong", "weak")
    ]
    values = {"strong": torch.linspace(9, 8, 199).tolist(), "weak": [1e-3] * 199}
    asked: list[dict[str, int]] = []

    def measure(planned: Sequence[Planned], limits: Mapping[str, int]) -> dict[str, list[float]]:
        asked.append({one.place.path: limits[str(one.place)] for one in planned})
        return {str(one.place): values[one.place.path][: limits[str(one.place)]] for one in planned}

    options = ExtractOptions(RankPolicy(max_bytes=1))
    ranks = ranks_within(layers, 20 * 2 * 1600 + 8, options, measure)
    assert ranks == {"transformer.strong.weight": 40, "transformer.weak.weight": 0}
    assert asked == [{"strong": 80, "weak": 80}]
    asked.clear()
    ranks = ranks_within(layers, 10 * 2 * 1600 + 8, options, measure)
    assert asked == [{"strong": 48, "weak": 48}]
    assert ranks["transformer.strong.weight"] == 20
    asked.clear()
    few = [replace(one, shape=(4000, 4000)) for one in layers[1:]] * 30
    many = [
        replace(one, place=Place("transformer", f"weak{i}", "weight")) for i, one in enumerate(few)
    ]
    values |= {f"weak{i}": [1e-3] for i in range(30)}
    ranks = ranks_within([layers[0], *many], 150 * 1600 + 200, options, measure)
    assert [one["strong"] for one in asked] == [48, 96, 192]
    assert ranks["transformer.strong.weight"] == 150


def test_a_budget_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path)
    with pytest.raises(ToolError, match="do not hold"):
        extracted(tmp_path, source, target, policy=RankPolicy(max_bytes=5000))
    assert sorted(one.name for one in tmp_path.iterdir() if one.suffix == ".safetensors") == [
        "source.safetensors",
        "target.safetensors",
    ]


def test_with_a_rule_and_a_budget_both_are_kept(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path, rank=20, noise=0.002)
    policy = RankPolicy(rank=6, max_bytes=1_000_000)
    report = extracted(tmp_path, source, target, policy=policy)
    assert {layer.rank for layer in report.layers if layer.kind == "lora"} == {6}


@pytest.mark.parametrize("naming", [Naming.DIFFUSERS, Naming.PEFT])
@pytest.mark.parametrize("written", Format)
def test_namings_without_differences_hold_every_matrix_and_tell_the_rest(
    tmp_path: Path, naming: Naming, written: Format
) -> None:
    source, target = write_pair(tmp_path)
    report = extracted(tmp_path, source, target, "out", naming=naming, format=written)
    assert "blocks.1.small.weight" in layers_of(report)
    assert {layer.kind for layer in report.layers} == {"lora"}
    left = {one.name.removeprefix("transformer."): one.reason for one in report.left_out}
    alone = {pairs.BIAS, pairs.NORM, pairs.MODULATION, "head.modulation", pairs.TABLE}
    assert set(left) == alone
    assert all("has no name for" in reason for reason in left.values())
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]
    back, wanted = merged(source, report.output), load_file(target)
    for name in (*pairs.MATRICES, "blocks.1.small.weight"):
        assert torch.allclose(back[name], wanted[name], atol=1e-5), name


def test_a_pytorch_file_holds_the_same_tensors(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path)
    plain = extracted(tmp_path, source, target)
    report = extracted(tmp_path, source, target, "lora.pt", format=Format.PYTORCH)
    wanted, found = load_file(plain.output), torch.load(report.output, weights_only=True)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_min_diff_and_components_leave_out_and_say_so(tmp_path: Path) -> None:
    tensors = pairs.base()
    target = tensors | {
        pairs.LINEAR: tensors[pairs.LINEAR] + 1e-4 * pairs.change(pairs.LINEAR),
        pairs.WIDE: tensors[pairs.WIDE] + pairs.change(pairs.WIDE),
    }
    paths = (
        write_model(tmp_path / "source.safetensors", tensors),
        write_model(tmp_path / "target.safetensors", target),
    )
    report = extracted(tmp_path, *paths, min_diff=1e-3)
    assert [layer.name for layer in report.layers] == [f"transformer.{pairs.WIDE}"]
    ((name, reason),) = [(one.name, one.reason) for one in report.left_out]
    assert name == f"transformer.{pairs.LINEAR}"
    assert "changed by more than" in reason
    with pytest.raises(ToolError, match="neither model has a component"):
        extracted(tmp_path, *paths, components=frozenset({"text_encoder"}))


def test_a_component_that_was_not_chosen_is_no_tensor_of_one_model_alone(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path)
    for path, names in ((source, ("a",)), (target, ("a", "b"))):
        tensors = {f"diffusion_model.{name}": t for name, t in load_file(path).items()}
        texts = {f"text_encoder.{name}.weight": torch.ones(4) for name in names}
        write_model(path, tensors | texts)
    report = extracted(tmp_path, source, target, components=frozenset({"transformer"}))
    assert {(one.name, one.reason) for one in report.left_out} == {
        (f"text_encoder.{name}", "text_encoder was not chosen") for name in ("a.weight", "b.weight")
    }


def test_clamping_is_off_and_loses_accuracy_where_it_is_on(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path)
    plain = extracted(tmp_path, source, target)
    clamped = extracted(tmp_path, source, target, clamp_quantile=0.9, overwrite=True)
    assert plain.relative_error < 1e-4
    assert 0.01 < clamped.relative_error < 0.5
    everything = extracted(tmp_path, source, target, clamp_quantile=1.0, overwrite=True)
    assert everything.relative_error == plain.relative_error


def test_what_only_one_model_has_is_told(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path)
    tensors = load_file(target)
    tensors["extra.weight"] = randn(4, 4)
    tensors["lost.weight"] = tensors.pop(pairs.NORM)
    tensors[pairs.POINT] = randn(64, 90, 1, 1)
    write_model(target, tensors)
    report = extracted(tmp_path, source, target)
    left = {one.name.removeprefix("transformer."): one.reason for one in report.left_out}
    assert left == {
        pairs.NORM: "only the source model has it",
        pairs.POINT: "its shape is [64, 96, 1, 1] in the source, [64, 90, 1, 1] in the target",
        "extra.weight": "only the target model has it",
        "lost.weight": "only the target model has it",
    }


def test_a_parameter_that_no_adapter_changes_is_told_only_if_it_changed(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path)
    for path, value in ((source, 1.0), (target, 2.0)):
        write_model(
            path,
            load_file(path) | {"head.gain": torch.full((3,), value), "head.same": torch.ones(3)},
        )
    report = extracted(tmp_path, source, target)
    ((name, reason),) = [(one.name, one.reason) for one in report.left_out]
    assert (name, reason) == ("transformer.head.gain", "no adapter changes a parameter called gain")
    assert report.unchanged == 2


def test_models_that_are_not_of_one_kind_are_refused(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path)
    other = write_model(tmp_path / "other.safetensors", {"x.weight": randn(4, 4)})
    with pytest.raises(ToolError, match="no tensor in common"):
        extracted(tmp_path, source, other)
    tensors = {f"layers.{i}.weight": randn(4, 4, seed=i) for i in range(20)}
    write_model(other, tensors | {pairs.LINEAR: randn(96, 80)})
    with pytest.raises(ToolError, match="two different models"):
        extracted(tmp_path, source, other)


def test_models_that_do_not_differ_are_refused(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path)
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(source.read_bytes())
    with pytest.raises(ToolError, match="do not differ"):
        extracted(tmp_path, source, twin)
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "source.safetensors",
        "target.safetensors",
        "twin.safetensors",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["source", "target"])
def test_nan_and_infinity_in_a_model_are_named(tmp_path: Path, value: float, which: str) -> None:
    paths = dict(zip(("source", "target"), write_pair(tmp_path), strict=True))
    tensors = load_file(paths[which])
    tensors[pairs.CONV][3, 2, 1, 0] = value
    write_model(paths[which], tensors)
    with pytest.raises(ToolError) as caught:
        extracted(tmp_path, paths["source"], paths["target"])
    told = f"the {which} model's transformer.{pairs.CONV} holds NaN or infinity"
    assert told in str(caught.value)
    left = sorted(one.name for one in tmp_path.iterdir())
    assert left == ["source.safetensors", "target.safetensors"]


def test_factors_that_overflow_are_refused(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path)
    tensors = load_file(target)
    tensors[pairs.WIDE] += 1e12 * pairs.change(pairs.WIDE)
    write_model(target, tensors)
    with pytest.raises(ToolError, match="too large for float16"):
        extracted(tmp_path, source, target, dtype=torch.float16)
    assert extracted(tmp_path, source, target, dtype=torch.bfloat16).relative_error < 0.01


def test_a_full_disk_keeps_what_is_written_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write_pair(tmp_path)
    put, count = StreamWriter.put, 0

    def full(*arguments: Any) -> None:
        nonlocal count
        count += 1
        with write_errors(tmp_path):
            if count > 4:
                raise OSError(errno.ENOSPC, "full")
        put(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(StreamWriter, "put", full)
        with pytest.raises(ToolError, match="no room"):
            extracted(tmp_path, source, target)
    assert extracted(tmp_path, source, target).resumed == 4


def test_a_result_that_cannot_be_verified_leaves_no_hidden_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write_pair(tmp_path)

    def broken(*_: object) -> None:
        raise ToolError("broken")

    monkeypatch.setattr(extract_run, "_verify", broken)
    with pytest.raises(ToolError, match="broken"):
        extracted(tmp_path, source, target, "lora.pt", format=Format.PYTORCH, verify=True)
    assert sorted(tmp_path.iterdir()) == [source, target]


def test_the_output_may_not_be_an_input_or_a_folder(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path)
    before = target.read_bytes()
    with pytest.raises(ToolError, match="exists already"):
        extracted(tmp_path, source, target, "target.safetensors")
    assert target.read_bytes() == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(ToolError, match="is a folder"):
        extracted(tmp_path, source, target, "folder")
    with pytest.raises(ToolError, match="no folder"):
        extracted(tmp_path, source, target, "nowhere/lora.safetensors")
    with pytest.raises(ToolError, match="no name for a pytorch file"):
        extracted(tmp_path, source, target, format=Format.PYTORCH)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": torch.float64},
        {"min_diff": -1.0},
        {"clamp_quantile": 0.0},
        {"components": frozenset()},
        {"diff_only": True, "naming": Naming.PEFT},
        {"diff_only": True, "policy": RankPolicy(max_bytes=1000)},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ToolError):
        replace(ExtractOptions(), **wrong)


def test_the_file_says_what_it_was_made_of(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path)
    report = extracted(tmp_path, source, target, seed=3)
    _, metadata = pairs.read(report.output)
    with Checkpoint.open(source) as before, Checkpoint.open(target) as after:
        wanted = {"source": before.sha256(), "target": after.sha256()}
    origin = json.loads(metadata["extracted_from"])
    assert {role: one["sha256"] for role, one in origin.items()} == wanted
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "8"
    assert metadata["ss_network_module"] == "lycoris.kohya"
    told = json.loads(metadata["extraction"])
    assert (told["rank"], told["seed"], told["dtype"]) == (8, 3, "float32")


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path, noise=0.01)
    one = extracted(tmp_path, source, target)
    before = one.output.read_bytes()
    again = extracted(tmp_path, source, target, overwrite=True)
    assert again.output.read_bytes() == before
    other = extracted(tmp_path, source, target, seed=1, overwrite=True)
    assert other.relative_error == pytest.approx(one.relative_error, rel=1e-3)


def test_progress_is_told_of_every_tensor(tmp_path: Path) -> None:
    source, target = write_pair(tmp_path)
    told: list[tuple[int, int]] = []
    with Checkpoint.open(source) as before, Checkpoint.open(target) as after:
        extract(
            before,
            after,
            tmp_path / "lora.safetensors",
            ExtractOptions(RankPolicy(rank=4)),
            lambda done, total, what: told.append((done, total)),
        )
    assert told == [(i + 1, len(pairs.SHAPES)) for i in range(len(pairs.SHAPES))]


def test_a_pipeline_of_stable_diffusion_gives_an_adapter_that_its_engine_takes_whole(
    tmp_path: Path,
) -> None:
    model = ROOT / "demo" / "model"
    target = tmp_path / "target"
    for path in (p for p in model.rglob("*") if p.is_file()):
        copy = target / path.relative_to(model)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            write_model(
                copy,
                {
                    name: (
                        t.float() + 0.1 * float(t.float().std(correction=0)) * randn(*t.shape)
                    ).to(t.dtype)
                    for name, t in tensors.items()
                },
            )
    report = extracted(tmp_path, model, target, policy=RankPolicy(rank=8), dtype=torch.float16)
    left = {one.reason for one in report.left_out}
    assert left <= {"no adapter changes a vae"}
    with Checkpoint.open(model) as source:
        file = load(report.output, source.key_map(), "a")
        parameters = [p for p in source.parameters if p.component != "vae"]
    assert not file.unused
    assert len(file.layers) == len(report.layers)
    assert len(report.layers) + report.unchanged + len(report.left_out) >= len(parameters)
    found, metadata = pairs.read(report.output)
    assert any(key.startswith("lora_te2_text_model_encoder_layers_0") for key in found)
    assert any(key.startswith("lora_unet_input_blocks_4_1_transformer_blocks_0") for key in found)
    assert metadata["ss_network_dim"] == "8"
