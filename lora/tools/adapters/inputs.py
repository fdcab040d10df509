"""How every tool for adapters opens one."""

from __future__ import annotations

from pathlib import Path

from lora.formats.names.keys import KeyMap
from lora.tools.adapters.known import key_map_for
from lora.tools.adapters.parts import Adapter
from lora.tools.adapters.reading import header_of, read_adapter


def open_adapter(path: Path, key_map: KeyMap | None, *, named: bool, lax: bool) -> Adapter:
    """An adapter, bound to the model's modules if there is a model or, with `named`, where other names than
    the file's are wanted; `lax`: tensors that cannot be carried are listed, and no error.

    Raises: as `read_adapter`.
    """
    known = key_map_for(header_of(path)) if key_map is None and named else key_map
    return read_adapter(path, known, allow_unused=lax, check_shapes=key_map is not None)
