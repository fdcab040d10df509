"""LoRA adapters for diffusion pipelines: find, fetch, read and apply them, and restore every weight.

Any program can use this library; it knows no job and no platform. `docs/library-use.md` shows how:

    import lora

    engine = lora.engine_for(pipeline)
    adapter = lora.load_adapter("style.safetensors", engine)
    with engine.applied([lora.LoraUse(adapter, 0.8)]):
        image = pipeline("a lighthouse in a storm").images[0]

Importing `lora` imports neither torch nor any other package. Each name is looked up when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from lora.engine.engine import Block, Budgets, LoraEngine
    from lora.engine.stack import LoraUse, Mode
    from lora.errors import CodedError, LoraError
    from lora.fetch.sources import Reference
    from lora.formats.adapter import LoraFile
    from lora.library.catalog import Catalog
    from lora.volume.cache import CacheEntry, Limits, VolumeCache
    from lora.volume.loader import Loaded, LoraLibrary
    from lora.volume.opening import open_cache
    from lora.volume.presets import Presets

_ROOMS = {
    "Block": "engine.engine",
    "Budgets": "engine.engine",
    "CacheEntry": "volume.cache",
    "Catalog": "library.catalog",
    "CodedError": "errors",
    "Limits": "volume.cache",
    "Loaded": "volume.loader",
    "LoraEngine": "engine.engine",
    "LoraError": "errors",
    "LoraFile": "formats.adapter",
    "LoraLibrary": "volume.loader",
    "LoraUse": "engine.stack",
    "Mode": "engine.stack",
    "Presets": "volume.presets",
    "Reference": "fetch.sources",
    "VolumeCache": "volume.cache",
    "open_cache": "volume.opening",
}
"""Name -> the module below `lora` that defines it."""

__all__ = [
    "Block",
    "Budgets",
    "CacheEntry",
    "Catalog",
    "CodedError",
    "Limits",
    "Loaded",
    "LoraEngine",
    "LoraError",
    "LoraFile",
    "LoraLibrary",
    "LoraUse",
    "Mode",
    "Presets",
    "Reference",
    "VolumeCache",
    "engine_for",
    "load_adapter",
    "open_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'lora' has no attribute {name!r}")
    return getattr(import_module(f"lora.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def engine_for(pipeline: Any, budgets: Budgets | None = None) -> LoraEngine:
    """An engine for the parts of a diffusers pipeline that LoRAs can change; nothing is changed yet.

    The parts are those of `pipeline.components` with a name that adapter files know: `unet` or
    `transformer`, which denoises, then the text encoders. `budgets` bounds the memory between blocks.
    Raises: ValueError if the pipeline has no such part.
    """
    from lora.engine.engine import Budgets, LoraEngine
    from lora.formats.names.prefixes import COMPONENTS

    parts: dict[str, nn.Module] = {
        name: part for name in COMPONENTS if (part := pipeline.components.get(name)) is not None
    }
    if not parts:
        raise ValueError(f"the pipeline has none of {', '.join(COMPONENTS)}")
    return LoraEngine(parts, budgets or Budgets())


def load_adapter(path: Path | str, engine: LoraEngine) -> LoraFile:
    """Reads an adapter from the disk, and binds its tensors to the modules of the engine's pipeline.

    `path` is a .safetensors file, a pickle of torch.save (nothing in it is run), or a folder that PEFT or
    diffusers saved. Every tensor of the file is either in `layers` and `embeddings`, or in `unused` with the
    reason. Changes no weight. Raises: LoraNotFound if there is no adapter; LoraCorrupt if the file is not
    whole, or holds NaN or infinity; LoraIncompatible if it is for another model; LoraUnsupported if its
    tensors fit, and none can be applied.
    """
    from lora.formats.opening import load_file

    return load_file(Path(path), engine.key_map)
