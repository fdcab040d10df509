"""Takes jobs from RunPod's queue, by its SDK, until the process ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from worker.queue.intake import Intake
from worker.queue.shutdown import Shutdown


def take_jobs(
    handle: Callable[[Any], Any],
    concurrency: int,
    check_fitness: Callable[[], None] | None = None,
    intake: Intake | None = None,
) -> None:
    """Serves jobs until the process ends, or one with --test_input.

    `check_fitness` raises if the worker cannot serve; `intake` decides when another job is taken.
    """
    import runpod
    from runpod.serverless.modules import rp_scale

    if check_fitness:
        runpod.serverless.register_fitness_check(check_fitness)
    if intake:
        intake.guard(rp_scale)
    Shutdown().guard(rp_scale)
    runpod.serverless.start(
        {
            "handler": handle,
            "concurrency_modifier": lambda _: concurrency,
            "return_aggregate_stream": True,  # of generators alone
        }
    )
