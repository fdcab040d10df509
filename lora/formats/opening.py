"""Opens an adapter in any of its forms: a .safetensors file, a pickle, or a folder that PEFT saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lora.durable import sha256_of
from lora.errors import LoraNotFound, naming
from lora.formats.adapter import LoraFile, load
from lora.formats.endings import EXTENSIONS
from lora.formats.names.keys import KeyMap
from lora.formats.peft import PEFT_CONFIG, PEFT_STEM, STEMS, config_beside
from lora.formats.pickles import convert, looks_like_pickle

MAX_UNPACKED = 64_000_000_000
"""How many bytes a pickle may unpack to: whoever opens it already has it on the disk."""


@dataclass(frozen=True)
class Opened:
    """An adapter that can be read as .safetensors."""

    original: Path
    """The adapter's file, as it lies at the path."""
    file: Path
    """The same, or a copy as .safetensors that exists while the block runs."""
    config: str | None
    """The text of its adapter_config.json."""
    form: str
    """`safetensors`, `pickle`, or `PEFT folder` if there is a config."""


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Opens the adapter at a path for the time of the block. No code in a pickle is run.

    Errors that are raised in the block name the file, too. Raises: LoraNotFound if nothing is there, or if a
    PEFT folder has no config, so that the scaling of its weights is unknown; LoraUnsupported, LoraCorrupt
    for a pickle that is no adapter.
    """
    with naming(str(path)):
        original = file_of(path)
        config = config_beside(original)
        if config is None and path.is_dir() and original.stem == PEFT_STEM:
            raise LoraNotFound(f"the folder {str(path)!r} holds no {PEFT_CONFIG}")
        form = "PEFT folder" if config is not None else "safetensors"
        if not looks_like_pickle(original):
            yield Opened(original, original, config, form)
            return
        with TemporaryDirectory(prefix="lora-") as folder:
            file = Path(folder) / f"{original.stem}.safetensors"
            convert(original, file, MAX_UNPACKED)
            yield Opened(original, file, config, form if config is not None else "pickle")


def file_of(path: Path) -> Path:
    """The adapter's file: the path itself, or the file with the usual name in a folder of PEFT or diffusers.

    Raises: LoraNotFound.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise LoraNotFound(f"there is no file {str(path)!r}")
    candidates = (path / (stem + extension) for stem in STEMS for extension in EXTENSIONS)
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise LoraNotFound(
            f"the folder {str(path)!r} holds no adapter",
            f"A PEFT folder has {PEFT_STEM}.safetensors and {PEFT_CONFIG}.",
        )
    return file


def load_file(path: Path, key_map: KeyMap) -> LoraFile:
    """Reads an adapter in any of its forms, and binds it to the pipeline that `key_map` describes.

    Raises: as `opened` and `lora.formats.adapter.load`, with the file's name; OSError.
    """
    with opened(path) as adapter:
        return load(adapter.file, key_map, sha256_of(adapter.original), config=adapter.config)
