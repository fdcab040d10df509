"""How every tool for adapters opens one."""

from __future__ import annotations

from pathlib import Path

from lora.keys import KeyMap
from lora.tools.adapters import Adapter, header_of, read_adapter
from lora.tools.known import key_map_for


def open_adapter(path: Path, key_map: KeyMap | None, *, named: bool, lax: bool) -> Adapter:
    """An adapter, bound to the model's modules if there is a model or, with `named`, where other names than
    the file's are wanted; `lax`: tensors that cannot be carried are listed, and no error.

    Raises: as `read_adapter`.
    """
    known = key_map_for(header_of(path)) if key_map is None and named else key_map
    return read_adapter(path, known, allow_unused=lax, check_shapes=key_map is not None)
