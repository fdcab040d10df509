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

from lora.errors import CodedError
from lora.fetch.sources import CachedName, Reference
from lora.fetch.web import quiet_libraries
from pipelines.weights import (
    WeightsIncomplete,
    WeightsMissing,
    bake,
    check,
    find_weights,
    repos_to_bake,
)
from settings import Settings, SettingsError

log = logging.getLogger("download_weights")


def get_lora_cache_path(source: str) -> Path:
    """Where a LoRA's file is in the cache, or will be after `download_lora`.

    A hub repo is asked for its commit, which is part of the name. Raises: LoraError.
    """
    lora_cache = Settings.from_env(os.environ).open_cache()
    place = lora_cache.resolve(Reference(source)).location
    if isinstance(place, CachedName):
        return lora_cache.find(place).path
    return lora_cache.path_for(place)


def download_lora(source: str) -> Path:
    """Fetches a LoRA into the cache unless it is there; returns its file. Raises: LoraError."""
    lora_cache = Settings.from_env(os.environ).open_cache()
    return lora_cache.get(lora_cache.resolve(Reference(source))).path


def main() -> int:
    """Does what the command line says; 0 if all of it worked."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only check, without the network")
    parser.add_argument("--lora", nargs="+", metavar="SOURCE", help="fetch LoRAs into the cache")
    options = parser.parse_args()
    try:
        settings = Settings.from_env(os.environ)
        for source in options.lora or []:
            log.info("%s", download_lora(source))
        if not options.lora:
            for repo in repos_to_bake(settings):
                folder = (
                    find_weights(repo) if options.check else bake(repo, settings.hf_token or None)
                )
                check(folder)
                log.info("%s is whole", repo)
    except (CodedError, WeightsIncomplete, WeightsMissing, SettingsError) as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
