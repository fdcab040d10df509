"""Files that appear whole or not at all, with nothing left beside them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora.durable import part_file, published, sha256_of, write_durably


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each file or folder whose bytes were waited for."""
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    return calls


def test_a_file_has_its_name_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with published(target) as part:
        part.write_bytes(b"new")
        assert part.parent == tmp_path
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_a_block_that_fails_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(KeyError), published(target) as part:
        part.write_bytes(b"half")
        raise KeyError
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_part_lies_in_the_folder_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    with published(tmp_path / "a.bin", tmp_path / "parts") as part:
        part.write_bytes(b"new")
        assert part.parent == tmp_path / "parts"
    assert names(tmp_path) == ["a.bin"]


def test_file_and_folder_are_synced_unless_that_is_not_wanted(
    tmp_path: Path, synced: list[int]
) -> None:
    for wanted in (False, True):
        with published(tmp_path / "a.bin", synced=wanted) as part:
            part.write_bytes(b"new")
        assert len(synced) == (2 if wanted else 0)


def test_a_disk_that_fails_at_the_end_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "a.bin").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_durably(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_pieces_are_written_one_after_the_other(tmp_path: Path) -> None:
    write_durably(tmp_path / "a.bin", b"one ", memoryview(b"two"))
    assert (tmp_path / "a.bin").read_bytes() == b"one two"


def test_a_part_for_the_longest_name_is_no_longer_than_a_name_may_be(tmp_path: Path) -> None:
    for name in ("n" * 255, "画" * 85):
        with part_file(tmp_path, name) as part:
            part.touch()
    assert names(tmp_path) == []


def test_a_files_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a").startswith("ba7816bf8f01cfea")
