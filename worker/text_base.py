"""One base model that is loaded, and all that hangs on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from live.turns import Turns
from lora.engine.engine import Budgets, LoraEngine
from lora.volume.loader import LoraLibrary
from text.generation import Generation
from text.loading import COMPONENT, DEMO, DEMO_FOLDER, TextModel, Wanted, load_model
from text.scheduler import Scheduler
from text_settings import TextSettings
from worker.opening import open_cache
from worker.parts import Parts, spare_cores
from worker.text_models import Models

DTYPES = {"half": "float16", "float": "float32"}


@dataclass(frozen=True)
class Face:
    """What the actions ask of a pipeline."""

    name: str
    device: torch.device


class Base:
    """The model, the engine that applies adapters to it, those adapters, and the texts that it writes."""

    def __init__(self, settings: TextSettings, on_end: Callable[[Generation], None]) -> None:
        """Loads the base that the settings name. `on_end` is told of each text that ends.

        Raises: ModelUnusable.
        """
        self.settings = settings
        spare_cores(settings.model)
        self.text: TextModel = load_model(_wanted(settings))
        budgets = Budgets(
            int(settings.lora_originals_gb * 1e9), int(settings.lora_prepared_gb * 1e9)
        )
        self.engine = LoraEngine({COMPONENT: self.text.model}, budgets)
        self.library = library_of(settings, self.engine)
        self.scheduler = Scheduler(self.text, self.engine, settings.most_rows, on_end)
        face: Any = Face(settings.name, self.text.device)
        self.parts = Parts(face, self.engine, self.library, None, settings, Turns())
        self.models = Models(settings, self.library, self.parts, self.scheduler.rows.misfit)

    @property
    def counts(self) -> dict[str, int]:
        """How many texts wait, and how many are under way."""
        return self.scheduler.counts

    def close(self) -> None:
        """Ends all its texts, and lets go of the model, whoever still holds this object."""
        self.scheduler.close()
        vars(self).clear()


def library_of(settings: TextSettings, engine: LoraEngine) -> LoraLibrary:
    """Finds, fetches and parses the adapters of an engine's model."""
    cache = open_cache(settings)
    if settings.model == DEMO:
        cache.shelf.behind = DEMO_FOLDER.parent / "loras"
    return LoraLibrary(cache, engine.key_map, int(settings.lora_warm_gb * 1e9))


def _wanted(settings: TextSettings) -> Wanted:
    packed = settings.quantisation
    return Wanted(
        source=settings.model,
        revision=settings.revision or None,
        tokenizer=settings.tokenizer,
        device=settings.device,
        dtype=DTYPES.get(settings.dtype, settings.dtype),
        quantisation="nf4" if packed == "bitsandbytes" else packed,
        max_memory_gb=settings.max_memory_gb,
        context=settings.context,
        template=settings.chat_template,
        token=settings.hf_token or None,
    )
