"""The files of a folder that PEFT saved: the tensors, and beside them the config that scales them."""

from __future__ import annotations

from pathlib import Path

from lora.errors import LoraCorrupt

PEFT_STEM, PEFT_CONFIG = "adapter_model", "adapter_config.json"

STEMS = ("pytorch_lora_weights", PEFT_STEM)
"""The files of a folder or repo that are meant when none is named, in order of preference."""

CONFIG_BYTES = 10_000_000
"""No adapter's config is larger."""


def config_beside(path: Path) -> str | None:
    """The text of the config that belongs to a file of tensors; None if there is none.

    Raises: LoraCorrupt if it cannot be a config, or cannot be read.
    """
    config = path.with_name(PEFT_CONFIG)
    return read_config(config) if path.stem == PEFT_STEM and config.is_file() else None


def read_config(path: Path) -> str:
    """The text of an adapter_config.json. Raises: LoraCorrupt."""
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise LoraCorrupt(f"{PEFT_CONFIG} is no adapter's config")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LoraCorrupt(f"{PEFT_CONFIG} is no text") from error
    except OSError as error:
        raise LoraCorrupt(f"{PEFT_CONFIG} cannot be read") from error
