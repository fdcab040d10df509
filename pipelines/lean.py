"""Imports transformers and diffusers without the optional packages that pictures do not need.

Both import such a package wherever it is installed, for functions that the worker never calls: peft and
bitsandbytes take a second each. What is said here holds while they are imported for the first time; in a
program that has imported one of them before, they stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Within the block these packages, unless they are imported already, are as if not installed."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None means: not to be found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def import_lean() -> None:
    """Imports what the SDXL pipelines are made of."""
    if {"transformers", "diffusers", "accelerate"} & sys.modules.keys():
        return  # they have already asked which packages there are
    with without("peft", "bitsandbytes", "boto3"):  # accelerate has boto3 for a console
        with without("scipy"):  # for training's losses; diffusers has a sampler with it
            import transformers.modeling_utils
        import diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint
    _ = transformers, diffusers
