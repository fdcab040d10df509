"""Another commit of this repository, to be measured beside this one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent


@contextmanager
def commit(name: str) -> Iterator[Path]:
    """A folder with this commit's files, while the block runs."""
    with TemporaryDirectory(prefix="commit-") as folder:
        yield clone(name, Path(folder) / "tree")


def clone(name: str, folder: Path) -> Path:
    """Puts a commit's files into a new folder; returns it."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "checkout", "--quiet", "--detach", name], cwd=folder, check=True)
    return folder
