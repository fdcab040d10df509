"""One reader: whatever reads a file finds the same tensors used, the same unused, and the same reasons."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lora.engine.stack import LoraUse
from lora.errors import LoraError, LoraUnsupported, ToolError
from lora.formats.adapter import load
from lora.formats.header import read_header
from lora.formats.names.keys import KeyMap
from lora.formats.names.naming import Naming
from lora.formats.opening import opened
from lora.library.catalog import Catalog
from lora.tools.adapters.reading import read_adapter
from lora.tools.adapters.saving import Format, WriteOptions, write_adapter
from lora.tools.combine import CombineOptions, combine
from lora.tools.convert import ConvertOptions, convert
from lora.tools.describe import describe
from lora.tools.extract.options import ExtractOptions
from lora.tools.extract.run import _Output
from lora.tools.factors.ranks import RankPolicy
from lora.tools.models.checkpoints import Checkpoint
from lora.tools.resize import ResizeOptions, resize
from lora.volume.cache import VolumeCache
from tests.adapters import kohya, loha, randn, sd15, write
from tests.lora.tools import narrow
from tests.lora.tools.narrow import CONV, CROSS, NORM, SELF, SELF_DIFFUSERS, tensors_of

Tensors = Mapping[str, Tensor]

WORD = {"bundle_emb.cat.clip_l": randn(2, 32)}
TWIN = f"{SELF_DIFFUSERS}.lora_B.weight"
INT8 = torch.randint(-127, 127, (64, 4), dtype=torch.int8)


def without(tensors: Tensors, *keys: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key not in keys}


FILES: Mapping[str, Tensors] = {
    **{name: tensors_of(name) for name in narrow.NAMES},
    "kohya": kohya(),
    "lycoris": loha(),
    "words": {**tensors_of("lora"), **WORD},
    "words alone": {"clip_l": randn(2, 32), "clip_g": randn(2, 32)},
    "old glora": {
        f"{SELF}.{letter}{3 - number}.weight": tensors_of("glora")[
            f"{SELF}.{letter}{number}.weight"
        ]
        for letter in "ab"
        for number in (1, 2)
    },
    "glora of a convolution": {
        f"{CONV}.a1.weight": randn(32, 2, 1, 1),
        f"{CONV}.a2.weight": randn(2, 32, 1, 1),
        f"{CONV}.b1.weight": randn(32, 2, 1, 1),
        f"{CONV}.b2.weight": randn(2, 32, 3, 3),
    },
    # Faults that show without a model.
    "int8": {**tensors_of("lora"), f"{SELF}.lora_up.weight": INT8},
    "int8 alone": {f"{SELF}.lora_up.weight": INT8, f"{SELF}.lora_down.weight": INT8.t()},
    "complex": {**tensors_of("lora"), f"{SELF}.alpha": torch.tensor(1j)},
    "a missing part": without(tensors_of("lora"), f"{CROSS}.lora_up.weight"),
    "half of a layer": {f"{SELF}.lora_up.weight": randn(64, 2)},
    "half of a loha": without(tensors_of("loha"), f"{SELF}.hada_w2_b"),
    "an unknown tensor": {**tensors_of("lora"), f"{SELF}.what": randn(3)},
    "an alpha for nothing": {**tensors_of("lora"), f"{NORM}.diff_b": randn(64)}
    | {f"{NORM}.alpha": torch.tensor(1.0)},
    "two alphas": {**tensors_of("lora"), f"{SELF}.alpha": randn(2)},
    "an empty tensor": {**tensors_of("lora"), f"{SELF}.lora_up.weight": randn(64, 0)},
    "factors that do not fit": {**tensors_of("lora"), f"{SELF}.lora_up.weight": randn(64, 9)},
    "magnitudes alone": {**tensors_of("lora"), f"{NORM}.dora_scale": randn(64, 1)},
    "t-lora": {
        **tensors_of("lora"),
        f"{NORM}.q_layer.weight": randn(4, 64),
        f"{NORM}.lambda_layer": randn(1, 4),
    },
    "nan": {**tensors_of("lora"), f"{SELF}.lora_up.weight": torch.full((64, 4), torch.nan)},
    "a model": {f"{SELF_DIFFUSERS}.weight": randn(64, 64)},
}

FOR_ANOTHER_MODEL: Mapping[str, Tensors] = {
    "sd15": sd15(),
    "sd15 in part": sd15() | kohya(),
    "an unknown module": {**tensors_of("lora"), "lora_unet_other.diff": randn(3)},
    "no component": {**tensors_of("lora"), "lora_te3_other.diff": randn(3)},
    "another shape": {**tensors_of("lora"), f"{NORM}.diff": randn(3)},
    "no such parameter": {**tensors_of("lora"), f"{SELF}.diff_m": randn(1, 6, 64)},
    "a twin": {**tensors_of("lora"), TWIN: randn(64, 4)},
    "only unknown modules": {"lora_unet_other.diff": randn(3), "lora_unet_more.diff": randn(3)},
    "no known name": {"one.two.three": randn(3), "other": randn(3)},
    "words for nobody": {**tensors_of("lora"), "bundle_emb.cat.t5": randn(2, 32)},
    "words of another width": {**tensors_of("lora"), "clip_l": randn(2, 33)},
}

NAMINGS = [(name, naming) for name in narrow.NAMES for naming in (*Naming, None)]


def in_naming(folder: Path, name: str, naming: Naming | None) -> Path | None:
    """A file of an algorithm in a naming, or as a pickle; None if the naming has no names for it."""
    adapter = read_adapter(narrow.source(folder, name), narrow.key_map())
    output = folder / (f"{name}.pt" if naming is None else f"{name} {naming}.safetensors")
    form = Format.SAFETENSORS if naming else Format.PYTORCH
    try:
        write_adapter(output, adapter, WriteOptions(naming, format=form))
    except ToolError:
        return None
    return output


class Reading(SimpleNamespace):
    """What a reader says: the keys that it uses, and key -> reason of the others; or an error."""

    used: frozenset[str] = frozenset()
    unused: Mapping[str, str] = {}
    error: tuple[str, str] | None = None


def said(path: Path, read: Callable[[], Reading]) -> Reading:
    try:
        return read()
    except LoraError as error:
        return Reading(error=(type(error).__name__, error.sentence.removeprefix(f"{path}: ")))


def by_engine(path: Path, key_map: KeyMap) -> Reading:
    with opened(path) as source:
        file = load(source.file, key_map, "x", config=source.config)
        unused = {one.key: one.reason for one in file.unused}
        used = frozenset(read_header(source.file).tensors) - unused.keys()
        assert len(used) == file.keys
    return Reading(used=used, unused=unused)


def by_tools(path: Path, key_map: KeyMap | None) -> Reading:
    adapter = read_adapter(path, key_map, allow_unused=True)
    keys = {key for part in adapter.parts for key in part.keys.values()}
    unused = {one.key: one.reason for one in adapter.unused}
    return Reading(used=frozenset(keys | adapter.words.keys()), unused=unused)


def by_inspect(path: Path) -> Reading:
    with opened(path) as source:
        keys = frozenset(read_header(source.file).tensors)
    unused = {one.key: one.reason for one in describe(path).unused}
    return Reading(used=keys - unused.keys(), unused=unused)


def fit_of(path: Path) -> Reading:
    """`inspect --against`."""
    fit = describe(path, narrow.key_map()).fit
    assert fit is not None
    unused = {one.key: one.reason for one in fit.keys}
    return Reading(used=fit.matched, unused=unused, error=fit.trouble)


def reason_of_library(path: Path) -> str | None:
    cache = VolumeCache(path.parent)
    cache.shelf.prepare()
    return Catalog(cache, narrow.key_map()).activate(path.name).state.reason


def with_words_carried(reading: Reading, path: Path) -> Reading:
    """The tools carry words that a model cannot use: they have one name in every naming."""
    with opened(path) as source:
        keys = read_header(source.file).tensors.keys()
    words = {key for key in keys if key.startswith(("bundle_emb.", "clip_"))}
    if reading.error and words:
        return by_tools(path, narrow.key_map())
    unused = {key: why for key, why in reading.unused.items() if key not in words}
    return Reading(**{**vars(reading), "used": reading.used | words, "unused": unused})


def assert_all_readers_agree(path: Path, *, own: bool) -> None:
    """`own`: whether the file's faults, if it has any, show without a model."""
    engine = said(path, lambda: by_engine(path, narrow.key_map()))
    tools = said(path, lambda: by_tools(path, narrow.key_map()))
    assert tools == (engine if engine.error else with_words_carried(engine, path))
    alone = said(path, lambda: by_inspect(path))
    assert said(path, lambda: by_tools(path, None)) == (
        alone if alone.error else with_words_carried(alone, path)
    )
    if own:
        assert alone == engine
    fit = said(path, lambda: fit_of(path))
    if engine.error and fit.error != alone.error:
        assert fit.error == engine.error[1]
    elif not engine.error:
        assert (fit.used, fit.unused, fit.error) == (len(engine.used), engine.unused, None)
    reason = reason_of_library(path)
    if engine.error:
        assert reason == engine.error[1]
    elif engine.unused:
        key, why = next(iter(engine.unused.items()))
        count = len(engine.unused)
        total = count + len(engine.used)
        assert reason == f"{count} of {total} tensors cannot be used ({key}: {why})"
    else:
        assert reason is None


@pytest.mark.parametrize("name", FILES)
def test_a_fault_that_shows_without_a_model_is_the_same_to_all_readers(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / "a.safetensors", {k: t.contiguous() for k, t in FILES[name].items()})
    assert_all_readers_agree(path, own=True)


@pytest.mark.parametrize("name", FOR_ANOTHER_MODEL)
def test_what_a_model_has_no_place_for_is_the_same_to_all_readers(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / "a.safetensors", dict(FOR_ANOTHER_MODEL[name]))
    assert_all_readers_agree(path, own=False)


@pytest.mark.parametrize(("name", "naming"), NAMINGS)
def test_an_algorithm_is_read_alike_in_every_layout(
    tmp_path: Path, name: str, naming: Naming | None
) -> None:
    (tmp_path / "loras").mkdir()
    path = in_naming(tmp_path, name, naming)
    if path is None:
        return
    path = path.rename(tmp_path / "loras" / path.name)
    assert_all_readers_agree(path, own=True)
    assert by_engine(path, narrow.key_map()).unused == {}


# --- a LoRA with whole numbers, which resize once cut in silence -------------------------------------


@pytest.fixture
def int8(tmp_path: Path) -> Path:
    tensors = {key: tensor.contiguous() for key, tensor in FILES["int8 alone"].items()}
    return write(tmp_path / "int8.safetensors", tensors)


def resize_it(path: Path) -> None:
    resize(path, path.with_name("out"), ResizeOptions(RankPolicy(rank=1)))


def convert_it(path: Path) -> None:
    convert(path, path.with_name("out"), ConvertOptions(WriteOptions(dtype=torch.float16)))


def combine_it(path: Path) -> None:
    other = write(path.with_name("other.safetensors"), tensors_of("lora"))
    combine([LoraUse(path), LoraUse(other)], path.with_name("out"), CombineOptions())


def read_back(path: Path) -> None:
    """What an extraction does to the file that it has streamed."""
    options = ExtractOptions(RankPolicy(rank=1), naming=Naming.DIFFUSERS)
    source = cast(Checkpoint, SimpleNamespace(key_map=narrow.key_map))
    _Output(path.with_name("out"), path, options).convert(source)


@pytest.mark.parametrize("tool", [resize_it, convert_it, combine_it, read_back])
def test_a_lora_of_whole_numbers_is_refused_by_every_tool_as_by_the_engine(
    int8: Path, tool: Callable[[Path], None]
) -> None:
    with pytest.raises(LoraUnsupported) as caught:
        load(int8, narrow.key_map(), "x")
    with pytest.raises(LoraUnsupported) as refused:
        tool(int8)
    assert refused.value.sentence.removeprefix(f"{int8}: ") == caught.value.sentence
    assert "is int8, not a floating point number" in caught.value.sentence
    assert not int8.with_name("out").exists()


def test_a_layer_of_whole_numbers_is_not_cut_in_silence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", dict(FILES["int8"]))
    with pytest.raises(ToolError) as caught:
        resize_it(path)
    assert "is int8, not a floating point number" in caught.value.sentence
    assert not (tmp_path / "out").exists()


def test_a_config_of_another_component_than_the_names_tell_still_scales(tmp_path: Path) -> None:
    """Of a model that is not known, diffusers' names and its config call the component alike."""
    stem = "transformer.blocks.0.to_q"
    tensors = {f"{stem}.lora_A.weight": randn(4, 8), f"{stem}.lora_B.weight": randn(8, 4)}
    config: dict[str, Any] = {"transformer.r": 4, "transformer.lora_alpha": 8}
    about = {"lora_adapter_metadata": json.dumps(config)}
    path = write(tmp_path / "a.safetensors", tensors, about)
    (part,) = read_adapter(path).parts
    assert part.alpha == 8.0
    scaling = describe(path).components["transformer"].scaling
    assert scaling is not None
    assert scaling.usual == 2.0
