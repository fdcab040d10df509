"""Smaller ranks against the singular values of the whole matrices, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora.engine.stack import LoraUse
from lora.errors import LoraUnsupported, ToolError
from lora.formats.header import read_header
from lora.formats.names.naming import Naming
from lora.tools.adapters.reading import read_adapter
from lora.tools.adapters.saving import WriteOptions, write_adapter
from lora.tools.factors.cutting import Report
from lora.tools.factors.ranks import RankPolicy
from lora.tools.resize import ResizeOptions, resize
from tests.adapters import randn, write
from tests.conftest import ROOT
from tests.lora.tools import narrow
from tests.lora.tools.narrow import CONV, CROSS, NORM, SELF


def resized(
    path: Path, policy: RankPolicy, dtype: torch.dtype | None = None, output: Path | None = None
) -> tuple[Path, Report]:
    output = output or path.with_name("resized.safetensors")
    write = WriteOptions(dtype=dtype, overwrite=True)
    return output, resize(path, output, ResizeOptions(policy, write))


def matrix(tensors: dict[str, Tensor], stem: str) -> Tensor:
    """A layer's whole change, in float64, by the formula."""
    up = tensors[f"{stem}.lora_up.weight"].double().flatten(1)
    down = tensors[f"{stem}.lora_down.weight"].double()
    if f"{stem}.lora_mid.weight" in tensors:
        mid = tensors[f"{stem}.lora_mid.weight"].double()
        down = torch.einsum("mnhw,ni->mihw", mid, down.flatten(1))
    rank = tensors[f"{stem}.lora_down.weight"].shape[0]
    alpha = float(tensors.get(f"{stem}.alpha", torch.tensor(float(rank))))
    return alpha / rank * up @ down.flatten(1)


STEMS = {"lora": (SELF, CROSS, CONV), "tucker": (CONV,), "dora": (SELF, CONV)}


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_is_the_nearest_of_its_rank_and_its_error_is_told(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    path = narrow.source(tmp_path, name, torch.float32)
    output, report = resized(path, RankPolicy(rank=2), dtype)
    before, after = load_file(path), load_file(output)
    told = {change.name: change for change in report.changes}
    for stem in STEMS[name]:
        whole, small = matrix(before, stem), matrix(after, stem)
        values = torch.linalg.svdvals(whole)
        measured = (small - whole).norm()
        limit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        assert measured <= values[2:].norm() + limit * values.norm()
        change = told[stem]
        assert (change.before, change.rank) == (whole_rank(before, stem), 2)
        assert change.relative_error == pytest.approx(float(measured / whole.norm()), rel=1e-5)
        kept = float(values[:2].square().sum() / values.square().sum())
        assert change.kept == pytest.approx(kept, rel=1e-5)
        assert after[f"{stem}.lora_up.weight"].dtype == dtype
        assert after[f"{stem}.lora_down.weight"].shape[0] == 2
    narrow.read(output)


def whole_rank(tensors: dict[str, Tensor], stem: str) -> int:
    return tensors[f"{stem}.lora_down.weight"].shape[0]


def test_a_rank_that_is_there_already_changes_nothing(tmp_path: Path) -> None:
    path = narrow.source(tmp_path, "lora")
    output, report = resized(path, RankPolicy(rank=4))
    before, after = load_file(path), load_file(output)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert report.changes == ()
    assert report.modules == 5


def test_magnitudes_stay_as_they_are(tmp_path: Path) -> None:
    path = narrow.source(tmp_path, "dora")
    output, _ = resized(path, RankPolicy(rank=1))
    before, after = load_file(path), load_file(output)
    for stem in (SELF, CONV):
        assert torch.equal(before[f"{stem}.dora_scale"], after[f"{stem}.dora_scale"])
    assert narrow.read(output).algorithms == ("dora",)


def test_differences_stay_as_they_are(tmp_path: Path) -> None:
    full = {k: t for k, t in narrow.tensors_of("full").items() if k.startswith((NORM, CONV))}
    path = write(tmp_path / "a.safetensors", {**narrow.tensors_of("lora_text"), **full})
    output, _ = resized(path, RankPolicy(rank=1))
    after = load_file(output)
    assert all(torch.equal(after[key], tensor) for key, tensor in full.items())


@pytest.mark.parametrize("name", ["loha", "lokr", "glora", "oft", "ia3", "peft_oft"])
def test_what_has_no_rank_to_cut_is_refused(tmp_path: Path, name: str) -> None:
    path = narrow.source(tmp_path, name)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ToolError) as caught:
        resized(path, RankPolicy(rank=1))
    assert "--algorithm lora" in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_energy_decides_each_layers_rank(tmp_path: Path) -> None:
    steep = torch.diag(torch.tensor([10.0, 1.0, 0.1, 0.01]))
    flat = torch.eye(4)
    basis = torch.linalg.qr(randn(64, 4)).Q
    tensors = {
        f"{SELF}.lora_up.weight": (basis @ steep).contiguous(),
        f"{SELF}.lora_down.weight": basis.t().contiguous(),
        f"{CONV}.lora_up.weight": (basis[:32] @ flat).reshape(32, 4, 1, 1).contiguous(),
        f"{CONV}.lora_down.weight": randn(4, 32, 3, 3),
    }
    path = write(tmp_path / "a.safetensors", tensors, {"ss_network_dim": "4"})
    output, report = resized(path, RankPolicy(energy=0.99))
    ranks = {change.name: change.rank for change in report.changes}
    assert ranks[SELF] == 2  # 100 of 101.0101 is 0.990, 101 is 0.9999
    written = read_header(output)
    assert written.metadata["ss_network_dim"] == "Dynamic"
    assert all(change.kept >= 0.99 for change in report.changes)
    output, report = resized(path, RankPolicy(energy=0.99, max_rank=1))
    assert {change.rank for change in report.changes} == {1}
    assert read_header(output).metadata["ss_network_dim"] == "1"
    assert read_header(output).metadata["ss_network_alpha"] == "1.0"


@pytest.mark.parametrize(
    ("policy", "rank"),
    [(RankPolicy(ratio=0.05), 2), (RankPolicy(threshold=0.05), 3), (RankPolicy(threshold=5), 1)],
)
def test_ratio_and_threshold_look_at_the_scaled_values(
    tmp_path: Path, policy: RankPolicy, rank: int
) -> None:
    basis = torch.linalg.qr(randn(64, 4)).Q
    tensors = {
        f"{SELF}.lora_up.weight": basis @ torch.diag(torch.tensor([10.0, 1.0, 0.1, 0.01])) * 2,
        f"{SELF}.lora_down.weight": basis.t().contiguous(),
        f"{SELF}.alpha": torch.tensor(2.0),  # halves what is doubled above
    }
    _, report = resized(write(tmp_path / "a.safetensors", tensors), policy)
    assert [change.rank for change in report.changes] == [rank]


def test_a_budget_in_bytes_is_kept_and_spent(tmp_path: Path) -> None:
    path = ROOT / "demo" / "loras" / "demo-spiral.safetensors"
    budget = path.stat().st_size // 2
    output, report = resized(path, RankPolicy(max_bytes=budget), output=tmp_path / "small")
    assert budget * 0.9 < output.stat().st_size <= budget
    uniform, same = resized(path, RankPolicy(rank=7), output=tmp_path / "uniform")
    assert uniform.stat().st_size <= output.stat().st_size
    assert report.relative_error < same.relative_error
    with pytest.raises(ToolError) as caught:
        resized(path, RankPolicy(max_bytes=1000), output=tmp_path / "none")
    assert "do not hold" in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_a_budget_holds_the_rank_that_magnitudes_need(tmp_path: Path) -> None:
    tensors = {}
    for stem in (f"lora_unet_blocks_{index}_attn" for index in range(8)):
        tensors |= {
            f"{stem}.lora_up.weight": randn(512, 2),
            f"{stem}.lora_down.weight": randn(2, 512),
            f"{stem}.dora_scale": randn(512, 1),
        }
    path = write(tmp_path / "a.safetensors", tensors)
    output, report = resized(path, RankPolicy(max_bytes=70_000))
    assert output.stat().st_size <= 70_000
    assert {change.rank for change in report.changes} == {1}
    with pytest.raises(ToolError, match="smallest ranks need 32768"):
        resized(path, RankPolicy(max_bytes=40_000), output=tmp_path / "none")


@pytest.mark.parametrize("naming", Naming)
def test_a_resized_file_keeps_its_naming_and_its_config(tmp_path: Path, naming: Naming) -> None:
    adapter = read_adapter(narrow.source(tmp_path, "lora", torch.float32), narrow.key_map())
    path = tmp_path / "named"
    write_adapter(path, adapter, WriteOptions(naming))
    output, _ = resized(path, RankPolicy(rank=2), output=tmp_path / "resized")
    file = narrow.read(output)
    assert {layer.algorithm.rank for layer in file.layers} == {2}
    expected = narrow.source(tmp_path, "lora", torch.float32)
    weights = narrow.merged(LoraUse(narrow.read(resized(expected, RankPolicy(rank=2))[0])))
    for name, weight in narrow.merged(LoraUse(file)).items():
        assert torch.allclose(weight, weights[name], rtol=0, atol=1e-6)
    assert read_adapter(output).naming is read_adapter(path).naming


def test_a_config_has_the_new_ranks(tmp_path: Path) -> None:
    adapter = read_adapter(narrow.source(tmp_path, "lora"), narrow.key_map())
    write_adapter(tmp_path / "peft", adapter, WriteOptions(Naming.PEFT))
    resized(tmp_path / "peft", RankPolicy(rank=1), output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (1, 1.0)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})


def test_a_bias_in_lora_b_stays_what_it_is(tmp_path: Path) -> None:
    tensors = narrow.tensors_of("lora_bias", torch.float32)
    config = {"unet.lora_alpha": 6, "unet.r": 4}  # scaling 1.5
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    path = write(tmp_path / "a.safetensors", tensors, metadata)
    output, _ = resized(path, RankPolicy(rank=2))
    name = "unet.down_blocks.0.resnets.0.conv1.bias"
    before = narrow.merged(LoraUse(narrow.read(path)))[name]
    after = narrow.merged(LoraUse(narrow.read(output)))[name]
    assert torch.allclose(before, after, rtol=1e-6, atol=0)


def test_a_layer_of_nothing_is_dropped_and_told(tmp_path: Path) -> None:
    tensors = {
        **narrow.tensors_of("lora_text"),
        f"{CONV}.lora_up.weight": torch.zeros(32, 2, 1, 1),
        f"{CONV}.lora_down.weight": randn(2, 32, 3, 3),
    }
    output, report = resized(write(tmp_path / "a.safetensors", tensors), RankPolicy(energy=0.9))
    assert not any(key.startswith(CONV) for key in load_file(output))
    (dropped,) = [change for change in report.changes if change.rank == 0]
    assert (dropped.name, dropped.error, dropped.kept) == (CONV, 0.0, 1.0)


def test_factors_that_do_not_fit_together_are_told(tmp_path: Path) -> None:
    tensors = {f"{SELF}.lora_up.weight": randn(64, 3), f"{SELF}.lora_down.weight": randn(2, 64)}
    with pytest.raises(LoraUnsupported) as caught:
        resized(write(tmp_path / "a.safetensors", tensors), RankPolicy(rank=1))
    assert "do not fit together" in str(caught.value)


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    path = narrow.source(tmp_path, "lora_text")
    options = ResizeOptions(RankPolicy(rank=1))
    resize(path, tmp_path / "out", options, lambda *progress: told.append(progress))
    assert [done for done, _, _ in told] == [0, 1, 2, 3]
    assert {total for _, total, _ in told} == {3}


def test_the_input_is_not_written_over(tmp_path: Path) -> None:
    path = narrow.source(tmp_path, "lora")
    before = path.read_bytes()
    with pytest.raises(ToolError, match="exists already"):
        resize(path, path, ResizeOptions(RankPolicy(rank=1)))
    assert path.read_bytes() == before
