"""Records what was changed, and restores it."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from lora.engine.dynamic import AdaptedForward
from lora.engine.originals import Originals
from lora.engine.row_layer import RowLayer
from lora.errors import CodedError


class RestoreFailed(CodedError):
    """A weight could not be restored: the pipeline must not draw again, and the process should end."""

    code = "INTERNAL"


class Undo:
    """Records each change before it is made, and restores everything.

    A weight that could not be restored stays recorded: the next `run` tries again, and meanwhile its changed
    values are not taken for an original.
    """

    def __init__(self, originals: Originals) -> None:
        self._originals = originals
        self.content: dict[nn.Parameter, Hashable] = {}
        """What each changed weight holds now; None while it is being written."""
        self._forwards: dict[nn.Module, Any] = {}

    @property
    def pending(self) -> bool:
        """Whether anything is changed."""
        return bool(self.content or self._forwards)

    def replace_forward(
        self, module: nn.Module, forward: AdaptedForward | RowLayer
    ) -> Callable[..., Tensor]:
        """Replaces the class's `forward` (or one that an offloading hook has set) on this instance.

        Returns the `forward` that was there before.
        """
        if module not in self._forwards:
            self._forwards[module] = module.__dict__.get("forward")
            # A bound method: torch.compile guards on its function, which all layers share. For an object it
            # would make a graph for each layer of each compiled block, and give up after eight.
            module.__dict__["forward"] = forward.__call__
        previous: Callable[..., Tensor] | None = self._forwards[module]
        return type(module).forward.__get__(module) if previous is None else previous

    def forwards(self, keep: Container[nn.Module] = ()) -> None:
        """Restores the forwards of all modules but these."""
        for module in [m for m in self._forwards if m not in keep]:
            previous = self._forwards.pop(module)
            shadow = module.__dict__.pop("forward", None)
            adapted = getattr(shadow, "__self__", None)
            if isinstance(adapted, AdaptedForward):
                adapted.clear()
            if previous is not None:
                module.__dict__["forward"] = previous

    @torch.no_grad()
    def weights(self, keep: Container[nn.Parameter] = ()) -> None:
        """Restores all weights but these. If one fails, the others are restored. Raises: RestoreFailed."""
        failed: list[BaseException] = []
        for weight in [w for w in self.content if w not in keep]:
            try:
                self._originals.restore(weight)
                del self.content[weight]
            except BaseException as error:  # noqa: BLE001 - the others must be restored all the same
                failed.append(error)
        for failure in failed:
            if not isinstance(failure, Exception):  # a KeyboardInterrupt must end the program
                raise failure
        if failed:
            raise RestoreFailed(
                f"{len(failed)} weights could not be restored after a LoRA",
                "The worker asks to be replaced.",
            ) from failed[0]

    def run(self) -> None:
        """Restores everything. Raises: RestoreFailed if a weight could not be; all others are restored."""
        try:
            self.forwards()
        finally:
            self.weights()
