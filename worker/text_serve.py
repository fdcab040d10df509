"""Starts the worker for text: `WORKER_KIND=text python handler.py`."""

from __future__ import annotations

import os
import sys

from lora.fetch.web import quiet_libraries
from settings import SettingsError
from text.loading import ModelUnusable
from text.vllm import EngineFailed
from text_settings import TextSettings
from worker.logs import set_up
from worker.opening import read_settings
from worker.shutdown import Shutdown
from worker.text_worker import TextWorker


def serve() -> None:
    """Loads the base, then serves RunPod's jobs until the process ends.

    Raises: SystemExit with a sentence if the settings or the model cannot be used.
    """
    os.environ.setdefault(
        "RUNPOD_DEBUG_LEVEL", "INFO"
    )  # before runpod: its DEBUG logs every answer
    import runpod
    from runpod.serverless.modules import rp_scale

    set_up(json_lines="RUNPOD_POD_ID" in os.environ)
    quiet_libraries()
    try:
        settings = read_settings(os.environ, TextSettings)
        worker = TextWorker(settings).setup()
    except (SettingsError, ModelUnusable, EngineFailed) as error:
        sys.exit(f"the worker cannot start: {error}")
    concurrency = settings.concurrency
    runpod.serverless.register_fitness_check(worker.check_fitness)
    Shutdown().guard(rp_scale)
    runpod.serverless.start(
        {
            "handler": worker.handle,
            "concurrency_modifier": lambda current: concurrency,
            "return_aggregate_stream": True,
        }
    )
