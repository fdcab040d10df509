"""Writes what the documents repeat of the code: `make docs`. A test compares it with what is there.

That is the README's tables of parameters, environment variables and errors, and `.runpod/hub.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import handler  # noqa: F401 - with it, every class of error is there
from entries import LORA_ENTRY
from lora.errors import CodedError
from schemas import IMAGE_REQUEST
from settings import Settings

ROOT = Path(__file__).resolve().parent.parent
README, HUB = ROOT / "README.md", ROOT / ".runpod" / "hub.json"

TITLES = {
    "WORKER_MODEL": "Base model",
    "LORA_CACHE_DIR": "LoRA cache folder",
    "LORA_MODE": "LoRA mode",
    "HF_TOKEN": "Hugging Face token",
}
"""What the hub's form shows at once; everything else is under its advanced settings."""


def files() -> dict[Path, str]:
    """Each generated file's whole text, as it should be."""
    text = README.read_text()
    for title, rows in (
        ("Parameters", _parameters(IMAGE_REQUEST)),
        ("LoRA entries", _parameters(LORA_ENTRY)),
        ("Environment variables", _environment()),
        ("Errors", _errors(text)),
    ):
        text = _with_table(text, title, rows)
    return {README: text, HUB: json.dumps(_hub_json(), indent=2) + "\n"}


def leaves(error: type[CodedError]) -> list[type[CodedError]]:
    """The classes below an error that have none below themselves: each is one code."""
    below = error.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [error]


def _parameters(schema: dict[str, Any]) -> Iterable[Sequence[str]]:
    for name, rule in schema["properties"].items():
        default = rule.get("default")
        yield name, "" if default is None else f"`{json.dumps(default)}`", rule["description"]


def _environment() -> Iterable[Sequence[str]]:
    for setting in fields(Settings):
        default = int(setting.default) if isinstance(setting.default, bool) else setting.default
        shown = f"`{default}`" if str(default) else ""
        yield setting.metadata["env"], shown, setting.metadata["description"]


def _errors(readme: str) -> Iterable[Sequence[str]]:
    """Every code, in the README's own order and words; a new one comes last, with its docstring."""
    written = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*) \|$", _section(readme, "Errors"), re.M))
    codes = {leaf.code: str(leaf.__doc__).splitlines()[0] for leaf in leaves(CodedError)}
    return {
        code: written.get(code, codes[code]) for code in (*written, *codes) if code in codes
    }.items()


def _section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def _with_table(text: str, title: str, rows: Iterable[Sequence[str]]) -> str:
    """The text with these rows in the first table of a section; the table's head stays."""
    section = _section(text, title)
    body = "\n".join(f"| `{name}` | {' | '.join(cells)} |" for name, *cells in rows)
    made = re.sub(
        r"(?<=\n)(\| --- .*\n)(?:\|.*\n)*", lambda head: f"{head[1]}{body}\n", section, count=1
    )
    return text.replace(section, made)


def _env_input(setting: Any) -> dict[str, Any]:
    about, default = setting.metadata, setting.default
    env = about["env"]
    shown: dict[str, Any] = {
        "name": TITLES.get(env, env.replace("_", " ").capitalize()),
        "description": about["description"],
        "required": False,
        "advanced": env not in TITLES,
    }
    if isinstance(default, bool):
        shown |= {"type": "boolean", "default": default}
    elif isinstance(default, int | float):
        shown |= {"type": "number", "default": default, "min": about["minimum"]}
    else:
        shown |= {"type": "string", "default": str(default)}
    if "options" in about:
        shown["options"] = [{"label": option, "value": option} for option in about["options"]]
    return {"key": env, "input": shown}


def _hub_json() -> dict[str, Any]:
    return {
        "title": "SDXL with any LoRA",
        "description": "SDXL that applies any LoRA on any request: by URL, Hugging Face repo or cached "
        "name, in milliseconds, and gone without a trace afterwards",
        "type": "serverless",
        "category": "image",
        "iconUrl": "",
        "config": {
            "runsOn": "GPU",
            "containerDiskInGb": 40,
            "gpuCount": 1,
            "gpuIds": "ADA_24,AMPERE_24,AMPERE_48",
            "allowedCudaVersions": ["12.8", "12.9", "13.0"],
            "presets": [{"name": "SDXL", "defaults": {"LORA_CACHE_DIR": "/runpod-volume/loras"}}],
            "env": [_env_input(setting) for setting in fields(Settings)],
        },
    }


if __name__ == "__main__":
    for path, content in files().items():
        path.write_text(content)
