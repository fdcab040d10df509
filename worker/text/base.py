"""One base model that is loaded, and all that hangs on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from live.turns import Turns
from lora.engine.engine import Budgets, LoraEngine
from lora.volume.loader import LoraLibrary
from pipelines.obtaining import obtain
from pipelines.weights import WeightsIncomplete, WeightsMissing
from text.generation import Generation
from text.loading import (
    COMPONENT,
    DEMO,
    DEMO_FOLDER,
    FILES,
    ModelUnusable,
    TextModel,
    Wanted,
    load_model,
)
from text.scheduler import Scheduler
from text_settings import TextSettings
from worker.opening import open_cache
from worker.parts import Parts, spare_cores
from worker.text.models import Models

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


def folder_of(settings: TextSettings, files: Sequence[str] = FILES, *, whole: bool = True) -> Path:
    """Where the base lies on this machine, downloaded first if the settings want that.

    `files`: patterns of what is needed of a repo; `whole`: with all its weights. Raises: ModelUnusable.
    """
    return _found(settings.model, settings, settings.model_revision, files, whole=whole)


def _found(
    source: str, settings: TextSettings, revision: str | None, files: Sequence[str], *, whole: bool
) -> Path:
    if source == DEMO:
        return DEMO_FOLDER
    hint = "Check MODEL_NAME, WORKER_WEIGHTS and HF_TOKEN."
    own = Path(source).is_dir()  # it may hold weights in other files
    try:
        return obtain(source, settings, revision, whole=whole and not own, files=files)
    except WeightsMissing as error:
        raise ModelUnusable(error.sentence, hint) from error
    except WeightsIncomplete as error:
        raise ModelUnusable(str(error), hint) from error


def _wanted(settings: TextSettings) -> Wanted:
    packed = settings.quantisation
    return Wanted(
        name=settings.model,
        folder=folder_of(settings),
        tokenizer=_found(settings.tokenizer, settings, None, FILES, whole=False)
        if settings.tokenizer
        else None,
        device=settings.device,
        dtype=DTYPES.get(settings.dtype, settings.dtype),
        quantisation="nf4" if packed == "bitsandbytes" else packed,
        max_memory_gb=settings.max_memory_gb,
        context=settings.context,
        template=settings.chat_template,
    )
