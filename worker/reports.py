"""What answers say of a LoRA."""

from __future__ import annotations

from typing import Any

from lora.engine.stack import LoraUse, Mode
from lora.errors import LoraUnsupported
from lora.fetch.sources import Reference
from lora.volume.loader import Loaded

MAX_UNUSED = 1000
"""Most unused tensors that an answer lists; its warning has the whole count."""


def report(
    use: LoraUse[Reference], loaded: Loaded, mode: Mode | None, *, in_range: bool
) -> dict[str, Any]:
    """One LoRA's entry in the answer."""
    file = loaded.file
    # Text encoders do not denoise, so a range does not concern them.
    drawn = use if in_range else use.without("unet")
    layers = len({layer.target for layer in file.layers if drawn.scale_of(layer.target)})
    words = sorted({word.word for word in loaded.embeddings}) if use.scale else []
    return {
        **about(loaded),
        "layers": layers,
        "words": words,
        "used_keys": file.keys,
        "unused_keys": unused_keys(loaded),
        "scale": {"all": use.scale, **use.components} if use.components else use.scale,
        "mode": mode,
        "status": "applied"
        if layers or words
        else "scale is 0"
        if in_range
        else "no step in its range",
    }


def about(loaded: Loaded) -> dict[str, Any]:
    """What every answer says of a LoRA."""
    return {
        "source": loaded.reference.shown,
        "file": loaded.entry.name,
        "sha256": loaded.file.sha256,
        "origin": "downloaded" if loaded.entry.downloaded else "cached",
        "algorithm": "+".join(loaded.file.algorithms),
        "rank": loaded.file.rank,
    }


def unused_keys(loaded: Loaded) -> list[dict[str, str]]:
    """The first `MAX_UNUSED` tensors that cannot be used, each with its reason."""
    return [
        {"key": unused.key[:200], "reason": unused.reason}
        for unused in loaded.file.unused[:MAX_UNUSED]
    ]


def refuse_unused(loaded: list[Loaded]) -> None:
    """Raises: LoraUnsupported if a file has a tensor that cannot be used."""
    for lora in loaded:
        if unused := lora.file.unused:
            raise LoraUnsupported(
                f"{lora.reference.shown}: {share_of_unused(lora)} cannot be used "
                f"({unused[0].key[:200]}: {unused[0].reason})",
                "Leave out strict_loras to use the others.",
            )


def share_of_unused(lora: Loaded) -> str:
    """How many of a file's tensors cannot be used, in words."""
    count = len(lora.file.unused)
    return f"{count} of {lora.file.keys + count} tensors"
