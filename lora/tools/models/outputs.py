"""Where a changed model is written to: one file, or a folder with the files of the input's."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora.durable import sync_folder
from lora.errors import ToolError
from lora.formats.header import read_header
from lora.formats.tensors import DTYPES
from lora.tools.models.checkpoints import Checkpoint, Raw
from lora.tools.models.folders import OTHER_WEIGHTS, WEIGHTS, is_index, is_weights
from lora.tools.models.weights import KINDS
from lora.tools.writing import refuse_overwriting, telling, write_pytorch


@dataclass(frozen=True)
class Job:
    """One file with weights to be written."""

    path: Path
    kind: str
    """`safetensors` or `pytorch`."""
    tensors: tuple[Raw, ...]
    metadata: Mapping[str, str]
    wrapper: str
    """The key of a pickle's table under which the tensors go; empty for none."""

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Where the tensors are to be written as .safetensors: the file itself, or one to be converted."""
        if self.kind == "safetensors":
            yield self.path
            return
        path = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:16]}.scratch")
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def convert(self, scratch: Path) -> None:
        """Makes a pickle of what was written, where it is to be one; its tensors are mapped, not read."""
        if self.kind == "pytorch":
            write_pytorch(self.path, _mapped(scratch), self.wrapper)


def _mapped(path: Path) -> dict[str, Tensor]:
    header = read_header(path)
    with path.open("rb") as stream:
        # Private and writable, as torch wants it; nothing is written.
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
    """What is to be written, and where: decided, with nothing touched."""

    path: Path
    jobs: tuple[Job, ...]
    folder: Path | None = None
    """Where the files are until all are there; None for a single file."""
    copies: tuple[tuple[Path, Path], ...] = ()
    """(from, to) of the folder's other files."""
    indices: tuple[tuple[Path, Path], ...] = ()
    """The same of the lists of shards, whose sum of bytes may change."""
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, model: Checkpoint, path: Path, kind: str | None, inputs: Sequence[Path] = ()
    ) -> Output:
        """The output of a changed model. `kind`: of a single file, if its name is not to say it.

        Raises: ToolError if that would write over an input, or put several components into one file.
        """
        if kind is not None and kind not in KINDS:
            raise ToolError(f"{kind[:40]!r} is no format", f"Use {' or '.join(KINDS)}.")
        if path.suffix in OTHER_WEIGHTS:
            raise ToolError(f"{path.suffix} files cannot be written", "Use .safetensors.")
        refuse_overwriting(path, (*(file.path for file in model.files), *inputs))
        single = kind is not None or path.suffix in WEIGHTS
        return _folder(model, path) if path.is_dir() or not single else _file(model, path, kind)

    def refuse_full_disk(self, size: int) -> None:
        """Raises: ToolError if there is no room for that many bytes of tensors."""
        pickles = any(job.kind == "pytorch" for job in self.jobs)
        needed = size * (2 if pickles else 1) + sum(one.stat().st_size for one, _ in self.copies)
        there = next(one for one in (self.path, *self.path.absolute().parents) if one.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise ToolError(
                f"{self.path.name} needs {needed / 1e9:.1f} GB, and the disk has {free / 1e9:.1f}",
                "Free some.",
            )

    @contextmanager
    def published(self) -> Iterator[None]:
        """While it is open the jobs may be written. Left without an exception, all appears at once."""
        with telling(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.folder is None:
            yield
            return
        try:
            with telling(self.path):
                for job in self.jobs:
                    job.path.parent.mkdir(parents=True, exist_ok=True)
                for source, target in self.copies:
                    _copy(source, target)
            yield
            with telling(self.path):
                for source, target in self.indices:
                    _write_index(source, target)
                for folder, _, _ in os.walk(self.folder):
                    sync_folder(Path(folder))
                self.folder.rename(self.path)
                sync_folder(self.path.parent)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def _file(model: Checkpoint, path: Path, kind: str | None) -> Output:
    """One file with all tensors, in the input's names."""
    components = sorted(set(model.components.values()))
    if len(components) > 1:
        raise ToolError(
            f"{model.path.name} is a pipeline of several parts ({', '.join(components)}), which one file "
            "cannot hold in their own names",
            "Give a folder as the output.",
        )
    kind = kind or ("safetensors" if path.suffix == ".safetensors" else "pytorch")
    tensors = tuple(raw for file in model.files for raw in file.tensors.values())
    pickles = all(file.kind == "pytorch" for file in model.files)
    wrapper = model.files[0].wrapper if pickles else ""
    return Output(path, (Job(path, kind, tensors, model.metadata, wrapper),))


def _folder(model: Checkpoint, path: Path) -> Output:
    """The input's own tree, first beside the output under a name that no one takes for it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ToolError(f"the output {path.name} is there already", "Name a new or empty folder.")
    root = model.path if model.path.is_dir() else model.path.parent
    if root.resolve() in (path.resolve(), *path.resolve().parents) and model.path.is_dir():
        raise ToolError(f"the output {path.name} lies in the input", "Name another output.")
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.part")
    jobs = tuple(
        Job(
            folder / file.path.relative_to(root),
            file.kind,
            tuple(file.tensors.values()),
            file.metadata,
            file.wrapper,
        )
        for file in model.files
    )
    written = {file.path for file in model.files}
    others = [one for one in _others(model) if one not in written]
    names = {one: one.relative_to(root) for one in others}
    left_out = [one for one in others if is_weights(one) or _lists_others(one, written)]
    kept = [one for one in others if one not in left_out]
    return Output(
        path,
        jobs,
        folder,
        tuple((one, folder / names[one]) for one in kept if not is_index(one)),
        tuple((one, folder / names[one]) for one in kept if is_index(one)),
        tuple(str(names[one]) for one in left_out),
    )


def _others(model: Checkpoint) -> list[Path]:
    """Every file of the input's folder; of a single file none but its own, of shards their list."""
    if not model.path.is_dir():
        return [model.path]
    found = []
    for folder, inside, files in os.walk(model.path):
        inside[:] = [name for name in inside if not name.startswith(".")]  # .git, .cache
        found += [Path(folder) / name for name in files]
    return sorted(found)


def _lists_others(path: Path, written: set[Path]) -> bool:
    """Whether a file is a list of shards that are not written: another variant's."""
    if not is_index(path):
        return False
    try:
        shards = set(json.loads(path.read_text())["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        return True
    return not {path.with_name(name) for name in shards} <= written


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())


def _write_index(source: Path, target: Path) -> None:
    """The list of shards, with the sum of bytes that they have now."""
    fields = json.loads(source.read_text())
    shards = set(fields["weight_map"].values())
    if isinstance(fields.get("metadata"), dict) and "total_size" in fields["metadata"]:
        fields["metadata"]["total_size"] = sum(_bytes_in(target.with_name(n)) for n in shards)
    target.write_text(json.dumps(fields, indent=2) + "\n")  # the folder has no name yet


def _bytes_in(path: Path) -> int:
    """Of a file's tensors; of a pickle its size, which is about that."""
    if path.suffix != ".safetensors":
        return path.stat().st_size
    return sum(info.end - info.start for info in read_header(path).tensors.values())
