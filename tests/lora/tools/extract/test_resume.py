"""An extraction that was killed goes on where it was, and ends in the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora.tools.extract import layer as extract_layer
from lora.tools.extract.options import ExtractOptions
from lora.tools.extract.report import ExtractReport
from lora.tools.extract.run import extract
from lora.tools.factors.ranks import RankPolicy
from lora.tools.models.checkpoints import Checkpoint
from tests.conftest import ROOT
from tests.lora.tools import pairs
from tests.lora.tools.pairs import write_model, write_pair
from tests.waiting import PATIENCE

pytestmark = pytest.mark.slow

POLICIES = {"rank": RankPolicy(rank=6), "budget": RankPolicy(max_bytes=200_000)}

CHILD = """
import os, signal, sys
from pathlib import Path
from tests.lora.tools.extract.test_resume import POLICIES, run

steps = 0

def tell(done, total, what):
    global steps
    steps += 1
    if steps == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

run(Path(sys.argv[1]), POLICIES[sys.argv[2]], tell)
"""


def run(folder: Path, policy: RankPolicy, tell=lambda *told: None) -> ExtractReport:
    names = ("source.safetensors", "target.safetensors")
    with Checkpoint.open(folder / names[0]) as one, Checkpoint.open(folder / names[1]) as other:
        return extract(
            one, other, folder / "lora.safetensors", ExtractOptions(policy, overwrite=True), tell
        )


def killed(folder: Path, policy: str, step: int) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), policy, str(step)],
        cwd=ROOT,
        env={"OMP_NUM_THREADS": "1", "PATH": ""},
        check=False,
        timeout=PATIENCE,
    )
    assert child.returncode == -signal.SIGKILL


@pytest.fixture
def one_thread():
    """As the child: sums in another order would be other bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Six tensors are stored as they differ, then come seven matrices, one of them unchanged; in a budget these
# come twice, first for their singular values.
@pytest.mark.parametrize(
    ("policy", "step", "left"),
    [("rank", 3, 6), ("rank", 9, 4), ("budget", 10, 9), ("budget", 16, 4)],
)
@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_is_taken_up_and_ends_in_the_same_bytes(
    tmp_path: Path, policy: str, step: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path, noise=0.01)
    decomposed: list[int] = []
    original = extract_layer.svd_by_policy
    monkeypatch.setattr(
        extract_layer,
        "svd_by_policy",
        lambda *given: (decomposed.append(0), original(*given))[1],
    )
    undisturbed = run(tmp_path, POLICIES[policy])
    wanted = undisturbed.output.read_bytes()
    undisturbed.output.unlink()
    killed(tmp_path, policy, step)
    assert not undisturbed.output.exists()
    decomposed.clear()
    report = run(tmp_path, POLICIES[policy])
    assert report.output.read_bytes() == wanted
    assert report.resumed > 0
    assert [layer.name for layer in report.layers] == [layer.name for layer in undisturbed.layers]
    assert report.unchanged == undisturbed.unchanged
    assert len(decomposed) == left
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "lora.safetensors",
        "source.safetensors",
        "target.safetensors",
    ]


def test_what_was_begun_with_other_options_or_models_is_not_taken_up(tmp_path: Path) -> None:
    write_pair(tmp_path)
    killed(tmp_path, "rank", 9)
    assert run(tmp_path, RankPolicy(rank=5)).resumed == 0
    tensors = load_file(tmp_path / "target.safetensors")
    tensors[pairs.LINEAR] *= 2
    write_model(tmp_path / "target.safetensors", tensors)
    assert run(tmp_path, POLICIES["rank"]).resumed == 0
