"""Checks of an adapter; each refusal is one sentence."""

from __future__ import annotations

import json
import zipfile
from contextlib import suppress
from pathlib import Path, PurePosixPath

from lora.errors import LoraCorrupt, LoraIncompatible, LoraNotFound, LoraUnsupported
from lora.fetch.sources import redact_url
from lora.formats.adapter import LoraFile
from lora.formats.alphas import Alphas
from lora.formats.contents import MAX_SHOWN
from lora.formats.endings import SAFETENSORS
from lora.formats.header import Header, read_header
from lora.formats.peft import PEFT_CONFIG, PEFT_STEM
from lora.formats.pickles import looks_like_pickle
from lora.volume.adapters import StoredAdapter


def refuse_half_a_folder(adapter: StoredAdapter) -> None:
    """Raises: LoraNotFound if a PEFT folder lacks its weights or its config."""
    if adapter.weights is None:
        raise LoraNotFound(
            f"the folder has {PEFT_CONFIG} and no {PEFT_STEM}{SAFETENSORS} or {PEFT_STEM}.bin",
            "The training may not be done, or the weights were not copied.",
        )
    if adapter.is_peft and adapter.config is None:
        raise LoraNotFound(
            f"the folder has no {PEFT_CONFIG}, so nobody knows how its weights are scaled",
            "Copy it from where the adapter was trained.",
        )


def header_of(path: Path) -> Header | None:
    """The header of a whole adapter; None for a pickle, of which only the ending is checked.

    Raises: LoraCorrupt, LoraUnsupported; OSError.
    """
    if path.suffix == SAFETENSORS or not looks_like_pickle(path):
        return read_header(path)
    with path.open("rb") as stream:
        packed = stream.read(2) == b"PK"
    if packed and not zipfile.is_zipfile(path):
        raise LoraCorrupt("the pickle was cut off", "Upload or download it again.")
    return None


def check_config(config: str | None, model: str) -> None:
    """Raises: LoraIncompatible if a PEFT config names a base model that is neither the worker's nor a folder
    that exists; LoraCorrupt or LoraUnsupported if it is no config that can be read.

    Where no base model is named, the weights' names and shapes decide later.
    """
    if config is not None:
        _refuse_other_base(config, model)
        Alphas.of({}, config)


def _refuse_other_base(config: str, model: str) -> None:
    try:
        fields = json.loads(config)
        base = fields.get("base_model_name_or_path") or ""
    except (ValueError, AttributeError, RecursionError) as error:
        raise LoraCorrupt(f"{PEFT_CONFIG} is no JSON object") from error
    if not isinstance(base, str):
        raise LoraCorrupt(f"{PEFT_CONFIG}: base_model_name_or_path is no text")
    if not base or not model or _same_model(base, model):
        return
    with suppress(OSError, ValueError):
        if Path(base).is_dir():
            return
    shown = PurePosixPath(base).name if base.startswith("/") else redact_url(base)
    raise LoraIncompatible(
        f"it was trained on {shown[:MAX_SHOWN]!r}, and this worker runs {_last(model)!r}",
        "A job may name it all the same.",
    )


def _same_model(base: str, model: str) -> bool:
    """Whether both mean the same repo, or a folder with the repo's name."""
    if base.startswith("/") or model.startswith("/"):
        return _last(base) == _last(model)
    return base.strip("/").casefold() == model.strip("/").casefold()


def _last(name: str) -> str:
    return PurePosixPath(name).name.removesuffix(SAFETENSORS).casefold()


def refuse_unused(file: LoraFile) -> None:
    """Raises: LoraUnsupported if a tensor of the file cannot be used, as a job with `strict_loras` would."""
    if file.unused:
        first = file.unused[0]
        raise LoraUnsupported(
            f"{len(file.unused)} of {file.keys + len(file.unused)} tensors cannot be used "
            f"({first.key[:MAX_SHOWN]}: {first.reason})"
        )
