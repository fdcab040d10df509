"""What was changed, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable
from typing import Any

from torch import Tensor, nn

from lora.engine.dynamic import AdaptedForward
from lora.engine.originals import Originals
from lora.errors import CodedError


class RestoreFailed(CodedError):
    """A weight could not be put back: the pipeline must not draw again. The process should end."""

    code = "INTERNAL"


class Undo:
    """Notes each change before it is made, and puts everything back.

    What could not be put back stays noted: the next `run` tries again, and nothing counts as an original
    but what was one.
    """

    def __init__(self, originals: Originals) -> None:
        self._originals = originals
        self._content: dict[nn.Parameter, Hashable] = {}
        self._forwards: dict[nn.Module, Any] = {}

    @property
    def pending(self) -> bool:
        """Whether anything is changed."""
        return bool(self._content or self._forwards)

    def replace_forward(self, module: nn.Module, forward: AdaptedForward) -> Callable[..., Tensor]:
        """Shadows the class's `forward` (or one that an offloading hook put there) on this instance.

        Returns the one that was there before.
        """
        if module not in self._forwards:
            self._forwards[module] = module.__dict__.get("forward")
            module.__dict__["forward"] = forward
        previous = self._forwards[module]
        found: Callable[..., Tensor] = (
            type(module).forward.__get__(module) if previous is None else previous
        )
        return found

    def content(self, weight: nn.Parameter) -> Hashable:
        """What the weight holds now, as `note` was told; None if it is the original or unknown."""
        return self._content.get(weight)

    def note(self, weight: nn.Parameter, content: Hashable) -> None:
        """What the weight holds from now on; None while it is being written."""
        self._content[weight] = content

    def forwards(self, keep: Container[nn.Module] = ()) -> None:
        """Puts back the forwards of all modules but these."""
        for module in [m for m in self._forwards if m not in keep]:
            previous = self._forwards.pop(module)
            shadow = module.__dict__.pop("forward", None)
            if isinstance(shadow, AdaptedForward):
                shadow.clear()
            if previous is not None:
                module.__dict__["forward"] = previous

    def weights(self, keep: Container[nn.Parameter] = ()) -> None:
        """Puts back all weights but these, each on its own. Raises: RestoreFailed if one could not be."""
        failed: list[BaseException] = []
        for weight in [w for w in self._content if w not in keep]:
            try:
                self._originals.restore(weight)
                del self._content[weight]
            except BaseException as error:  # noqa: BLE001 - the others must be put back all the same
                failed.append(error)
        for one in failed:
            if not isinstance(one, Exception):  # KeyboardInterrupt: whoever sent it wants it back
                raise one
        if failed:
            raise RestoreFailed(
                f"{len(failed)} weights could not be restored after a LoRA",
                "The worker asks to be replaced.",
            ) from failed[0]

    def run(self) -> None:
        """Puts everything back. Raises: RestoreFailed if a weight could not be; the rest is put back."""
        try:
            self.forwards()
        finally:
            self.weights()
