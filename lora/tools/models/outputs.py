"""Where a changed model is written to: one file, or a folder with the same files as the input's."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora.durable import part_file, sweep, write_durably
from lora.errors import ToolError
from lora.formats.header import read_header
from lora.formats.tensors import DTYPES
from lora.tools import FILE_FORMATS, WEIGHTS, Format
from lora.tools.models.checkpoints import Checkpoint
from lora.tools.models.folders import OTHER_WEIGHTS, is_index, is_weights, shards_of
from lora.tools.models.weights import Raw
from lora.tools.overwriting import refuse_misnamed, refuse_other_kind, refuse_overwriting
from lora.tools.writing import (
    published_folder,
    write_errors,
    write_pytorch,
)


@dataclass(frozen=True)
class FileToWrite:
    """One file of the output with weights."""

    name: Path
    """In the folder of the output."""
    kind: Format
    tensors: tuple[Raw, ...]
    metadata: Mapping[str, str]
    wrapper: str
    """The key of a pickle's table under which the tensors go; empty for none."""

    @contextmanager
    def stream(self, folder: Path) -> Iterator[Path]:
        """The path at which the block writes the tensors as .safetensors: the file itself, or a temporary one
        from which a pickle is made when the block ends. Raises: ToolError if that cannot be written.
        """
        path = folder / self.name
        if self.kind is Format.SAFETENSORS:
            yield path
            return
        sweep(path.parent, path.name)
        with part_file(path.parent, path.name) as temporary:
            yield temporary
            write_pytorch(path, _mapped(temporary), self.wrapper)


def _mapped(path: Path) -> dict[str, Tensor]:
    header = read_header(path)
    with path.open("rb") as stream:
        # A private and writable mapping, as torch wants it; nothing is written.
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors: dict[str, Tensor] = {}
    for name, info in header.tensors.items():
        dtype, count = DTYPES[info.dtype], torch.Size(info.shape).numel()
        flat = torch.empty(0, dtype=dtype)
        if count:
            flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=info.start)
        tensors[name] = flat.reshape(info.shape)
    return tensors


@dataclass(frozen=True)
class Output:
    """What is to be written, and where: decided before anything is touched."""

    path: Path
    files: tuple[FileToWrite, ...]
    is_folder: bool = False
    others: tuple[tuple[Path, Path], ...] = ()
    """(source, name in the folder) of the other files, which are copied; of an index, the sum of bytes
    changes."""
    left_out: tuple[str, ...] = ()
    overwrite: bool = False

    @classmethod
    def of(
        cls,
        model: Checkpoint,
        path: Path,
        kind: str | None = None,
        *,
        overwrite: bool = False,
        parts: Sequence[Path] = (),
    ) -> Output:
        """The output of a changed model. `kind`: that of a single file, if its name does not decide it.
        `overwrite`, `parts`: see `refuse_overwriting`; the model's own parts are known.

        Raises: ToolError if something is there that is not to be overwritten, or if the output contradicts
        `kind`, or puts several parts into one file.
        """
        if kind is not None and kind not in FILE_FORMATS:
            raise ToolError(f"{kind[:40]!r} is no format", f"Use {' or '.join(FILE_FORMATS)}.")
        if path.suffix in OTHER_WEIGHTS:
            raise ToolError(f"{path.suffix} files cannot be written", "Use .safetensors.")
        if kind is not None and path.is_dir():
            raise ToolError(f"the files of a folder such as {path} keep their formats")
        is_folder = path.is_dir() or (kind is None and path.suffix not in WEIGHTS)
        output = _folder(model, path) if is_folder else _file(model, path, kind)
        written = [file.name for file in output.files] + [name for _, name in output.others]
        refuse_overwriting(path, overwrite, (*model.parts, *parts), [*map(str, written)])
        refuse_other_kind(path, is_folder=is_folder)
        return replace(output, overwrite=overwrite)

    def refuse_full_disk(self, size: int) -> None:
        """Raises: ToolError if there is no room for that many bytes of tensors."""
        pickles = any(file.kind is Format.PYTORCH for file in self.files)
        copies = (source for source, _ in self.others if not is_index(source))
        needed = size * (2 if pickles else 1) + sum(source.stat().st_size for source in copies)
        folders = (self.path, *self.path.absolute().parents)
        there = next(folder for folder in folders if folder.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise ToolError(
                f"{self.path} needs {needed / 1e9:.1f} GB, and the disk has {free / 1e9:.1f}",
                "Free some space.",
            )

    @contextmanager
    def published(self) -> Iterator[Path]:
        """The folder in which the block writes `files`. If it does not fail, all files appear at once."""
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.is_folder:
            yield self.path.parent
            return
        with published_folder(self.path, overwrite=self.overwrite) as folder:
            with write_errors(self.path):
                for file in self.files:
                    (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
                for source, name in self.others:
                    if not is_index(source):
                        _copy(source, folder / name)
            yield folder
            with write_errors(self.path):
                for source, name in self.others:
                    if is_index(source):
                        _write_index(source, folder / name)


def _file(model: Checkpoint, path: Path, kind: str | None) -> Output:
    components = sorted(set(model.components.values()))
    if len(components) > 1:
        raise ToolError(
            f"{model.path} is a pipeline of several parts ({', '.join(components)}), which one file "
            "cannot hold in their own names",
            "Give a folder as the output.",
        )
    written = Format(kind or ("safetensors" if path.suffix == ".safetensors" else "pytorch"))
    refuse_misnamed(path, written)
    tensors = tuple(raw for file in model.files for raw in file.tensors.values())
    pickles = all(file.kind is Format.PYTORCH for file in model.files)
    wrapper = model.files[0].wrapper if pickles else ""
    return Output(path, (FileToWrite(Path(path.name), written, tensors, model.metadata, wrapper),))


def _folder(model: Checkpoint, path: Path) -> Output:
    root = model.path if model.path.is_dir() else model.path.parent
    if root.resolve() in path.resolve().parents and model.path.is_dir():
        raise ToolError(f"the output {path} lies in the input", "Name another output.")
    files = tuple(
        FileToWrite(
            file.path.relative_to(root),
            file.kind,
            tuple(file.tensors.values()),
            file.metadata,
            file.wrapper,
        )
        for file in model.files
    )
    written = {file.path for file in model.files}
    others = {other: other.relative_to(root) for other in _others(model) if other not in written}
    left_out = [other for other in others if is_weights(other) or _lists_others(other, written)]
    kept = tuple((other, name) for other, name in others.items() if other not in left_out)
    return Output(path, files, True, kept, tuple(str(others[other]) for other in left_out))


def _others(model: Checkpoint) -> list[Path]:
    """Every file of the input's folder; if the input is a single file, that file, which may be an index."""
    if not model.path.is_dir():
        return [model.path]
    paths = []
    for folder, inside, files in os.walk(model.path):
        inside[:] = [name for name in inside if not name.startswith(".")]  # .git, .cache
        paths += [Path(folder) / name for name in files]
    return sorted(paths)


def _lists_others(path: Path, written: set[Path]) -> bool:
    """Whether a file is the index of shards that are not written, such as those of another variant."""
    if not is_index(path):
        return False
    try:
        return not set(shards_of(path)) <= written
    except (ToolError, OSError):
        return True


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())


def _write_index(source: Path, target: Path) -> None:
    """Writes the index of the shards, with the sum of bytes that they have now."""
    fields = json.loads(source.read_text())
    shards = set(fields["weight_map"].values())
    if isinstance(fields.get("metadata"), dict) and "total_size" in fields["metadata"]:
        fields["metadata"]["total_size"] = sum(_bytes_in(target.with_name(n)) for n in shards)
    write_durably(target, json.dumps(fields, indent=2).encode() + b"\n")


def _bytes_in(path: Path) -> int:
    """The bytes of a file's tensors; of a pickle its size, which is nearly that."""
    if path.suffix != ".safetensors":
        return path.stat().st_size
    return sum(info.end - info.start for info in read_header(path).tensors.values())
