"""The base weights on this machine, downloaded first if they are nowhere and the settings want that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipelines.weights import (
    WeightsIncomplete,
    WeightsMissing,
    baked_hub,
    find_weights,
    hubs,
)
from settings import Settings


def obtain(
    source: str,
    settings: Settings,
    revision: str | None = None,
    *,
    whole: bool = True,
    files: Sequence[str] = (),
) -> Path:
    """As `find_weights`, and asks no network but where `settings.downloads`.

    `files`: patterns of what is downloaded of a repo; without them, what a pipeline of pictures needs.
    Raises: WeightsMissing; WeightsIncomplete.
    """
    try:
        return find_weights(source, hubs(settings), revision, whole=whole)
    except (WeightsMissing, WeightsIncomplete):
        if not settings.downloads or Path(source).exists():
            raise
    from pipelines.baking import bake

    place = download_place(settings)
    bake(source, settings.hf_token or None, place, revision=revision, files=files)
    return find_weights(source, [place], revision, whole=whole)


def download_place(settings: Settings) -> Path:
    """The folder on the volume; where no volume can be written, the image's own cache of the hub."""
    folder = settings.weights_dir
    there = next(one for one in (folder, *folder.parents) if one.exists())
    is_volume = there != Path(there.anchor) and os.access(there, os.W_OK)
    return folder if is_volume else baked_hub()
