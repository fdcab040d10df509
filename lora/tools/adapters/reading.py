"""An adapter file as named tensors per module, whatever wrote it, and with no model at hand if need be.

Every tensor of a file is in a part, among the words that it teaches, or listed as unused with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lora.errors import ToolError
from lora.formats.alphas import CONFIG_IN_FILE
from lora.formats.contents import MAX_SHOWN, Contents, read_contents, refuse_misfits
from lora.formats.header import Header, read_header
from lora.formats.names.keys import KeyMap, Target
from lora.formats.names.prefixes import COMPONENTS
from lora.formats.opening import opened
from lora.tools.adapters.known import key_map_for
from lora.tools.adapters.own_names import own_key_map
from lora.tools.adapters.parts import Adapter, Part


def open_adapter(
    path: Path, key_map: KeyMap | None, *, rename: bool, allow_unused: bool
) -> Adapter:
    """An adapter for a tool that keeps its modules. `key_map`: the model's modules, if there is a model.

    With `rename`, other names than the file's are wanted: then SDXL's are known without a model. With
    `allow_unused`, tensors that cannot be carried are listed. Raises: as `read_adapter`.
    """
    known = key_map_for(header_of(path)) if key_map is None and rename else key_map
    return read_adapter(path, known, allow_unused=allow_unused, check_shapes=key_map is not None)


def read_adapter(
    path: Path,
    key_map: KeyMap | None = None,
    *,
    allow_unused: bool = False,
    check_shapes: bool = True,
) -> Adapter:
    """Reads a .safetensors file, a pickle of torch.save (which is never run), or a PEFT folder.

    With `key_map` the modules are that model's, and their tensors must fit its shapes, unless
    `check_shapes` is False: then only its names count. Without `key_map`, the file's own names stand for
    the modules: enough for whatever keeps them. Words for the prompt are carried, whether or not the model
    can use them. The file is not mapped, since it may be replaced.

    Raises: ToolError if a tensor cannot be carried, unless `allow_unused`, which lists it as unused; as
    `formats.adapter.load` if none can, or the file is for another model; LoraNotFound.
    """
    with opened(path) as source:
        header = read_header(source.file)
        contents = read_contents(
            source.file,
            header,
            key_map or own_key_map(header),
            config=source.config,
            check_shapes=check_shapes or key_map is None,
        )
        used = bool(contents.modules or contents.words)
        refuse_misfits(contents, used=used)
    if contents.unused and not allow_unused:
        first, count = contents.unused[0], len(contents.unused)
        raise ToolError(
            f"{count} of the tensors in {path} cannot be carried "
            f"({first.key[:MAX_SHOWN]}: {first.reason})",
            "--allow-unused leaves them out.",
        )
    parts = tuple(_parts(contents, without_model=key_map is None))
    unused, has_config = tuple(contents.unused), source.config is not None
    has_config = has_config or CONFIG_IN_FILE in header.metadata
    return Adapter(parts, header.metadata, contents.words, unused, key_map, has_config)


def _parts(contents: Contents, *, without_model: bool) -> Iterator[Part]:
    """The modules as the tools have them. With `without_model` no shape is known that a model would have."""
    for module in contents.modules.values():
        target, stem = module.target, module.stem
        if without_model:
            component = stem.partition(".")[0]
            target = Target(component if component in COMPONENTS else "", stem, {}, "BASE")
        yield Part(target, module.slots, stem, module.keys)


def header_of(path: Path) -> Header:
    """Names, shapes and metadata of an adapter that `read_adapter` reads. A pickle is unpacked for it.

    Raises: as `read_adapter`.
    """
    with opened(path) as source:
        return read_header(source.file)
