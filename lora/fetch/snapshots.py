"""Reads caches of the Hugging Face hub on this machine: which commits of a repo are there.

    <cache>/models--USER--REPO/refs/REVISION          the commit that a branch or tag was when it was cached
    <cache>/models--USER--REPO/snapshots/COMMIT/FILE  a link to ../../blobs/HASH; a snapshot may lack files

Imports nothing of ours: the image's layer of base weights has this module, and not the library.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

MAIN = "main"
"""The branch that is meant where no revision is named."""


class SnapshotMissing(Exception):
    """A revision names a commit that is not there; the text says which."""


def snapshots(cache: Path, repo: str) -> list[Path]:
    """The folders of a repo's commits, in the order of their names; none if the cache has none."""
    if not _is_name(repo):
        return []
    try:
        return sorted(one for one in (_folder(cache, repo) / "snapshots").iterdir() if one.is_dir())
    except OSError:
        return []


def find_snapshot(cache: Path, repo: str, revision: str | None = None) -> Path | None:
    """The folder of the commit that a revision is, by default that of the branch `main`.

    None if the cache does not know the revision. Raises: SnapshotMissing.
    """
    if not _is_name(repo):
        return None
    there = {one.name: one for one in snapshots(cache, repo)}
    revision = revision or MAIN
    if re.fullmatch("[0-9a-f]{40}", revision):
        return there.get(revision)
    commit = _ref(_folder(cache, repo), revision)
    if commit and commit not in there:
        raise SnapshotMissing(f"refs/{revision} names the commit {commit[:12]}, which is not there")
    return there.get(commit)


def names_in(snapshot: Path) -> list[str]:
    """The names of all files in a snapshot, those of links that lead nowhere included."""
    files = (Path(folder, name) for folder, _, names in os.walk(snapshot) for name in names)
    names = [str(file.relative_to(snapshot)) for file in files]
    return [name for name in names if name.isprintable()]  # no repo has others


def is_being_filled(cache: Path, repo: str) -> bool:
    """Whether a download of the repo is under way, or was broken off."""
    return any((_folder(cache, repo) / "blobs").glob("*.incomplete"))


def _is_name(repo: str) -> bool:
    """Whether the hub may have a repo of this name; the folder of another would be some repo's own."""
    return "--" not in repo


def _folder(cache: Path, repo: str) -> Path:
    return cache / f"models--{repo.replace('/', '--')}"


def _ref(folder: Path, revision: str) -> str:
    """The commit in a ref's file; empty if there is none."""
    if ".." in PurePosixPath(revision).parts or revision.startswith("/"):
        return ""
    try:
        return (folder / "refs" / revision).read_text().strip()
    except (OSError, ValueError):  # ValueError: no text, or a name that no file can have
        return ""
