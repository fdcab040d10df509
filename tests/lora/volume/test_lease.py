"""Who may download: taken once, kept alive, and taken over from the dead and the silent."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lora.volume import lease as lease_module
from lora.volume.lease import Lease, LeaseWatch, process_name
from tests.waiting import Clock, until

ELSEWHERE = "another-boot/pid:[1]/7/99"
"""A process of another machine: nobody here can tell whether it lives."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.lease"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(lease_module, "time", made)
    return made


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command) as process:
        yield process
        process.kill()


def taken_elsewhere(path: Path, silence: float, monkeypatch: pytest.MonkeyPatch) -> Lease:
    """A lease that a worker on another machine holds."""
    lease = Lease(path, silence)
    with monkeypatch.context() as patch:
        patch.setattr(lease_module, "process_name", lambda pid="self": ELSEWHERE)
        assert lease.take()
    return lease


def write_lease(path: Path, owner: str) -> None:
    path.write_text(f"{owner} 0123456789abcdef 0\n")


# --- taking and giving back --------------------------------------------------------------------------


def test_a_lease_is_taken_once_and_free_again_after_its_block(path: Path) -> None:
    first, second = Lease(path, 5), Lease(path, 5)
    assert first.take()
    assert not second.take()
    with first:
        assert not second.take()
    assert not path.exists()
    assert second.take()


def test_a_lease_is_given_back_when_its_block_fails(path: Path) -> None:
    lease = Lease(path, 5)
    assert lease.take()
    with pytest.raises(KeyError), lease:
        raise KeyError
    assert not path.exists()


def test_one_of_many_threads_takes_it(path: Path) -> None:
    leases = [Lease(path, 5) for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(Lease.take, leases)) == 1


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_takes_no_lease_gives_it_to_everybody(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / folder / "a.lease"
    for lease in (Lease(path, 0.05), Lease(path, 0.05)):
        assert lease.take()
        with lease:
            time.sleep(0.05)  # a sign of life that finds no file
    assert not path.exists()


def test_a_full_volume_gives_it_to_everybody_and_keeps_nothing_of_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = os.open

    def on_a_full_volume(path: Path, flags: int) -> int:
        os.close(made(path, flags))
        return made("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", on_a_full_volume)
    assert Lease(path, 5).take()
    assert not path.exists()


# --- signs of life -----------------------------------------------------------------------------------


def test_signs_of_life_keep_a_lease(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease, watch = taken_elsewhere(path, 0.1, monkeypatch), LeaseWatch(path, 10)
    with lease:
        for _ in range(5):
            text = path.read_text()
            until(lambda: path.read_text() not in ("", text))  # noqa: B023 - called at once
            assert not watch.is_dead()
            clock.now += 9.9


def test_a_silent_owner_is_dead_after_that_time_by_the_watchers_clock(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = taken_elsewhere(path, 10, monkeypatch)
    watch = LeaseWatch(path, 10)
    assert not watch.is_dead()
    clock.now += 9.9
    assert not watch.is_dead()
    path.write_text(path.read_text().replace(" 0\n", " 1\n"))
    clock.now += 9.9
    assert not watch.is_dead()  # it gave a sign of life in between
    clock.now += 10.1
    assert watch.is_dead()
    assert watch.remove()
    assert Lease(path, 10).take()
    assert not lease.take()


def test_a_lease_without_text_is_dead_after_the_same_time(path: Path, clock: Clock) -> None:
    path.touch()  # its owner was killed before it wrote its name
    watch = LeaseWatch(path, 10)
    assert not watch.is_dead()
    clock.now += 10.1
    assert watch.is_dead()


def test_where_there_is_no_lease_nothing_is_dead(path: Path, clock: Clock) -> None:
    watch = LeaseWatch(path, 10)
    clock.now += 100
    assert not watch.is_dead()
    write_lease(path, ELSEWHERE)
    assert not watch.is_dead()


def test_an_owner_that_was_taken_over_leaves_the_new_lease_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = taken_elsewhere(path, 0.1, monkeypatch), Lease(path, 0.1)
    with old:
        path.unlink()
        assert new.take()
        text = path.read_text()
        time.sleep(0.1)
        assert path.read_text() == text
    assert path.read_text() == text


# --- the death of a process of this machine ----------------------------------------------------------


def test_a_living_process_keeps_its_lease_and_a_killed_one_loses_it_at_once(
    path: Path, clock: Clock, sleeper: subprocess.Popen[bytes]
) -> None:
    write_lease(path, process_name(sleeper.pid))
    watch = LeaseWatch(path, 10)
    assert not watch.is_dead()
    sleeper.kill()
    sleeper.wait()
    assert watch.is_dead()


def test_a_killed_process_counts_as_dead_before_its_parent_takes_note(
    path: Path, clock: Clock, sleeper: subprocess.Popen[bytes]
) -> None:
    write_lease(path, process_name(sleeper.pid))
    sleeper.kill()
    until(LeaseWatch(path, 10).is_dead)
    with pytest.raises(ProcessLookupError):
        process_name(sleeper.pid)


def test_a_lease_of_a_process_whose_number_went_to_another_is_dead(
    path: Path, clock: Clock, sleeper: subprocess.Popen[bytes]
) -> None:
    boot, space, pid, start = process_name(sleeper.pid).split("/")
    write_lease(path, f"{boot}/{space}/{pid}/{int(start) - 1}")
    assert LeaseWatch(path, 10).is_dead()


@pytest.mark.parametrize("part", [0, 1], ids=["another boot", "another container"])
def test_of_processes_elsewhere_only_their_silence_tells(
    path: Path, clock: Clock, part: int
) -> None:
    name = process_name().split("/")
    name[part] = "another"
    name[2] = "999999999"  # whatever has that number here, or has not
    write_lease(path, "/".join(name))
    assert not LeaseWatch(path, 10).is_dead()


@pytest.mark.parametrize("owner", ["a-host-name", "a/b", "a/b/c/d", "///", ""])
def test_names_of_another_form_only_die_of_silence(path: Path, clock: Clock, owner: str) -> None:
    write_lease(path, owner)
    watch = LeaseWatch(path, 10)
    assert not watch.is_dead()
    clock.now += 10.1
    assert watch.is_dead()


def test_where_nothing_tells_of_processes_only_silence_does(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_proc(pid: object = "self") -> str:
        raise FileNotFoundError("/proc/sys/kernel/random/boot_id")

    mine = process_name()
    monkeypatch.setattr(lease_module, "process_name", no_proc)
    monkeypatch.setattr("lora.durable.process_name", no_proc)
    lease = Lease(path, 10)
    assert lease.take()
    watch = LeaseWatch(path, 10)
    assert not watch.is_dead()
    write_lease(path, mine)
    assert not watch.is_dead()
    clock.now += 10.1
    assert watch.is_dead()


# --- taking over -------------------------------------------------------------------------------------


def test_one_of_two_waiters_gets_a_dead_lease(path: Path, clock: Clock) -> None:
    for _ in range(200):
        write_lease(path, ELSEWHERE)
        watches = [LeaseWatch(path, 10), LeaseWatch(path, 10)]
        assert not any(watch.is_dead() for watch in watches)
        clock.now += 11
        together = threading.Barrier(2)

        def take_over(watch: LeaseWatch, together: threading.Barrier = together) -> bool:
            together.wait()
            return watch.is_dead() and watch.remove() and Lease(path, 10).take()

        with ThreadPoolExecutor(2) as pool:
            assert sum(pool.map(take_over, watches)) == 1
        assert [other.name for other in path.parent.iterdir()] == [path.name]
        path.unlink()


def test_a_lease_that_was_renewed_or_taken_meanwhile_is_not_removed(path: Path) -> None:
    write_lease(path, ELSEWHERE)
    watch = LeaseWatch(path, 10)
    watch.is_dead()
    path.unlink()
    newer = Lease(path, 10)
    assert newer.take()
    text = path.read_text()
    assert watch.remove()
    assert path.read_text() == text


def between_look_and_rename(monkeypatch: pytest.MonkeyPatch, step: Any) -> None:
    """Lets another worker be faster, after the text was read and before the file is moved."""
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        step()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)


def test_a_lease_that_was_taken_in_the_last_moment_is_put_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lease(path, ELSEWHERE)
    watch = LeaseWatch(path, 10)
    watch.is_dead()
    between_look_and_rename(monkeypatch, lambda: path.write_text("another's 0\n"))
    assert watch.remove()
    assert path.read_text() == "another's 0\n"
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_a_lease_that_is_taken_while_one_is_put_back_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lease(path, ELSEWHERE)
    watch = LeaseWatch(path, 10)
    watch.is_dead()
    between_look_and_rename(monkeypatch, lambda: path.write_text("another's 0\n"))
    link = os.link

    def late(source: Path, target: Path) -> None:
        path.write_text("the newest 0\n")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert watch.remove()
    assert path.read_text() == "the newest 0\n"
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_a_lease_that_the_folder_does_not_let_go_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise PermissionError(1, "not permitted")

    write_lease(path, ELSEWHERE)
    watch = LeaseWatch(path, 10)
    watch.is_dead()
    between_look_and_rename(monkeypatch, refused)
    assert not watch.remove()
    assert path.exists()


def test_a_lease_that_is_gone_counts_as_removed(path: Path) -> None:
    write_lease(path, ELSEWHERE)
    watch = LeaseWatch(path, 10)
    watch.is_dead()
    path.unlink()
    assert watch.remove()


# --- waiting -----------------------------------------------------------------------------------------


def nothing() -> None:
    return None


def wait(path: Path, look: Any = nothing, seconds: float = 60.0) -> Any:
    too_late = TimeoutError("too late")
    return Lease(path, 10).wait(look, time.monotonic() + seconds, 0.001, too_late)


def test_a_free_lease_is_ours_without_a_look(path: Path) -> None:
    assert wait(path, lambda: pytest.fail("nobody looks")) is None
    assert path.exists()


def test_a_waiter_goes_on_with_what_the_owner_made(path: Path) -> None:
    write_lease(path, ELSEWHERE)
    looks = iter([None, None, "the file"])
    assert wait(path, lambda: next(looks)) == "the file"
    assert path.read_text().startswith(ELSEWHERE)


def test_a_waiter_takes_the_lease_that_its_owner_gives_back(path: Path) -> None:
    write_lease(path, ELSEWHERE)
    looks = iter([None, None, path.unlink])

    def look() -> None:
        if give_back := next(looks, None):
            give_back()

    assert wait(path, look) is None
    assert path.read_text().startswith(process_name())


def test_a_waiter_takes_over_from_the_dead(path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    write_lease(path, process_name(sleeper.pid))
    sleeper.kill()
    assert wait(path) is None
    assert path.read_text().startswith(process_name())


def test_where_a_dead_lease_cannot_be_removed_a_waiter_goes_on_without(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lease(path, ELSEWHERE)
    monkeypatch.setattr(LeaseWatch, "is_dead", lambda self: True)
    monkeypatch.setattr(LeaseWatch, "remove", lambda self: False)
    assert wait(path) is None
    assert path.read_text().startswith(ELSEWHERE)


def test_a_waiter_gives_up_at_its_deadline(path: Path) -> None:
    write_lease(path, ELSEWHERE)
    with pytest.raises(TimeoutError, match="too late"):
        wait(path, seconds=0.0)
