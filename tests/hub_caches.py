"""Caches of the hub on this machine, as its client and RunPod lay them out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

COMMIT = "c" * 40


def folder_of(cache: Path, repo: str) -> Path:
    """Where a cache keeps a repo."""
    return cache / f"models--{repo.replace('/', '--')}"


def put(
    cache: Path,
    repo: str,
    files: Mapping[str, bytes],
    commit: str = COMMIT,
    *,
    ref: str | None = "main",
) -> Path:
    """Puts a commit's files into a cache: links to blobs. `ref`: the branch or tag that it is."""
    folder = folder_of(cache, repo)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for name, body in files.items():
        blob = folder / "blobs" / hashlib.sha256(body).hexdigest()
        blob.write_bytes(body)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref:
        file = folder / "refs" / ref
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit)
    return snapshot
