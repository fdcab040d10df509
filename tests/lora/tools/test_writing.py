"""A file appears whole or not at all, and what a killed run has written is not done again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lora.errors import ToolError
from lora.formats.header import read_header
from lora.tools.writing import StreamWriter, published_folder, write_pytorch
from tests.adapters import randn
from tests.conftest import ROOT
from tests.waiting import PATIENCE

GROUPS = {
    "a": {"a.weight": randn(3, 5), "a.alpha": torch.tensor(2.0)},
    "b": {"b.weight": randn(7).to(torch.bfloat16), "b.empty": torch.empty(0, 4)},
    "c": {"c.weight": randn(2, 3).to(torch.float8_e4m3fn), "c.count": torch.arange(5)},
}
NAMES = [name for group in GROUPS.values() for name in group]


def same(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(
        one.view(torch.uint8).flatten() if one.dim() else one,
        other.view(torch.uint8).flatten() if other.dim() else other,
    )


def write(path: Path, journal: str | None, upto: int = 3) -> list[object]:
    """Puts groups that are not there yet. Returns the notes of those that were."""
    with StreamWriter(path, NAMES, {"format": "pt"}, journal) as writer:
        found = [note["group"] for note in writer.notes]
        for name in list(GROUPS)[:upto]:
            if name not in found:
                writer.put(GROUPS[name], {"group": name})
        if upto == len(GROUPS):
            writer.finish({"more": "später"})
        return found


def check(path: Path) -> None:
    loaded = load_file(path)
    expected = {name: tensor for group in GROUPS.values() for name, tensor in group.items()}
    assert loaded.keys() == expected.keys()
    assert all(same(loaded[name], tensor) for name, tensor in expected.items())
    assert read_header(path).metadata == {"format": "pt", "more": "später"}


def test_written_file_is_read_by_safetensors_and_by_us(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    write(path, None)
    check(path)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "more": "später"}
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize("journal", [None, "one"])
def test_nothing_is_there_under_the_name_before_the_end(
    tmp_path: Path, journal: str | None
) -> None:
    path = tmp_path / "out.safetensors"
    write(path, journal, upto=2)
    assert not path.exists()
    assert not list(tmp_path.glob("*.safetensors"))
    assert bool(list(tmp_path.iterdir())) == (journal is not None)


def test_another_run_of_the_same_takes_up_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    assert write(path, "one", upto=2) == []
    assert write(path, "one") == ["a", "b"]
    check(path)
    assert list(tmp_path.iterdir()) == [path]


def test_another_journal_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    write(path, "one", upto=2)
    assert write(path, "two") == []
    check(path)


@pytest.mark.parametrize("cut", ["journal", "part", "flipped"])
def test_damaged_group_is_written_again(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "out.safetensors"
    write(path, "one", upto=2)
    (part,), (journal,) = tmp_path.glob(".*.part"), tmp_path.glob(".*.journal")
    data = bytearray((journal if cut == "journal" else part).read_bytes())
    if cut == "flipped":
        data[-1] ^= 1
        part.write_bytes(data)
    else:
        (journal if cut == "journal" else part).write_bytes(data[:-1])
    assert write(path, "one") == ["a"]
    check(path)


def test_two_processes_never_write_the_same(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    with StreamWriter(path, NAMES, {"format": "pt"}, "one") as first:
        first.put(GROUPS["a"], {"group": "a"})
        second = StreamWriter(path, NAMES, {"format": "pt"}, "one")
        with pytest.raises(ToolError, match="another process is writing"), second:
            pass
        first.put(GROUPS["b"], {"group": "b"})
    assert write(path, "one") == ["a", "b"]


def test_discarded_run_leaves_nothing(tmp_path: Path) -> None:
    with StreamWriter(tmp_path / "out.safetensors", NAMES, {}, "one") as writer:
        writer.put(GROUPS["a"])
        writer.discard()
    assert not list(tmp_path.iterdir())


def test_name_that_was_not_announced_is_a_mistake_of_the_program(tmp_path: Path) -> None:
    with StreamWriter(tmp_path / "out.safetensors", ["a"], {}) as writer:
        writer.put({"a": torch.zeros(1)})
        for name in ("a", "b"):
            with pytest.raises(ValueError, match="announced"):
                writer.put({name: torch.zeros(1)})


def test_header_has_room_for_any_shape(tmp_path: Path) -> None:
    name = "ü" * 300
    with StreamWriter(tmp_path / "out.safetensors", [name], {"x": "y" * 1000}) as writer:
        writer.put({name: torch.zeros([1] * 8)})
        writer.finish({"z": "y" * 60_000})
    assert read_header(tmp_path / "out.safetensors").tensors[name].shape == (1,) * 8


def test_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    writer = StreamWriter(tmp_path / "none" / "out.safetensors", [], {})
    with pytest.raises(ToolError, match="cannot be written"), writer:
        pass


def test_an_interrupt_while_the_file_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> int:
        opened(*arguments)
        raise KeyboardInterrupt

    opened = os.open
    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), StreamWriter(tmp_path / "out.safetensors", [], {}):
        pass
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, sys, torch
from pathlib import Path
from lora.errors import ToolError
from lora.tools.writing import StreamWriter, write_pytorch
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
path, form = Path(sys.argv[1]), sys.argv[2]
try:
    if form == "pytorch":
        write_pytorch(path, {"a": torch.zeros(200_000)})
    else:
        with StreamWriter(path, ["a"], {}, "one" if form == "journal" else None) as writer:
            writer.put({"a": torch.zeros(200_000)})
            writer.finish()
except ToolError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "journal", "pytorch"])
def test_full_disk_is_one_sentence_and_leaves_nothing_under_the_name(
    tmp_path: Path, form: str
) -> None:
    path = tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), form],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (2, "")
    assert f"no room on the disk for {path}. " in done.stdout
    left = [one.suffix for one in tmp_path.iterdir()]
    assert sorted(left) == ([".journal", ".part"] if form == "journal" else [])


SLOW = """
import sys, time, torch
from pathlib import Path
from lora.tools.writing import StreamWriter
names = [f"t{n}" for n in range(400)]
with StreamWriter(Path(sys.argv[1]), names, {}, "one") as writer:
    print(len(writer.notes), flush=True)
    for n in range(len(writer.notes), 400):
        writer.put({f"t{n}": torch.full((1000,), float(n))}, {"n": n})
        print(n, flush=True)
        time.sleep(float(sys.argv[2]))
    writer.finish()
"""


@pytest.mark.slow
def test_killed_run_leaves_no_file_and_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    taken = []
    for more in (5, 20, 40):
        command = [sys.executable, "-c", SLOW, str(path), "0.05"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            taken.append(int(running.stdout.readline() or -1))
            for _ in range(more):
                running.stdout.readline()
            os.kill(running.pid, signal.SIGKILL)
        assert not path.exists()
    done = subprocess.run(
        [sys.executable, "-c", SLOW, str(path), "0"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0
    assert taken[0] == 0 < taken[1] < taken[2] < int(done.stdout.split()[0])
    loaded = load_file(path)
    assert all(torch.equal(loaded[f"t{n}"], torch.full((1000,), float(n))) for n in range(400))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("wrapper", ["", "state_dict"])
def test_pickle_is_what_torch_loads(tmp_path: Path, wrapper: str) -> None:
    write_pytorch(tmp_path / "out.pt", GROUPS["a"], wrapper)
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    loaded = loaded[wrapper] if wrapper else loaded
    assert all(torch.equal(loaded[name], tensor) for name, tensor in GROUPS["a"].items())
    assert [one.name for one in tmp_path.iterdir()] == ["out.pt"]


def test_a_folder_appears_with_all_that_is_in_it_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), published_folder(target) as folder:
        (folder / "a").write_text("1")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with published_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert [(one.name, one.is_dir()) for one in tmp_path.iterdir()] == [("out", True)]
    assert (target / "a").read_text() == "1"


def test_a_folder_does_not_take_the_place_of_another(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with (
        pytest.raises(ToolError, match="cannot be written"),
        published_folder(tmp_path / "out") as folder,
    ):
        (folder / "a").touch()
    assert [one.name for one in tmp_path.rglob("*")] == ["out", "mine"]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from lora.durable import part_file
from lora.tools.writing import StreamWriter
target = Path(sys.argv[1])
with part_file(target.parent, target.name) as temporary:
    path = temporary if sys.argv[2] == "for a pickle" else target
    with StreamWriter(path, ["t"], {}) as writer:
        writer.put({"t": torch.ones(1000)})
        if sys.argv[2] == "for a pickle":
            temporary.touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("form", ["for itself", "for a pickle"])
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path, form: str) -> None:
    """Also where the file was a temporary one, from which another was to be made."""
    target = tmp_path / ("a long name of a merged model" * 3 + ".safetensors")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), form], check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == (1 if form == "for itself" else 2)
    write(target, None)
    assert list(tmp_path.iterdir()) == [target]


def test_what_another_process_is_writing_is_not_removed(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    with StreamWriter(target, ["t"], {}) as under_way:
        under_way.put({"t": torch.ones(3)})
        write(target, None)
        assert len(list(tmp_path.iterdir())) == 2
        under_way.finish()
    assert load_file(target)["t"].tolist() == [1, 1, 1]
