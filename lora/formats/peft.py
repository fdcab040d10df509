"""The files of a folder that PEFT saved: the tensors, the config that scales them, and the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from lora.errors import LoraCorrupt

PEFT_STEM, PEFT_CONFIG = "adapter_model", "adapter_config.json"

STEMS = ("pytorch_lora_weights", PEFT_STEM)
"""The files of a folder or repo that are meant when none is named, in order of preference."""

TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")
"""The files of which the first that is there holds the chat template."""

CONFIG_BYTES = 10_000_000
"""No adapter's config is larger."""

TEMPLATE_LENGTH = 400_000
"""Characters of a chat template."""


class Beside(NamedTuple):
    """What lies beside an adapter's tensors, as texts; None for what is not there."""

    config: str | None = None
    template: str | None = None
    """The chat template with which it was trained."""


def config_beside(path: Path) -> str | None:
    """The text of the config that belongs to a file of tensors; None if there is none.

    Raises: LoraCorrupt if it cannot be a config, or cannot be read.
    """
    config = path.with_name(PEFT_CONFIG)
    return read_config(config) if path.stem == PEFT_STEM and config.is_file() else None


def beside(path: Path) -> Beside:
    """What belongs to a file of tensors. Raises: LoraCorrupt."""
    return Beside(config_beside(path), template_beside(path))


def template_beside(path: Path) -> str | None:
    """The chat template that belongs to a file of tensors. Raises: LoraCorrupt."""
    files = [path.with_name(name) for name in TEMPLATES] if path.stem == PEFT_STEM else []
    found = next((file for file in files if file.is_file()), None)
    return template_in(found.name, read_config(found)) if found else None


def template_in(name: str, text: str) -> str | None:
    """The chat template in the text of a file of `TEMPLATES`, `default` of several. Raises: LoraCorrupt."""
    template = text if name == TEMPLATES[0] else _template_of(name, text)
    if template and len(template) > TEMPLATE_LENGTH:
        raise LoraCorrupt(f"{name} is no chat template: it is too long")
    return template or None


def _template_of(name: str, text: str) -> str | None:
    try:
        said = json.loads(text).get("chat_template")
        if isinstance(said, list):
            said = {one["name"]: one["template"] for one in said}.get("default")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LoraCorrupt(f"{name} is not what a tokenizer writes") from error
    if said is not None and not isinstance(said, str):
        raise LoraCorrupt(f"{name}: its chat_template is no text")
    return said


def read_config(path: Path) -> str:
    """The text of an adapter_config.json, or of another file beside it. Raises: LoraCorrupt."""
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise LoraCorrupt(f"{path.name} is no adapter's config")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LoraCorrupt(f"{path.name} is no text") from error
    except OSError as error:
        raise LoraCorrupt(f"{path.name} cannot be read") from error
