"""Which files a model consists of: one file, shards with an index, or the folder of a pipeline."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from lora.errors import ToolError
from lora.tools import WEIGHTS
from lora.tools.models.weights import unreadable


class ModelFile(NamedTuple):
    """One of the files with a model's weights."""

    path: Path
    component: str
    """The component of the pipeline in whose folder the file is; empty for a model of its own."""


OTHER_WEIGHTS = (".gguf", ".onnx", ".onnx_data", ".msgpack", ".h5", ".pb", ".sft")
"""Endings of files with weights in forms that cannot be read."""

_INDEX = re.compile(r".+\.(safetensors|bin)\.index(\.\w+)?\.json")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_VARIANT = re.compile(r".+\.(fp16|bf16|fp32|fp8|ema|non_ema|int8)(-\d{5}-of-\d{5})?(\.\w+)+")
_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
"""What diffusers and transformers call a component's weights; a folder may have other files too."""


def is_index(path: Path) -> bool:
    """Whether a file's name is that of an index, which lists the shards of a model."""
    return _INDEX.fullmatch(path.name) is not None


def is_weights(path: Path) -> bool:
    """Whether a file's name is that of a file with weights, in whatever form."""
    return path.suffix in (*WEIGHTS, *OTHER_WEIGHTS)


def files_of(path: Path) -> tuple[ModelFile, ...]:
    """The files of a model, in order. Among variants (fp16, ema) the one without a suffix is preferred.

    Raises: ToolError if there is nothing, a shard is missing, or a folder holds more than one model.
    """
    try:
        if path.is_dir():
            if components := _pipeline(path):
                return components
            files = _files_in(path)
        else:
            files = shards_of(path) if is_index(path) else [path]
            if not path.exists():
                raise ToolError(f"there is no {path}")
        return tuple(ModelFile(file, "") for file in files)
    except OSError as error:
        raise unreadable(path, error) from error


def _pipeline(root: Path) -> tuple[ModelFile, ...]:
    """The files of a pipeline's components; nothing if the folder is not that of a pipeline."""
    files: list[ModelFile] = []
    if not any((root / name).exists() for name in ("model_index.json", "unet", "transformer")):
        return ()
    for folder in sorted(file for file in root.iterdir() if file.is_dir()):
        if any(file.suffix in WEIGHTS or is_index(file) for file in folder.iterdir()):
            files += [ModelFile(file, folder.name) for file in _files_in(folder)]
    if not files and (root / "model_index.json").exists():
        raise ToolError(f"{root} has a model_index.json, and none of its parts has weights")
    return tuple(files)


def _files_in(folder: Path) -> list[Path]:
    """The files that make up the one model in a folder. Raises: ToolError."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for suffix in WEIGHTS:
        fitting = [
            file
            for file in files
            if file.suffix == suffix or (is_index(file) and f"{suffix}.index" in file.name)
        ]
        full = [file for file in fitting if not _VARIANT.fullmatch(file.name)]
        if fitting:
            return _one_model(full or fitting, folder)
    raise ToolError(f"{folder} holds no weights", f"Weights end in {', '.join(WEIGHTS)}.")


def _one_model(files: list[Path], folder: Path) -> list[Path]:
    """The files of one model among those of one kind and variant; shards may have an index or none."""
    named = [file for file in files if file.name.startswith(tuple(f"{n}." for n in _NAMES))]
    if indices := [file for file in named or files if is_index(file)]:
        return shards_of(indices[0])
    shards = [file for file in files if _SHARD.fullmatch(file.name)]
    if shards and not named:
        return _all_shards(shards, folder)
    if len(named or files) > 1:
        names = ", ".join(file.name for file in files[:3])
        raise ToolError(f"{folder} holds several models ({names})", "Name one of the files.")
    return named or files


def _all_shards(shards: list[Path], folder: Path) -> list[Path]:
    """Every shard, by the numbers in its name. Raises: ToolError if one is missing."""
    first = _SHARD.fullmatch(shards[0].name)
    if first is None:
        return shards
    stem, _, count, suffix = first.groups()
    wanted = [f"{stem}-{n:05}-of-{count}{suffix}" for n in range(1, int(count) + 1)]
    there = {file.name for file in shards}
    if missing := [name for name in wanted if name not in there]:
        raise ToolError(f"{folder} lacks the shard {missing[0]}", "Download the model again.")
    if others := sorted(there - set(wanted)):
        raise ToolError(f"{folder} holds several models ({stem}, {others[0]})", "Name one of them.")
    return [shards[0].with_name(name) for name in wanted]


def shards_of(index: Path) -> list[Path]:
    """The shards that an index names. Raises: ToolError if it is malformed or a shard is missing; OSError."""
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not shards or any(Path(name).name != name for name in shards):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ToolError(f"{index} is no index of a model's shards") from error
    if missing := [name for name in shards if not index.with_name(name).is_file()]:
        hint = "Download the model again."
        raise ToolError(f"{index} names {missing[0]}, which is missing", hint)
    return [index.with_name(name) for name in shards]
