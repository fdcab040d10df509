"""OneTrainer's OFT through the tools: what its flags and names mean is kept, or the naming is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from demo.networks import write_index
from lora.engine.stack import LoraUse
from lora.errors import ToolError
from lora.formats.names.naming import Naming
from lora.tools.adapters.saving import WriteOptions
from lora.tools.convert import ConvertOptions, convert
from lora.tools.models.checkpoints import Checkpoint
from tests.adapters import randn, write
from tests.lora.tools import narrow
from tests.lora.tools.narrow import CONV, SELF

FLAGS = {
    "plain": {},
    "scaled": {"oft_R.scaled_oft": torch.tensor(True)},
    "clipped": {"oft_R.clipped_oft": torch.tensor(0.5)},
    "cans": {"oft_R.cans_oft": torch.tensor(True)},
    "dora": {"dora_log_multiplier": torch.full((64,), 0.5)},
}
TOLD = {"ot_branch": "master"}


def tensors_of(kind: str, selves: str = SELF, conv: str = CONV) -> dict[str, Tensor]:
    made = {
        f"{selves}.oft_R.weight": 0.3 * randn(8, 28),
        f"{conv}.oft_R.weight": 0.3 * randn(36, 28),
    }
    for stem in (selves, conv):
        made |= {f"{stem}.{name}": flag.clone() for name, flag in FLAGS[kind].items()}
    if kind == "dora":
        made[f"{conv}.dora_log_multiplier"] = torch.full((32,), 0.5)
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    narrow.components()["unet"].save_pretrained(folder / "unet")  # type: ignore[operator]
    write_index(folder)
    return folder


def effect(path: Path) -> dict[str, Tensor]:
    return narrow.merged(LoraUse(narrow.read(path), 1.0))


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("names", ["kohya", "dotted"])
@pytest.mark.parametrize("known", [False, True])
def test_another_dtype_changes_nothing_else(
    tmp_path: Path, model: Path, kind: str, names: str, known: bool
) -> None:
    stems = {"dotted": (narrow.SELF_DIFFUSERS, narrow.CONV_DIFFUSERS)}.get(names, (SELF, CONV))
    metadata = TOLD if names == "dotted" else None
    path = write(tmp_path / "a.safetensors", tensors_of(kind, *stems), metadata)
    after, options = tmp_path / "b.safetensors", ConvertOptions(WriteOptions(dtype=torch.float32))
    if known:
        with Checkpoint.open(model) as checkpoint:
            convert(path, after, options, checkpoint)
    else:
        convert(path, after, options)
    assert narrow.same(effect(path), effect(after))


@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_in_pefts_naming_it_turns_as_pefts(tmp_path: Path, model: Path, kind: str) -> None:
    path = write(tmp_path / "a.safetensors", tensors_of(kind))
    with Checkpoint.open(model) as checkpoint:
        convert(path, tmp_path / "peft", ConvertOptions(WriteOptions(Naming.PEFT)), checkpoint)
    one, other = effect(path), effect(tmp_path / "peft")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name])


@pytest.mark.parametrize("kind", ["clipped", "cans", "dora"])
@pytest.mark.parametrize("naming", list(Naming))
def test_what_a_naming_cannot_say_is_refused(
    tmp_path: Path, model: Path, kind: str, naming: Naming
) -> None:
    path = write(tmp_path / "a.safetensors", tensors_of(kind))
    with Checkpoint.open(model) as checkpoint, pytest.raises(ToolError) as caught:
        convert(path, tmp_path / "out", ConvertOptions(WriteOptions(naming)), checkpoint)
    assert "has no name for" in caught.value.sentence
