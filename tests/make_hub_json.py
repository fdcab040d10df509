"""Writes `.runpod/hub.json` from the settings: `python -m tests.make_hub_json`. A test compares the two."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from settings import Settings

PATH = Path(__file__).resolve().parent.parent / ".runpod" / "hub.json"

TITLES = {
    "WORKER_MODEL": "Base model",
    "LORA_CACHE_DIR": "LoRA cache folder",
    "LORA_MODE": "LoRA mode",
    "HF_TOKEN": "Hugging Face token",
}
BASIC = tuple(TITLES)
"""What the form shows at once; everything else is under its advanced settings."""


def env_input(setting: Any) -> dict[str, Any]:
    about = setting.metadata
    env = about["env"]
    shown: dict[str, Any] = {
        "name": TITLES.get(env, env.replace("_", " ").capitalize()),
        "description": about["description"],
        "required": False,
        "advanced": env not in BASIC,
    }
    if isinstance(setting.default, float):
        shown |= {"type": "number", "default": setting.default, "min": about["minimum"]}
    else:
        shown |= {"type": "string", "default": str(setting.default)}
    if "options" in about:
        shown["options"] = [{"label": option, "value": option} for option in about["options"]]
    return {"key": env, "input": shown}


def hub_json() -> dict[str, Any]:
    """The whole file."""
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
            "env": [env_input(setting) for setting in fields(Settings)],
        },
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(hub_json(), indent=2) + "\n")
