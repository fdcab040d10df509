"""Where a result may go: over nothing, unless its user says so. Decided before any work."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from lora.errors import ToolError
from lora.formats.endings import EXTENSIONS
from lora.formats.peft import PEFT_CONFIG, PEFT_STEM
from lora.tools import WEIGHTS, Format

PEFT_FILES = (PEFT_CONFIG, *(PEFT_STEM + ending for ending in EXTENSIONS))

OTHER_OUTPUT = "Name another output."


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raises: ToolError if something other than an empty folder is at `output`, and is not to be overwritten.

    The input itself is such a thing, too, and so is a link, wherever it leads.
    """
    if overwrite or not os.path.lexists(output) or _is_empty_folder(output):
        return
    hint = "Name another output, or overwrite it with --force."
    raise ToolError(f"the output {output} exists already", hint)


def refuse_overwriting(
    output: Path,
    overwrite: bool,
    parts: Iterable[Path] = (),
    written: Collection[str] = PEFT_FILES,
) -> None:
    """Decides whether a result may appear at `output`.

    With `overwrite`, a file or link is replaced (a link itself, not what it leads to), and so is a folder
    that holds nothing but files of the names in `written`, relative to it. `parts`: the files of an input
    that consists of several, of which none is replaced alone.

    Raises: ToolError as `refuse_existing`, and if what is there may not be replaced.
    """
    refuse_existing(output, overwrite)
    if not os.path.lexists(output):
        return
    if output.exists() and not (output.is_file() or output.is_dir()):
        raise ToolError(f"the output {output} is neither a file nor a folder", OTHER_OUTPUT)
    if output.name in ("", ".."):
        raise ToolError(f"the output {output} is a folder without a name of its own", OTHER_OUTPUT)
    if any(part.exists() and output.exists() and output.samefile(part) for part in parts):
        raise ToolError(f"the output {output} is one of the files of an input", OTHER_OUTPUT)
    if output.is_dir() and not output.is_symlink():
        for file in _files_in(output):
            if str(file.relative_to(output)) not in written:
                raise ToolError(
                    f"overwriting the folder {output} would remove {file}, which is not written anew",
                    OTHER_OUTPUT,
                )


def parts_of(adapter: Path) -> list[Path]:
    """The files of an adapter that is a folder."""
    return [adapter / name for name in PEFT_FILES] if adapter.is_dir() else []


def refuse_other_kind(output: Path, *, is_folder: bool) -> None:
    """Raises: ToolError if a file is to take the place of a folder, or the other way round."""
    if output.exists() and output.is_dir() != is_folder:
        there, new = ("file", "folder") if is_folder else ("folder", "file")
        raise ToolError(
            f"the output {output} is a {there}, and the result is a {new}", OTHER_OUTPUT
        )


def refuse_misnamed(output: Path, written: Format) -> None:
    """Raises: ToolError if the ending of the file's name is that of the other format."""
    safetensors, pickles = WEIGHTS[:1], WEIGHTS[1:]
    right, wrong = (pickles, safetensors) if written is Format.PYTORCH else (safetensors, pickles)
    if output.suffix in wrong:
        hint = f"Let it end in {' or '.join(right)}, or choose the other format."
        raise ToolError(f"{output} is no name for a {written} file", hint)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _files_in(folder: Path) -> Iterator[Path]:
    """Every file below a folder, and every link, wherever it leads."""
    for below, folders, files in os.walk(folder):
        yield from (Path(below, name) for name in files)
        yield from (link for name in folders if (link := Path(below, name)).is_symlink())
