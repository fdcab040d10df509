"""Starts the worker for text: `WORKER_KIND=text python handler.py`."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from lora.fetch.web import quiet_libraries
from settings import SettingsError
from text.loading import ModelUnusable
from text.vllm import EngineFailed
from text_settings import TextSettings
from worker.logs import set_up
from worker.opening import read_settings
from worker.queue.serve import take_jobs
from worker.text.worker import TextWorker


def serve() -> None:
    """Loads the base, then serves RunPod's jobs until the process ends, or HTTP with WORKER_SERVE=http.

    Raises: SystemExit with a sentence if the settings or the model cannot be used.
    """
    set_up(json_lines="RUNPOD_POD_ID" in os.environ)
    quiet_libraries()
    try:
        settings = read_settings(os.environ, TextSettings)
        worker = TextWorker(settings)
        if settings.serve == "http":
            return import_module("worker.http.text").serve(worker)
        worker.setup()
    except (SettingsError, ModelUnusable, EngineFailed) as error:
        sys.exit(f"the worker cannot start: {error}")
    return take_jobs(worker.handle, settings.concurrency, worker.check_fitness)
