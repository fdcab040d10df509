"""Writes what the documents repeat of the code: `make docs`. A test compares it with what is there.

That is the tables of fields, settings and errors, and `.runpod/hub.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import handler  # noqa: F401 - with these, every class of error is there
import page.server  # noqa: F401
import worker.http.images
import worker.text.serve  # noqa: F401
from entries import LORA_ENTRY
from live.request import FRAME, START
from lora.errors import CodedError
from schemas import IMAGE_REQUEST
from settings import Settings
from text_settings import TextSettings
from validation import PATTERNS
from worker.actions import Actions
from worker.live_job import FRAMES
from worker.parts import Parts
from worker.selection import PRESET
from worker.text.parameters import CHAT, COMPLETION, SCHEMAS, UNSERVED, WITHOUT_EFFECT

ROOT = Path(__file__).resolve().parent.parent
DOCS, HUB = ROOT / "docs", ROOT / ".runpod" / "hub.json"

Rows = Iterable[Sequence[str]]

TITLES = {
    "WORKER_MODEL": "Base model",
    "LORA_CACHE_DIR": "LoRA cache folder",
    "LORA_MODE": "LoRA mode",
    "HF_TOKEN": "Hugging Face token",
}
"""What the hub's form shows at once; everything else is under its advanced settings."""

SPELT = {"LORA": "LoRA", "HF": "Hugging Face", "URLS": "URLs", "CIVITAI": "Civitai"} | {
    word: word for word in ("VAE", "GB", "MB", "TTL", "URL", "ID")
}
"""Words of variables that a title does not write in small letters."""

KINDS = {"string": "text", "integer": "whole number", "boolean": "true or false", "array": "list"}
"""JSON Schema's types in words, where they differ."""


def files() -> dict[Path, str]:
    """Each generated file's whole text, as it should be."""
    errors = (DOCS / "errors.md").read_text()
    tables: Mapping[str, Mapping[str, Rows]] = {
        "requests.md": {
            "Fields": _fields(IMAGE_REQUEST["properties"]),
            "LoRA entries": _fields(LORA_ENTRY["properties"]),
            "Fields of actions": _action_fields(),
        },
        "library.md": {"Presets": _fields(PRESET["properties"])},
        "live.md": {
            "A job with frames": _fields(FRAMES["properties"]),
            "The first message": _fields(START["properties"]),
            "Each frame": _fields(FRAME["properties"]),
        },
        "settings.md": {"Settings": _settings(fields(Settings))},
        "text.md": {"Parameters": _text_fields(), "Text settings": _settings(text_settings())},
        "errors.md": {"Codes": _errors(errors)},
    }
    made = {HUB: json.dumps(_hub_json(), indent=2) + "\n"}
    for name, rows_of in tables.items():
        text = (DOCS / name).read_text()
        for title, rows in rows_of.items():
            text = _with_table(text, title, rows)
        made[DOCS / name] = text
    return made


def leaves(error: type[CodedError]) -> list[type[CodedError]]:
    """The classes below an error that have none below themselves: each is one code."""
    below = error.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [error]


def _fields(properties: Mapping[str, dict[str, Any]]) -> Rows:
    """Name, type with limits, default, meaning."""
    for name, rule in properties.items():
        default = rule.get("default")
        shown = "" if default in (None, []) else f"`{json.dumps(default)}`"
        yield f"`{name}`", kind_of(rule), shown, rule["description"]


def kind_of(rule: Mapping[str, Any]) -> str:
    """What a value may be, in words: `whole number, 1 to 500`."""
    types = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    kinds = [KINDS.get(kind, kind) for kind in types if kind != "null"]
    if "enum" in rule:
        return ", ".join(f"`{value}`" for value in rule["enum"] if value is not None)
    words = [" or ".join(kinds)]
    if "minimum" in rule:
        words.append(f"{rule['minimum']} to {rule['maximum']}")
    if "multipleOf" in rule:
        words.append(f"a multiple of {rule['multipleOf']}")
    if "pattern" in rule:
        words.append(PATTERNS[rule["pattern"]])
    if "maxItems" in rule:
        words.append(f"at most {rule['maxItems']} entries")
    return ", ".join(words)


def _action_fields() -> Rows:
    """The fields that only actions have; those of entries and presets stand in their own tables."""
    shared = [*LORA_ENTRY["properties"].values(), *PRESET["properties"].values()]
    nothing = SimpleNamespace(catalog=None, library=SimpleNamespace(cache=None))
    for name, action in Actions(cast(Parts, nothing), {}).table.items():
        own = {field: rule for field, rule in action.fields.items() if rule not in shared}
        for row in _fields(own):
            yield f"`{name}`", *row


def _text_fields() -> Rows:
    """The fields of text requests, without those of pictures' requests and those that change nothing."""
    shared = {*IMAGE_REQUEST["properties"], *WITHOUT_EFFECT, *UNSERVED, "messages"} - {
        "prompt",
        "seed",
    }
    both = {**SCHEMAS[COMPLETION]["properties"], **SCHEMAS[CHAT]["properties"]}
    yield from _fields({name: rule for name, rule in both.items() if name not in shared})


def text_settings() -> list[Any]:
    """The settings that only a worker for text has."""
    own = {setting.metadata["env"] for setting in fields(Settings)}
    return [one for one in fields(TextSettings) if one.metadata["env"] not in own]


def _settings(settings: Iterable[Any]) -> Rows:
    for setting in settings:
        default = int(setting.default) if isinstance(setting.default, bool) else setting.default
        shown = f"`{default}`" if str(default) else ""
        about = setting.metadata
        yield f"`{about['env']}`", _kind_of_setting(setting), shown, about["description"]


def _kind_of_setting(setting: Any) -> str:
    if "options" in setting.metadata:
        return ", ".join(f"`{option}`" for option in setting.metadata["options"])
    kinds = {bool: "`0` or `1`", int: "whole number", float: "number", str: "text"}
    kind = kinds.get(type(setting.default), "folder")
    least = setting.metadata.get("minimum")
    return kind if least is None else f"{kind}, at least {least}"


def _errors(page: str) -> Rows:
    """Every code, in the page's own order and words; a new one comes last, with its docstring."""
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*) \| (.*) \|$", _section(page, "Codes"), re.M)
    written = {code: words for code, *words in rows}
    codes = {leaf.code: [str(leaf.__doc__).splitlines()[0], ""] for leaf in leaves(CodedError)}
    for code in (*written, *(code for code in codes if code not in written)):
        if code in codes:
            yield f"`{code}`", *written.get(code, codes[code])


def _section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def _with_table(text: str, title: str, rows: Rows) -> str:
    """The text with these rows in the first table of a section; the table's head stays."""
    section = _section(text, title)
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    made = re.sub(
        r"(?<=\n)(\| --- .*\n)(?:\|.*\n)*", lambda head: f"{head[1]}{body}\n", section, count=1
    )
    return text.replace(section, made)


def _title(env: str) -> str:
    words = " ".join(SPELT.get(word, word.lower()) for word in env.split("_"))
    return words[:1].upper() + words[1:]


def _env_input(setting: Any) -> dict[str, Any]:
    about, default = setting.metadata, setting.default
    env = about["env"]
    shown: dict[str, Any] = {
        "name": TITLES.get(env, _title(env)),
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
        "description": "Draws with SDXL and applies the LoRAs that a request names, by URL, Hugging Face "
        "repo, Civitai model or file name. No restart, and no trace of them in the next request",
        "type": "serverless",
        "category": "image",
        "iconUrl": "",
        "config": {
            "runsOn": "GPU",
            "containerDiskInGb": 40,
            "gpuCount": 1,
            "gpuIds": "ADA_24,AMPERE_24,AMPERE_48",
            "allowedCudaVersions": ["12.8", "12.9", "13.0"],
            "presets": [
                {"name": "SDXL", "defaults": {"LORA_CACHE_DIR": "/runpod-volume/loras"}},
                {
                    "name": "Text",
                    "defaults": {
                        "WORKER_KIND": "text",
                        "MODEL_NAME": "Qwen/Qwen2.5-7B-Instruct",
                        "LORA_CACHE_DIR": "/runpod-volume/loras",
                    },
                },
            ],
            "env": [_env_input(setting) for setting in (*fields(Settings), *text_settings())],
        },
    }


if __name__ == "__main__":
    for path, content in files().items():
        path.write_text(content)
