"""What the documents say is what the code does: requests, tables, files."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import handler
from handler import Worker
from lora import errors
from lora.errors import CodedError
from schemas import IMAGE_REQUEST, LORA_ENTRY, parse_job
from settings import Settings
from tests.conftest import ROOT
from tests.make_hub_json import PATH, hub_json
from validation import InvalidInput
from worker.outputs import OutputTooLarge
from worker.stop import Cancelled

README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, title
    return found.group(1)


def rows(text: str) -> list[list[str]]:
    """The body rows of every table in a text."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


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


def shown(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value)}`"


@pytest.mark.parametrize(
    ("title", "schema"), [("Parameters", IMAGE_REQUEST), ("LoRA entries", LORA_ENTRY)]
)
def test_the_parameter_tables_are_the_schema(title: str, schema: dict[str, Any]) -> None:
    written = {row[0].strip("`"): row[1:] for row in rows(section(title))}
    expected = {
        name: [shown(rule.get("default")), rule["description"]]
        for name, rule in schema["properties"].items()
    }
    assert written == expected


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


def test_the_environment_table_is_the_settings() -> None:
    written = {row[0].strip("`"): row[1:] for row in rows(section("Environment variables"))}
    expected = {
        setting.metadata["env"]: [
            f"`{setting.default}`" if str(setting.default) else "",
            setting.metadata["description"],
        ]
        for setting in fields(Settings)
    }
    assert written == expected


def leaves(error: type[CodedError]) -> list[type[CodedError]]:
    below = error.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [error]


def test_the_error_table_lists_every_code() -> None:
    assert {handler.OutOfMemory, InvalidInput, OutputTooLarge, Cancelled} <= set(leaves(CodedError))
    codes = {leaf.code for leaf in leaves(CodedError)}
    assert {row[0].strip("`") for row in rows(section("Errors"))} == codes


def test_the_error_tree_in_the_docstring_is_the_tree() -> None:
    drawn = dict(re.findall(r"── (\w+) +(\w+)", errors.__doc__ or ""))
    drawn.pop("LoraError", None)
    here = [errors.ToolError, *leaves(errors.LoraError)]
    assert drawn == {leaf.__name__: leaf.code for leaf in here}


def test_hub_json_is_made_from_the_settings() -> None:
    assert json.loads(PATH.read_text()) == hub_json(), "run python -m tests.make_hub_json"


def test_every_file_that_the_readme_names_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    tree = re.search(r"```\n(handler\.py.*?)```", README, re.DOTALL)
    assert tree
    listed = re.findall(r"^(\S+)", tree.group(1), re.MULTILINE)
    for name in (*links, *listed):
        assert (ROOT / Path(name)).exists(), name
