"""What setup makes once and every job uses."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora.engine.engine import LoraEngine
from lora.library.catalog import Catalog
from lora.volume.loader import LoraLibrary
from lora.volume.presets import Presets
from pipelines.image import ImagePipeline
from settings import Settings
from worker.opening import default_loras
from worker.selection import Selection
from worker.store import Bucket

Job = Mapping[str, Any]
"""A job as RunPod hands it over: `id`, `input`, and what else the client sent."""

Answer = dict[str, Any]
"""What the platform gets for a job; JSON can hold it."""


@dataclass(frozen=True)
class Parts:
    """The models, the engine, the library and the settings of one worker."""

    pipeline: ImagePipeline
    engine: LoraEngine
    library: LoraLibrary
    bucket: Bucket | None
    settings: Settings
    drawing: threading.Lock
    """Held while a job changes weights and draws: one job at a time."""

    @cached_property
    def catalog(self) -> Catalog:
        """What is known of the adapters on the volume: the actions `library.*`."""
        training, cache = self.settings.lora_training_dir, self.library.cache
        folder = Path(training) if training else None
        return Catalog(cache, self.engine.key_map, folder, self.settings.model)

    @cached_property
    def selection(self) -> Selection:
        """The presets, and the LoRAs of a job that names none."""
        settings, presets = self.settings, Presets(self.library.cache.shelf.root)
        return Selection(presets, settings.lora_default_preset, default_loras(settings))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for every answer: a volume that cannot be written."""
        trouble = self.library.cache.shelf.trouble
        return (trouble,) if trouble else ()
