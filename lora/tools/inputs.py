"""What every tool for adapters asks of the paths that it is given."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lora.errors import ToolError
from lora.keys import KeyMap
from lora.tools.adapters import Adapter, header_of, read_adapter
from lora.tools.known import key_map_for


def refuse_overwriting(output: Path, inputs: Iterable[Path]) -> None:
    """Raises: ToolError if the output is one of the inputs."""
    if not output.exists():
        return
    for path in inputs:
        if path.exists() and output.samefile(path):
            raise ToolError(f"the output {output.name} is an input", "Name another output.")


def open_adapter(path: Path, key_map: KeyMap | None, *, named: bool, lax: bool) -> Adapter:
    """An adapter, bound to the model's modules if there is a model or, with `named`, where other names than
    the file's are wanted; `lax`: tensors that cannot be carried are listed, and no error.

    Raises: as `read_adapter`.
    """
    known = key_map_for(header_of(path)) if key_map is None and named else key_map
    return read_adapter(path, known, allow_unused=lax, check_shapes=key_map is not None)
