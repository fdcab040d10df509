"""What the documents say is what the code does: requests, tables, files."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import handler
from demo.inpainting import INPAINTED
from docs.generate import HUB, files, leaves
from handler import Worker
from lora import errors
from lora.errors import CodedError
from schemas import parse_job
from tests.conftest import ROOT
from validation import InvalidInput
from worker.outputs import OutputTooLarge
from worker.stop import Cancelled

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HUB_PAGE = (ROOT / ".runpod" / "README.md").read_text()


def requests() -> list[Any]:
    blocks = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    found = [json.loads(block) for block in blocks]
    tests = json.loads((ROOT / ".runpod" / "tests.json").read_text())["tests"]
    found += [{"input": test["input"]} for test in tests]
    found += [json.loads(file.read_text()) for file in sorted(ROOT.glob("test_input*.json"))]
    return [job for job in found if "input" in job and "action" not in job["input"]]


def test_there_are_requests_to_check() -> None:
    assert len(requests()) >= 7


@pytest.mark.parametrize("job", requests(), ids=str)
def test_every_request_in_the_documents_is_valid(job: dict[str, Any]) -> None:
    request = parse_job(job)
    assert request.warnings == ()
    assert len(request.loras) == len(job["input"].get("loras") or [])


def test_the_sample_answer_has_what_answers_have(demo_worker: Worker) -> None:
    sample = json.loads(re.findall(r"```json\n(\{\n \"images\".*?)```", README, re.DOTALL)[0])
    job = next(
        job for job in requests() if job["input"].get("loras") == ["demo-stripes.safetensors"]
    )
    answer = demo_worker({"id": "sample", **job})
    assert list(sample) == list(answer)
    assert list(sample["timings"]) == list(answer["timings"])
    changing = {"sha256"}
    for written, found in zip(sample["loras"], answer["loras"], strict=True):
        assert list(written) == list(found)
        assert {k: v for k, v in written.items() if k not in changing} == {
            k: v for k, v in found.items() if k not in changing
        }
        assert found["sha256"].startswith(written["sha256"].rstrip("…"))


@pytest.mark.parametrize("path", list(files()), ids=lambda path: path.name)
def test_the_generated_documents_are_up_to_date(path: Path) -> None:
    assert path.read_text() == files()[path], "run make docs"


def test_every_table_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A code or a variable that is missing in the README, or stands there in vain, would be seen."""
    wrong = README.replace("| `LORA_MODE` | `auto` |", "| `LORA_MOOD` | `auto` |")
    wrong = wrong.replace("| `CACHE_FULL` |", "| `CACHE_FOOL` |").replace("| `seed` |", "| `sod` |")
    made = Mock(read_text=Mock(return_value=wrong.replace("| `refresh` |", "| `afresh` |")))
    monkeypatch.setattr("docs.generate.README", made)
    lines = files()[made].splitlines()
    gone = set(README.splitlines()) - set(lines)
    assert [line.split("|")[1].strip() for line in gone] == [
        "`CACHE_FULL`"
    ]  # has no words any more
    assert (
        "| `CACHE_FULL` | There is no room for the file, and nothing that may be removed for it. |"
        in lines
    )


def test_the_generator_knows_the_errors_of_all_packages() -> None:
    here = set(leaves(CodedError))
    assert {handler.OutOfMemory, InvalidInput, OutputTooLarge, Cancelled} <= here


def test_the_error_tree_in_the_docstring_is_the_tree() -> None:
    drawn = dict(re.findall(r"── (\w+) +(\w+)", errors.__doc__ or ""))
    drawn.pop("LoraError", None)
    here = [errors.ToolError, *leaves(errors.LoraError)]
    assert drawn == {leaf.__name__: leaf.code for leaf in here}


def test_every_file_that_the_readme_names_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    tree = re.search(r"```\n(handler\.py.*?)```", README, re.DOTALL)
    assert tree
    listed = re.findall(r"^(\S+)", tree.group(1), re.MULTILINE)
    for name in (*links, *listed):
        assert (ROOT / Path(name)).exists(), name


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


def test_the_hubs_page_shows_valid_requests_and_an_answer_that_a_worker_gives(
    demo_worker: Worker,
) -> None:
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", HUB_PAGE, re.DOTALL)]
    jobs = [block for block in blocks if "input" in block]
    (sample,) = [block for block in blocks if "input" not in block]
    assert [len(parse_job(job).loras) for job in jobs] == [1, 1]
    assert all(parse_job(job).warnings == () for job in jobs)
    drawn = {"loras": ["demo-stripes.safetensors"], "num_inference_steps": 1}
    answer = demo_worker({"id": "hub", "input": {**jobs[0]["input"], **drawn}})
    assert list(sample) == [name for name in answer if name in sample]
    assert sample["loras"][0].keys() <= answer["loras"][0].keys()
    assert sample["seed"] == answer["seed"]
    assert sample["loras"][0]["status"] == answer["loras"][0]["status"]
    named = set(re.findall(r"`((?:LORA|WORKER|HF|CIVITAI)_[A-Z_]+)`", HUB_PAGE))
    known = {setting["key"] for setting in json.loads(files()[HUB])["config"]["env"]}
    assert named - {leaf.code for leaf in leaves(CodedError)} <= known


@pytest.mark.parametrize(
    "page", ["CHANGELOG.md", "SECURITY.md", ".runpod/README.md", "docs/pictures.md"]
)
def test_every_file_that_the_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    paths = [(ROOT / page).parent / link for link in links]
    paths += [ROOT / name for name in re.findall(r"`(tests/\S+)`", text)]
    assert paths
    for path in paths:
        assert path.exists(), path


def test_the_inpainting_page_shows_the_request_that_drew_its_pictures() -> None:
    page = (ROOT / "docs" / "pictures.md").read_text()
    (job,) = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    shown = job["input"]
    assert parse_job(job).warnings == ()
    urls = {name: shown[name] for name in ("image_url", "mask_url")}
    assert shown == {**INPAINTED, **urls}
