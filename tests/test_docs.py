"""What the documents say is what the code does: requests, tables, files."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionXLPipeline

import handler
from demo.documents import INPAINTED, WEIGHTED
from docs.generate import DOCS, HUB, files, kind_of, leaves
from lora import errors
from lora.errors import CodedError
from schemas import parse_job
from tests.conftest import ROOT
from validation import SHA256, InvalidInput, field
from worker.pictures.outputs import OutputTooLarge
from worker.stop import Cancelled

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HUB_PAGE = (ROOT / ".runpod" / "README.md").read_text()


def requests() -> list[Any]:
    tests = json.loads((ROOT / ".runpod" / "tests.json").read_text())["tests"]
    found = [{"input": test["input"]} for test in tests]
    found += [json.loads(file.read_text()) for file in sorted(ROOT.glob("test_input*.json"))]
    return [job for job in found if "action" not in job["input"]]


def test_there_are_requests_to_check() -> None:
    assert len(requests()) >= 3


@pytest.mark.parametrize("job", requests(), ids=str)
def test_every_request_in_a_file_is_valid(job: dict[str, Any]) -> None:
    request = parse_job(job)
    assert request.warnings == ()
    assert len(request.loras) == len(job["input"].get("loras") or [])


@pytest.mark.parametrize("path", list(files()), ids=lambda path: path.name)
def test_the_generated_documents_are_up_to_date(path: Path) -> None:
    assert path.read_text() == files()[path], "run make docs"


def test_every_table_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field, a setting or a code that is missing in a page, or stands there in vain, would be seen."""
    spoilt = {
        "requests.md": ("| `num_images` |", "| `weight_name` |", "| `per_page` |"),
        "settings.md": ("| `LORA_MODE` |",),
        "library.md": ("| `prompt_prefix` |",),
        "errors.md": ("| `CACHE_FULL` |",),
        "live.md": ("| `schedule` |", "| `stream_batch` |", "| `wait` |"),
        "text.md": ("| `repetition_penalty` |", "| `MAX_NUM_SEQS` |"),
    }
    for name, cells in spoilt.items():
        text = (DOCS / name).read_text()
        for cell in cells:
            assert cell in text
            text = text.replace(cell, "| `NOTHING` |")
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("docs.generate.DOCS", tmp_path)
    made = files()
    for name in ("requests.md", "settings.md", "library.md", "live.md", "text.md"):
        assert made[tmp_path / name] == (DOCS / name).read_text()
    errors_page = made[tmp_path / "errors.md"]
    assert "NOTHING" not in errors_page
    sentence = "There is no room for the file, and nothing that may be removed for it."
    assert f"| `CACHE_FULL` | {sentence} |  |" in errors_page  # its words are lost, it is not


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (
            field("integer|null", None, "", minimum=64, maximum=96, multipleOf=8),
            "whole number, 64 to 96, a multiple of 8",
        ),
        (field("integer|null", None, "", minimum=1, maximum=9), "whole number, 1 to 9"),
        (field("array|string|null", None, "", maxItems=3), "list or text, at most 3 entries"),
        (field("string|null", None, "", enum=["a", "b", None]), "`a`, `b`"),
        (field("string", "", "", pattern=SHA256), "text, 64 hexadecimal digits"),
        (field("boolean", False, ""), "true or false"),
    ],
)
def test_a_fields_limits_are_told_in_words(rule: dict[str, Any], words: str) -> None:
    assert kind_of(rule) == words


def test_the_generator_knows_the_errors_of_all_packages() -> None:
    here = set(leaves(CodedError))
    assert {handler.OutOfMemory, InvalidInput, OutputTooLarge, Cancelled} <= here


def test_the_error_tree_in_the_docstring_is_the_tree() -> None:
    drawn = dict(re.findall(r"── (\w+) +(\w+)", errors.__doc__ or ""))
    drawn.pop("LoraError", None)
    here = [errors.ToolError, *leaves(errors.LoraError)]
    assert drawn == {leaf.__name__: leaf.code for leaf in here}


def test_the_readmes_tree_names_all_that_is_there() -> None:
    tree = re.search(r"```text\n(handler\.py.*?)```", README, re.DOTALL)
    assert tree
    listed = re.findall(r"[\w.]+(?:/|\.py)|Dockerfile", re.sub(r" {3,}.*", "", tree[1]))
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    code = {re.sub(r"/.*", "/", name) for name in tracked if name.endswith(".py") or "/" in name}
    assert {*listed} == {name for name in code if name[0] != "."} | {".runpod/", "Dockerfile"}


def test_the_readme_is_read_in_a_minute() -> None:
    assert len(README.splitlines()) <= 150


def test_an_endpoints_settings_are_those_of_the_hub() -> None:
    page = (DOCS / "deployment.md").read_text()
    config = json.loads(files()[HUB])["config"]
    assert f"| Container disk | {config['containerDiskInGb']} GB |" in page
    assert f"| CUDA versions | {', '.join(config['allowedCudaVersions'])} |" in page
    pools = re.findall(r"`([A-Z]+_\d+)`", page.split("| GPU types |")[1].splitlines()[0])
    assert sorted(pools) == sorted(config["gpuIds"].split(","))
    for name, value in config["presets"][0]["defaults"].items():
        assert f"| `{name}` | `{value}` |" in page


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    figures = json.loads((ROOT / "benchmarks/results/lora_engine.json").read_text())["figures"]
    rows = figures["median_seconds"]
    for title, figure in (
        ("load and apply, rank 16", "rank 16, the model's dtype: loaded, dynamic"),
        (
            "switch back to LoRAs used before",
            "rank 16, the model's dtype: back to a stack used before",
        ),
    ):
        row = next(line for line in README.splitlines() if line.startswith(f"| {title}"))
        ours, theirs = re.findall(r"\| ([\d.]+) ms \|.*\| ([\d.]+) s \|", row)[0]
        assert float(ours) == pytest.approx(rows[figure]["ours"] * 1000, rel=0.01)
        assert float(theirs) == pytest.approx(rows[figure]["theirs"], rel=0.01)
    changed = figures["numbers_changed_after_merge_and_restore"]
    assert changed["ours"] == 0
    assert f"| 0 | | not measured | {changed['theirs']:,} of {changed['of']:,} |" in README


def test_diffusers_refuses_the_demos_loha_as_the_readme_says() -> None:
    networks = StableDiffusionXLPipeline.from_pretrained(ROOT / "demo" / "model")
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        networks.load_lora_weights(ROOT / "demo" / "loras" / "demo-night.safetensors")


def test_the_changelogs_newest_version_is_the_packages() -> None:
    headings = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [heading for heading in headings if heading[0] != "Unreleased"]
    assert released[0][0] == PROJECT["version"]
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in released)


def test_pre_commit_runs_the_ruff_that_the_checks_run() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = (ROOT / "requirements-dev.txt").read_text()
    assert re.findall(r"ruff-pre-commit\n +rev: v(\S+)", hooks) == re.findall(
        r"^ruff==(\S+)", pinned, re.MULTILINE
    )


def test_the_workflow_and_the_badge_have_the_packages_python_versions() -> None:
    bounds = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"])
    assert bounds
    versions = [f"3.{minor}" for minor in range(int(bounds[1]), int(bounds[2]))]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    matrix = re.findall(r"python-version: (\[.*\])", workflow)
    assert [json.loads(line) for line in matrix] == [versions]
    assert "run: .ci/run\n" in workflow
    assert f"badge/python-{versions[0]}%20to%20{versions[-1]}-" in HUB_PAGE


def test_the_tests_that_the_security_policy_names_exist() -> None:
    named = re.findall(r"`(tests/\S+)`", (ROOT / "SECURITY.md").read_text())
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_shows_the_prompt_that_drew_its_picture() -> None:
    assert f'--prompt "{WEIGHTED["prompt"]}" --seed {WEIGHTED["seed"]} ' in README


def test_the_inpainting_page_shows_the_request_that_drew_its_pictures() -> None:
    page = (ROOT / "docs" / "pictures.md").read_text()
    (job,) = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    shown = job["input"]
    assert parse_job(job).warnings == ()
    urls = {name: shown[name] for name in ("image_url", "mask_url")}
    assert shown == {**INPAINTED, **urls}


def test_each_promise_names_a_test_that_is_there() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).is_file()] == []
