"""The samplers that a request may name -> diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_KARRAS = {"use_karras_sigmas": True}

SCHEDULER_CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "PNDM": ("PNDMScheduler", {}),
    "KLMS": ("LMSDiscreteScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
    "K_EULER": ("EulerDiscreteScheduler", {}),
    "K_EULER_ANCESTRAL": ("EulerAncestralDiscreteScheduler", {}),
    "DPMSolverMultistep": ("DPMSolverMultistepScheduler", {}),
    "DPMSolverSinglestep": ("DPMSolverSinglestepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "Euler Karras": ("EulerDiscreteScheduler", _KARRAS),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", _KARRAS),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler",
        {**_KARRAS, "algorithm_type": "sde-dpmsolver++"},
    ),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}


def make_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """A new scheduler of this name with the model's own noise schedule.

    `config` is that of the scheduler which the model came with, never of one made before: so no job's
    sampler depends on an earlier job's.
    """
    class_name, changes = SCHEDULER_CLASSES[name]
    scheduler = getattr(import_module("diffusers"), class_name)
    made: SchedulerMixin = scheduler.from_config(dict(config), **changes)
    return made
