"""What setup makes once and every job uses."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from live.session import Places
from live.turns import Turns
from lora.engine.engine import Budgets, LoraEngine
from lora.library.catalog import Catalog
from lora.volume.folders import MOUNTS, mount_of
from lora.volume.loader import LoraLibrary
from lora.volume.presets import Presets
from pipelines.image import ImagePipeline
from pipelines.lean import import_lean
from settings import Settings
from worker.opening import default_loras, open_cache
from worker.pictures.outputs import open_bucket
from worker.pictures.store import Bucket
from worker.selection import Selection

log = logging.getLogger("worker")

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
    drawing: Turns
    """Held while a job, or a live session's frame, changes weights and draws: one at a time."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each stage of the start took."""

    @cached_property
    def catalog(self) -> Catalog:
        """What is known of the adapters on the volume: the actions `library.*`."""
        training, cache = self.settings.lora_training_dir, self.library.cache
        folder = Path(training) if training else None
        return Catalog(cache, self.engine.key_map, folder, self.settings.model)

    @cached_property
    def live(self) -> Places:
        """The live sessions."""
        return Places(self.settings.live_sessions)

    @cached_property
    def selection(self) -> Selection:
        """The presets, and the LoRAs of a job that names none."""
        settings, presets = self.settings, Presets(self.library.cache.shelf.root)
        return Selection(presets, settings.lora_default_preset, default_loras(settings))

    def started(self, imported: float, read: float) -> None:
        """Notes and logs how long the start took; `imported`: the seconds before the models' own imports."""
        self.seconds["imports"] += imported
        self.seconds["read"] = read
        stages = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        log.info("%s is ready: %s", self.pipeline.name, stages)

    @property
    def volume_trouble(self) -> str | None:
        """What is wrong with the volume, as a warning: it cannot be written, or is not there."""
        shelf = self.library.cache.shelf
        return shelf.look_again() or missing_volume(shelf.root)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for every answer: a volume that cannot be written, or is not there."""
        return (trouble,) if (trouble := self.volume_trouble) else ()


def make_parts(settings: Settings) -> Parts:
    """Loads the models and opens what the settings name. Raises: as `pipelines.loading.load_models`."""
    begun = time.perf_counter()
    spare_cores(settings.model)
    import_lean()
    from pipelines.loading import load_models

    imports = time.perf_counter() - begun
    models = load_models(settings)
    pipeline = ImagePipeline(models)
    budgets = Budgets(int(settings.lora_originals_gb * 1e9), int(settings.lora_prepared_gb * 1e9))
    engine = LoraEngine(pipeline.components, budgets)
    library = LoraLibrary(open_cache(settings), engine.key_map, int(settings.lora_warm_gb * 1e9))
    seconds = {"imports": imports, **models.seconds}
    return Parts(pipeline, engine, library, open_bucket(settings), settings, Turns(), seconds)


def spare_cores(model: str) -> None:
    """Has the demo models, which are miniatures, compute in one thread, unless OMP_NUM_THREADS is set.

    More threads make their pictures no faster, and wait for each other wherever something else uses the
    cores: of a picture that takes one thread 0.7 s, two threads made 15 to 68 s on two busy cores.
    """
    if model == "demo" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


VOLUMES = (Path("/runpod-volume"), Path("/workspace"))
"""Where RunPod mounts a network volume: on serverless workers, and on pods."""


def missing_volume(folder: Path, mounts: Path = MOUNTS) -> str | None:
    """A sentence if the folder belongs to a volume of RunPod's that is not mounted; None otherwise.

    Without its volume, the folder would be made on the container's disk without a word.
    """
    place = next((place for place in VOLUMES if folder.is_relative_to(place)), None)
    mount = mount_of(folder, mounts) if place else None
    if place is None or mount is None or mount.place.is_relative_to(place):
        return None
    return (
        f"no volume is mounted at {place}: LoRAs are kept on this container's disk, and are gone when the "
        "worker stops"
    )
