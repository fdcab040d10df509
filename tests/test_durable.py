"""What a killed process leaves is known by its name, and removed; what a living one has is not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora.durable import is_orphan, part_file, sweep, write_durably
from lora.errors import LoraError
from lora.volume.cache import VolumeCache
from lora.volume.records import INCOMING
from tests.conftest import ROOT
from tests.waiting import until

HOLD = """
import sys, time
from pathlib import Path
from lora.durable import part_file
with part_file(Path(sys.argv[1]), sys.argv[2]) as part:
    part.mkdir() if sys.argv[3] == "folder" else part.write_bytes(b"x" * 1000)
    print("there", flush=True)
    time.sleep(600)
"""


class Holder:
    """A process that has a part in a folder."""

    def __init__(self, folder: Path, name: str, kind: str = "file") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), name, kind],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"there\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    made: list[Holder] = []
    yield made
    for holder in made:
        holder.kill()


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("name", ["model.pt", "m[odel]*.pt", "x" * 200, "画" * 60])
def test_parts_of_the_killed_are_swept_and_those_of_the_living_stay(
    tmp_path: Path, holders: list[Holder], kind: str, name: str
) -> None:
    holders += [Holder(tmp_path, name, kind), Holder(tmp_path, name, kind)]
    assert len(list(tmp_path.iterdir())) == 2
    holders[0].kill()
    sweep(tmp_path, name)
    (left,) = tmp_path.iterdir()
    assert not is_orphan(left)
    holders[1].kill()
    until(lambda: is_orphan(left))
    sweep(tmp_path, "another")
    assert left.exists()
    sweep(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".part", "x.part", ".x.unknown.0.part", ".x.a_b_c_d.0.part", "y"])
def test_what_no_process_of_ours_is_known_to_have_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    sweep(tmp_path, "x")
    assert (tmp_path / name).read_text() == "precious"


def test_whoever_writes_a_file_sweeps_what_killed_writers_of_it_left(
    tmp_path: Path, holders: list[Holder]
) -> None:
    holders += [Holder(tmp_path, "a.json"), Holder(tmp_path, "a.json"), Holder(tmp_path, "b.json")]
    for holder in (holders[0], holders[2]):
        holder.kill()
    write_durably(tmp_path / "a.json", b"{}")
    left = sorted(path.name.split(".")[1] for path in tmp_path.glob(".*.part"))
    assert left == ["a", "b"], "the living one's, and that of another file"
    assert (tmp_path / "a.json").read_bytes() == b"{}"


def test_the_next_worker_sweeps_what_a_killed_one_left(
    tmp_path: Path, holders: list[Holder]
) -> None:
    incoming = tmp_path / INCOMING
    incoming.mkdir()
    holders += [Holder(incoming, "lora"), Holder(incoming, "lora")]
    holders[0].kill()
    VolumeCache(tmp_path).shelf.prepare()
    assert len(list(incoming.iterdir())) == 1


def test_our_own_part_is_there_while_the_block_runs(tmp_path: Path) -> None:
    with pytest.raises(LoraError), part_file(tmp_path, "x") as part:
        part.write_text("x")
        sweep(tmp_path, "x")
        assert part.exists()
        raise LoraError.__subclasses__()[0]("stopped")
    assert list(tmp_path.iterdir()) == []
