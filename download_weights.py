"""Bakes the base weights into the image, and fetches LoRAs into the cache ahead of time.

python download_weights.py                    base, refiner and VAE of the settings
python download_weights.py --check            are they here, and whole? (no network)
python download_weights.py --lora SOURCE ...  LoRAs into LORA_CACHE_DIR
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.baking import bake, repos_to_bake
from pipelines.weights import WeightsIncomplete, WeightsMissing, baked_hub, check, find_weights
from settings import Settings, SettingsError

if TYPE_CHECKING:
    from lora.volume.cache import Resolved, VolumeCache

log = logging.getLogger("download_weights")


def get_lora_cache_path(source: str) -> Path:
    """Where a LoRA's file is in the cache, or will be after `download_lora`.

    A hub repo is asked for its commit, which is part of the name. Raises: LoraError.
    """
    from lora.fetch.sources import CachedName

    lora_cache, resolved = _resolve(source)
    if isinstance(resolved.location, CachedName):
        return lora_cache.find(resolved.location).path
    return lora_cache.path_for(resolved.location)


def download_lora(source: str) -> Path:
    """Fetches a LoRA into the cache unless it is there; returns its file. Raises: LoraError."""
    lora_cache, resolved = _resolve(source)
    return lora_cache.get(resolved).path


def _resolve(source: str) -> tuple[VolumeCache, Resolved]:
    # Imported here, since the image's layer of base weights has only what is imported at the top.
    from lora.fetch.sources import Reference
    from lora.fetch.web import quiet_libraries
    from worker.opening import open_cache, read_settings

    quiet_libraries()
    lora_cache = open_cache(read_settings(os.environ))
    return lora_cache, lora_cache.resolve(Reference(source))


def main() -> int:
    """Does what the command line says; 0 if all of it worked."""
    # Only our own messages below a warning: libraries log whole URLs, which may hold tokens.
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only check, without the network")
    parser.add_argument("--lora", nargs="+", metavar="SOURCE", help="fetch LoRAs into the cache")
    options = parser.parse_args()
    if options.lora:
        return _download(options.lora)
    try:
        settings = Settings.from_env(os.environ)
        for repo in repos_to_bake(settings):
            if options.check:
                find_weights(repo, [baked_hub()])
            else:
                check(bake(repo, settings.hf_token or None))
            log.info("%s is whole", repo)
    except (WeightsIncomplete, WeightsMissing, SettingsError) as error:
        log.error("%s", error)
        return 2
    return 0


def _download(sources: list[str]) -> int:
    from lora.errors import CodedError

    try:
        for source in sources:
            log.info("%s", download_lora(source))
    except (CodedError, SettingsError) as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
