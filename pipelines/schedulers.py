"""The samplers that a request may name -> diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    TCDScheduler,
    UniPCMultistepScheduler,
)

_KARRAS = {"use_karras_sigmas": True}

SCHEDULER_CLASSES: Mapping[str, tuple[type[Any], Mapping[str, Any]]] = {
    "PNDM": (PNDMScheduler, {}),
    "KLMS": (LMSDiscreteScheduler, {}),
    "DDIM": (DDIMScheduler, {}),
    "K_EULER": (EulerDiscreteScheduler, {}),
    "K_EULER_ANCESTRAL": (EulerAncestralDiscreteScheduler, {}),
    "DPMSolverMultistep": (DPMSolverMultistepScheduler, {}),
    "DPMSolverSinglestep": (DPMSolverSinglestepScheduler, {}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "Euler Karras": (EulerDiscreteScheduler, _KARRAS),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "DPM++ 2M Karras": (DPMSolverMultistepScheduler, _KARRAS),
    "DPM++ 2M SDE Karras": (
        DPMSolverMultistepScheduler,
        {**_KARRAS, "algorithm_type": "sde-dpmsolver++"},
    ),
    "LCM": (LCMScheduler, {}),
    "TCD": (TCDScheduler, {}),
}


def make_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """A new scheduler of this name with the model's own noise schedule.

    `config` is that of the scheduler which the model came with, never of one made before: so no job's
    sampler depends on an earlier job's.
    """
    scheduler_class, changes = SCHEDULER_CLASSES[name]
    made: SchedulerMixin = scheduler_class.from_config(dict(config), **changes)
    return made
