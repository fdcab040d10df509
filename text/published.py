"""A stack of adapters as one PEFT folder, in the plainest form that PEFT has, for a server of others' making.

Every scale, alpha and pattern is multiplied into the factors, and every layer has the same rank: nothing is
left that a reader could take another way.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora.durable import rename_folder
from lora.engine.stack import Stack
from lora.errors import LoraUnsupported
from lora.formats.adapter import LoraFile
from lora.formats.names.keys import Target

KEPT = 7 * 86_400
"""Seconds after its last use from which on a folder may be removed."""

HINT = "A worker without TEXT_ENGINE=vllm serves it."


def name_of(stack: Stack, base: str) -> str:
    """What a stack on a base is called: the same content and scales have the same name, others never."""
    said = [base, *((use.lora.identity, use.all_scales) for use in stack)]
    return f"lora-{hashlib.sha256(repr(said).encode()).hexdigest()[:24]}"


def publish(stack: Stack, folder: Path, misfit: Callable[[LoraFile], str | None], most: int) -> int:
    """Writes a stack as a PEFT folder, whole or not at all; one that is there stays. Returns its rank.

    `misfit` says why an adapter is not low-rank; `most` is the largest rank.
    Raises: LoraUnsupported; OSError.
    """
    for use in stack:
        if reason := misfit(use.lora):
            raise LoraUnsupported(f"vLLM cannot serve it: {reason}", HINT)
    parts = _parts(stack)
    rank = max(sum(down.shape[0] for down, _ in pairs) for pairs in parts.values())
    if rank > most:
        added = "" if len(stack) == 1 else "the ranks of its adapters add up: "
        raise LoraUnsupported(
            f"vLLM cannot serve it: {added}rank {rank} is over the server's {most}",
            "Raise MAX_LORA_RANK; a server that runs already needs a larger --max-lora-rank.",
        )
    if folder.is_dir():
        os.utime(folder)
        return rank
    _sweep(folder.parent)
    tensors: dict[str, Tensor] = {}
    for target, pairs in parts.items():
        stem = f"base_model.model.{target.path}"
        down, up = (
            torch.cat(column, axis)
            for column, axis in zip(zip(*pairs, strict=True), (0, 1), strict=True)
        )
        wide = rank - down.shape[0]
        tensors[f"{stem}.lora_A.weight"] = torch.nn.functional.pad(
            down, (0, 0, 0, wide)
        ).contiguous()
        tensors[f"{stem}.lora_B.weight"] = torch.nn.functional.pad(up, (0, wide)).contiguous()
    names = sorted({target.path.rsplit(".", 1)[-1] for target in parts})
    _write(folder, tensors, rank, names)
    return rank


def _parts(stack: Stack) -> dict[Target, list[tuple[Tensor, Tensor]]]:
    """Target -> the factors of each adapter, [rank, in] and [out, rank], with all scales in the second."""
    parts: dict[Target, list[tuple[Tensor, Tensor]]] = {}
    for use in stack:
        for layer in use.lora.layers:
            factors = layer.algorithm.low_rank()
            if factors is None:
                raise LoraUnsupported(f"vLLM cannot serve it: {layer.algorithm.name}", HINT)
            scale = use.scale_of(layer.target) * factors.scaling
            up = factors.up.float() * scale
            parts.setdefault(layer.target, []).append((factors.down.float(), up))
    return parts


def _sweep(parent: Path) -> None:
    """Removes what nobody has used for long."""
    for old in parent.glob("*") if parent.is_dir() else ():
        with suppress(OSError):
            if old.stat().st_mtime < time.time() - KEPT:
                shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, tensors: dict[str, Tensor], rank: int, modules: list[str]) -> None:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": modules,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        (part / "adapter_config.json").write_text(json.dumps(config))
        part.chmod(0o755)  # the server may run as somebody else
        try:
            rename_folder(part, folder)
        except OSError:
            if not folder.is_dir():
                raise  # otherwise another worker was faster, with the same content
    finally:
        shutil.rmtree(part, ignore_errors=True)
