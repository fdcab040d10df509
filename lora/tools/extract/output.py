"""Where an extraction is written to, and how the result is verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora.engine.merging import merge
from lora.errors import ToolError
from lora.formats.adapter import load
from lora.formats.header import read_header
from lora.formats.tensors import read_runs
from lora.tools import Format
from lora.tools.adapters.reading import read_adapter
from lora.tools.adapters.saving import WriteOptions, write_adapter
from lora.tools.extract.layer import largest_of
from lora.tools.extract.options import ExtractOptions
from lora.tools.extract.report import Verified
from lora.tools.factors.cutting import relative_error
from lora.tools.factors.svd import energy
from lora.tools.models.checkpoints import Checkpoint, Place
from lora.tools.models.weights import WeightsFile
from lora.tools.writing import refuse_overwriting, write_pytorch


@dataclass(frozen=True)
class ExtractOutput:
    """The file that is wanted, and the .safetensors file that the tensors are streamed into."""

    path: Path
    stream: Path
    """The same path for a .safetensors file in a naming without a config; else one beside it."""
    options: ExtractOptions

    @classmethod
    def of(
        cls, path: Path, options: ExtractOptions, inputs: Sequence[WeightsFile]
    ) -> ExtractOutput:
        """Raises: ToolError if an input would be overwritten, or there is no folder for the file."""
        refuse_overwriting(path, (one.path for one in inputs))
        if not path.parent.is_dir():
            raise ToolError(f"there is no folder for {path.name}", "Make it first.")
        if path.is_dir():
            raise ToolError(f"the output {path.name} is a folder", "Name a file.")
        plain = options.format is Format.SAFETENSORS and options.holds_differences
        return cls(path, path if plain else path.with_name(f".{path.name}.stream"), options)

    def convert(self, source: Checkpoint) -> None:
        """Makes the wanted file from the streamed one. Raises: ToolError."""
        if self.stream == self.path:
            return
        naming, written = self.options.naming, self.options.format
        if self.options.holds_differences:
            runs = read_runs(self.stream, read_header(self.stream), mapped=True)
            write_pytorch(self.path, {name: t for run in runs for name, t in run.tensors()})
        else:
            adapter = read_adapter(self.stream, source.key_map())
            write_adapter(self.path, adapter, WriteOptions(naming=naming, format=written))
        self.stream.unlink()

    def size(self) -> int:
        """The bytes of what was written."""
        files = self.path.iterdir() if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)


def verify(source: Checkpoint, target: Checkpoint, path: Path) -> Verified:
    """Reads the file as the engine does, merges each layer into the source, and compares it with the target.

    Raises: ToolError if a tensor of the file has no place in the source; LoraError if it cannot be read.
    """
    file = load(path, source.key_map(), source.sha256(), mapped=True)
    if file.unused:
        first = file.unused[0]
        raise ToolError(f"the file cannot be read back ({first.key[:200]}: {first.reason})")
    errors, energies, largest, unequal, numbers = [], [], 0.0, 0, 0
    for layer in file.layers:
        place = Place(layer.target.component, layer.target.path, layer.parameter)
        original, wanted = source.read(place), target.read(place)
        merged = torch.empty_like(original)
        merge(merged, original, [(layer.part, 1.0)])
        wanted = wanted.to(original.dtype)
        error = _difference(merged, wanted)
        errors.append(energy(error))
        energies.append(energy(_difference(wanted, original)))
        largest = max(largest, largest_of(error))
        unequal += int(error.count_nonzero())
        numbers += error.numel()
    return Verified(largest, relative_error(errors, energies), unequal, numbers)


def _difference(one: Tensor, other: Tensor) -> Tensor:
    return one.to(torch.float32, copy=True).sub_(other.to(torch.float32))
