"""The tools from the command line: LightX2V's own lines, and the demo model's round trips."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora.commands import combine, extract
from lora.commands.shared import dtype_of
from lora.tools.extract.options import ExtractOptions
from tests.adapters import randn
from tests.conftest import ROOT
from tests.lora.commands.running import run

LORAS, MODEL = ROOT / "demo" / "loras", ROOT / "demo" / "model"


def wan(seed: int = 0) -> dict[str, Tensor]:
    """A tiny checkpoint in Wan's names."""
    tensors: dict[str, Tensor] = {}
    for n in range(2):
        for number, name in enumerate(("self_attn.q", "self_attn.o", "cross_attn.k", "ffn.0")):
            tensors[f"blocks.{n}.{name}.weight"] = randn(256, 200, seed=seed + 10 * n + number)
            tensors[f"blocks.{n}.{name}.bias"] = randn(256, seed=seed + 10 * n + number + 5)
        tensors[f"blocks.{n}.norm3.weight"] = randn(256, seed=seed + n)
        tensors[f"blocks.{n}.modulation"] = randn(1, 6, 256, seed=seed + 20 + n)
    return tensors


def tuned(base: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a change of rank 3 on every matrix, and another on everything else."""
    return {
        name: tensor
        + (
            0.1 * randn(256, 3, seed=50 + n) @ randn(3, 200, seed=90 + n)
            if tensor.dim() == 2
            else 0.1 * randn(*tensor.shape, seed=70 + n)
        )
        for n, (name, tensor) in enumerate(base.items())
    }


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    base = {name: tensor.bfloat16() for name, tensor in wan().items()}
    target = {name: tensor.bfloat16() for name, tensor in tuned(wan()).items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(target, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def test_lightx2v_extract_with_rank_64_and_fp16(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: tuple[Path, Path]
) -> None:
    base, target = models
    output = tmp_path / "high_rank_lora.safetensors"
    line = ("extract", "--source-model", base, "--target-model", target, "--output", output)
    ran = run(capsys, *line, "--rank", 64, "--output-dtype", "fp16")
    assert ran.code == 0, ran.err
    found = load_file(output)
    factor = found["diffusion_model.blocks.0.self_attn.q.lora_down.weight"]
    assert (factor.dtype, tuple(factor.shape)) == (torch.float16, (64, 200))
    assert "diffusion_model.blocks.0.diff_m" in found
    assert "diffusion_model.blocks.1.self_attn.q.diff_b" in found


def test_lightx2v_extract_takes_its_defaults(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: tuple[Path, Path]
) -> None:
    output = tmp_path / "lora.safetensors"
    ran = run(
        capsys,
        "extract",
        "--source-model",
        models[0],
        "--target-model",
        models[1],
        "--output",
        output,
    )
    assert ran.code == 0, ran.err
    factor = load_file(output)["diffusion_model.blocks.0.self_attn.q.lora_down.weight"]
    assert (factor.dtype, tuple(factor.shape)) == (torch.bfloat16, (32, 200))


def test_lightx2v_diff_only_gives_the_target_back_exactly(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: tuple[Path, Path]
) -> None:
    base, target = models
    diff, merged = tmp_path / "weight_diff.safetensors", tmp_path / "merged.safetensors"
    line = ("extract", "--source-model", base, "--target-model", target, "--output", diff)
    assert run(capsys, *line, "--diff-only").code == 0
    line = ("merge", "--source-model", base, "--lora-model", diff, "--output", merged)
    assert run(capsys, *line, "--alpha", "1.0").code == 0
    expected = load_file(target)
    found = load_file(merged)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_lightx2v_merge_with_alpha_and_fp32(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: tuple[Path, Path]
) -> None:
    base, target = models
    for path in models:  # unrounded, so that the planted rank is the change's
        made = wan() if path == base else tuned(wan())
        save_file(made, path)
    lora, merged = tmp_path / "lora.safetensors", tmp_path / "merged_model.safetensors"
    line = ("extract", "--source-model", base, "--target-model", target, "--output", lora)
    assert run(capsys, *line, "--output-dtype", "fp32").code == 0
    line = ("merge", "--source-model", base, "--lora-model", lora, "--output", merged)
    ran = run(capsys, *line, "--alpha", "0.7", "--output-dtype", "fp32")
    assert ran.code == 0, ran.err
    found, before, after = load_file(merged), load_file(base), load_file(target)
    for name, tensor in found.items():
        expected = before[name].float() + 0.7 * (after[name].float() - before[name].float())
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-5), name


def test_lightx2v_merge_of_a_pickle(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: tuple[Path, Path]
) -> None:
    base, target = models
    torch.save(load_file(base), tmp_path / "model.pt")
    lora, merged = tmp_path / "lora.safetensors", tmp_path / "merged_model.safetensors"
    line = ("extract", "--source-model", tmp_path / "model.pt", "--source-type", "pytorch")
    ran = run(
        capsys,
        *line,
        "--target-model",
        target,
        "--target-type",
        "safetensors",
        "--output",
        lora,
        "--diff-only",
    )
    assert ran.code == 0, ran.err
    ran = run(
        capsys,
        *("merge", "--source-model", tmp_path / "model.pt", "--source-type", "pytorch"),
        *("--lora-model", lora, "--lora-type", "safetensors"),
        *("--output", merged, "--output-format", "safetensors", "--alpha", "1.0"),
    )
    assert ran.code == 0, ran.err
    expected = load_file(target)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(merged).items())


def test_scales_stand_behind_the_files_or_come_from_alpha(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    loras = [LORAS / f"demo-{name}.safetensors" for name in ("stripes", "outline", "night")]
    ran = run(
        capsys,
        *("merge", "--source-model", MODEL, "--output", tmp_path / "merged", "--alpha", "0.5"),
        *("--lora-model", f"{loras[0]}:0.8", loras[1], "--lora-model", f"{loras[2]}:-1"),
        *("--blocks", '{"IN": 0}', "--components", "text_encoder=0", "--json"),
    )
    assert ran.code == 0, ran.err
    assert [one["scale"] for one in ran.json["loras"]] == [0.8, 0.5, -1.0]
    before = load_file(MODEL / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    name = "{}.transformer_blocks.0.attn1.to_q.weight"
    left, moved = (
        name.format(p) for p in ("down_blocks.1.attentions.0", "up_blocks.0.attentions.0")
    )
    assert torch.equal(before[left], after[left])
    assert not torch.equal(before[moved], after[moved])


def test_what_is_merged_can_be_extracted_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lora, out = LORAS / "demo-stripes.safetensors", tmp_path / "out.safetensors"
    line = ("merge", "--source-model", MODEL, "--lora-model", lora, "--output-dtype", "fp32")
    assert run(capsys, *line, "--output", tmp_path / "tuned").code == 0
    line = (
        "extract",
        "--source-model",
        MODEL,
        "--target-model",
        tmp_path / "tuned",
        "--output",
        out,
    )
    found = run(capsys, *line, "--rank", 8, "--output-dtype", "fp32", "--verify", "--json").json
    assert found["relative_error"] < 1e-4
    assert (
        found["verified"]["relative_error"] < 1e-2
    )  # as rounded to the model's own half precision
    shown = run(capsys, *line, "--rank", 4, "--force")
    assert shown.code == 0
    assert "energy kept" in shown.out


@pytest.mark.parametrize("naming", ["kohya", "diffusers", "original"])
def test_a_file_is_renamed_and_renamed_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, naming: str
) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    stripes = LORAS / "demo-stripes.safetensors"
    more = ("--model", MODEL)
    assert run(capsys, "convert", stripes, "--naming", naming, *more, "--output", there).code == 0
    ran = run(capsys, "convert", there, "--naming", "kohya", *more, "--output", back)
    assert ran.code == 0, ran.err
    assert "exact" in ran.out
    first, last = load_file(stripes), load_file(back)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key].float(), last[key].float()) for key in first)


def test_a_loha_becomes_a_lora_with_its_error_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = ("convert", LORAS / "demo-night.safetensors", "--model", MODEL, "--algorithm", "lora")
    ran = run(capsys, *line, "--rank", 16, "--output", tmp_path / "a.safetensors", "--json")
    assert ran.code == 0, ran.err
    assert len(ran.json["changes"]) == 230
    # Two factors of rank 4: their elementwise product has rank 16.
    assert ran.json["relative_error"] < 1e-2
    ran = run(capsys, *line, "--output", tmp_path / "b.safetensors")
    assert (ran.code, ran.out) == (2, "")
    assert "no rank is chosen" in ran.err


def test_a_file_is_shrunk_to_a_number_of_bytes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = ("resize", LORAS / "demo-spiral.safetensors", "--output", tmp_path / "a.safetensors")
    assert run(capsys, *line).code == 2
    ran = run(capsys, *line, "--max-bytes", "700k")
    assert ran.code == 0, ran.err
    assert (tmp_path / "a.safetensors").stat().st_size <= 700_000
    assert "->" in ran.out


def test_two_files_become_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    loras = [LORAS / "demo-stripes.safetensors:0.8", LORAS / "demo-outline.safetensors:0.5"]
    ran = run(capsys, "combine", *loras, "--output", tmp_path / "a.safetensors")
    assert ran.code == 0, ran.err
    assert "exact" in ran.out
    more = ("--method", "ties", "--rank", 4, "--density", "0.3")
    ran = run(capsys, "combine", *loras, *more, "--output", tmp_path / "b.safetensors", "--json")
    assert ran.code == 0, ran.err
    assert {one["rank"] for one in ran.json["changes"]} == {4}


@pytest.mark.parametrize(
    "line",
    [
        ("extract", "--source-model", "{base}", "--target-model", "{base}", "--output", "{out}"),
        ("extract", "--source-model", "{base}", "--target-model", "{none}", "--output", "{out}"),
        ("extract", "--source-model", "{base}", "--target-model", "{tuned}", "--output", "{base}"),
        ("extract", "--source-model", "{base}", "--target-model", "{demo}", "--output", "{out}"),
        (
            *(
                "extract",
                "--source-model",
                "{base}",
                "--target-model",
                "{tuned}",
                "--output",
                "{out}",
            ),
            "--rank",
            "0",
        ),
        (
            *("extract", "--source-model", "{base}", "--target-model", "{tuned}"),
            "--source-type",
            "pytorch",
            "--output",
            "{out}",
        ),
        ("merge", "--source-model", "{base}", "--lora-model", "{none}", "--output", "{out}"),
        ("merge", "--source-model", "{base}", "--lora-model", "{stripes}", "--output", "{out}"),
        ("merge", "--source-model", "{base}", "--lora-model", "{base}", "--output", "{out}"),
        (
            "merge",
            "--source-model",
            "{demo}",
            "--lora-model",
            "{stripes}",
            "--output",
            "{out}",
            "--blocks",
            "1,2",
        ),
        (
            "merge",
            "--source-model",
            "{demo}",
            "--lora-model",
            "{stripes}",
            "--output",
            "{out}",
            "--components",
            "vae=1",
        ),
        ("convert", "{none}", "--output", "{out}"),
        ("convert", "{stripes}", "--output", "{stripes}"),
        ("combine", "{stripes}", "--output", "{out}"),
        ("combine", "{stripes}", "{night}", "--output", "{out}"),
        ("resize", "{night}", "--rank", "2", "--output", "{out}"),
        ("resize", "{stripes}", "--rank", "2", "--output", "{none}/deeper/out.safetensors"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    models: tuple[Path, Path],
    line: tuple[str, ...],
) -> None:
    places = {
        "base": models[0],
        "tuned": models[1],
        "demo": MODEL,
        "stripes": LORAS / "demo-stripes.safetensors",
        "night": LORAS / "demo-night.safetensors",
        "none": tmp_path / "none",
        "out": tmp_path / "out.safetensors",
    }
    before = {one.name: one.stat().st_mtime_ns for one in tmp_path.iterdir()}
    ran = run(capsys, *(word.format(**places) for word in line))
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert "error: " in ran.err.splitlines()[-1]
    assert "Traceback" not in ran.err
    assert {one.name: one.stat().st_mtime_ns for one in tmp_path.iterdir()} == before


UNET = MODEL / "unet" / "diffusion_pytorch_model.safetensors"
STRIPES, NIGHT = (LORAS / f"demo-{name}.safetensors" for name in ("stripes", "night"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("resize", UNET, "--rank", 2), f"LORA_UNSUPPORTED: {UNET}: "),
        (("convert", UNET), "holds a model's own weights"),
        (("combine", STRIPES, UNET), "holds a model's own weights"),
        (
            ("merge", "--source-model", STRIPES, "--lora-model", STRIPES, "--allow-unused"),
            f"{STRIPES} is an adapter, and no model",
        ),
        (("convert", STRIPES, "--rank", 4), "only another algorithm would need one"),
        (
            ("merge", "--source-model", MODEL, "--lora-model", STRIPES, "--alpha", "nan"),
            "a scale is not a number",
        ),
        (
            ("merge", "--source-model", MODEL, "--lora-model", STRIPES, "--components", "unet=nan"),
            "not a number",
        ),
        (
            ("extract", "--source-model", MODEL, "--target-model", MODEL, "--components", "u-net"),
            "neither model has a component 'u-net'",
        ),
    ],
)
def test_what_does_nothing_or_something_else_than_was_meant_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, line: tuple[object, ...], words: str
) -> None:
    ran = run(capsys, *line, "--output", tmp_path / "out")
    assert ran.code == 2
    assert words in ran.err
    assert list(tmp_path.iterdir()) == []


def test_the_file_that_is_at_fault_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    ran = run(capsys, "combine", STRIPES, empty, "--output", tmp_path / "out.safetensors")
    assert ran.code == 2
    assert ran.err.startswith(f"error: LORA_CORRUPT: {empty}: ")


def test_help_and_defaults_are_the_tools_own() -> None:
    parser = ArgumentParser()
    combine.add_arguments(parser)
    assert "fp32, so that nothing is rounded" in " ".join(parser.format_help().split())
    parser = ArgumentParser()
    extract.add_arguments(parser)
    options = parser.parse_args(["--source-model", "a", "--target-model", "b", "--output", "c"])
    assert dtype_of(options.output_dtype) == ExtractOptions().dtype
