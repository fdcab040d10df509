"""What a worker of any kind does before its first job: LORA_PRELOAD, and the check that it can serve."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

import torch

from lora.errors import CodedError
from lora.fetch.redaction import redact_url
from lora.fetch.sources import Reference, parse
from lora.volume.loader import LoraLibrary
from worker.failures import Unexpected

log = logging.getLogger("worker")


def preload(library: LoraLibrary, sources: Sequence[str]) -> dict[str, str]:
    """Begins to fetch and parse these LoRAs, in a thread of its own.

    Returns what becomes of each: source -> `under way`, `ready`, or an error, which is logged, too.
    """
    states = {redact_url(source): "under way" for source in sources}

    def load() -> None:
        for source in sources:
            try:
                library.load(Reference(source))
                states[redact_url(source)] = "ready"
            except CodedError as error:
                states[redact_url(source)] = str(error)
                log.warning("LORA_PRELOAD: %s", error)

    if sources:
        threading.Thread(target=load, name="preload", daemon=True).start()
    return states


def check_fit(
    library: LoraLibrary,
    device: torch.device,
    sources: Sequence[str],
    preloaded: Mapping[str, str],
) -> None:
    """Raises: CodedError or OSError if a source is malformed, no folder for LoRAs can be written, or the
    device does not compute.
    """
    for source in sources:
        parse(Reference(source))
    library.cache.shelf.prepare()
    if float(torch.ones(2, device=device).sum()) != 2.0:
        raise Unexpected("the device does not compute")
    log.info("fit; preloading: %s", preloaded or "nothing")
