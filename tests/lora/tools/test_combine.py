"""Combined adapters against the engine applying each of them, and against slow formulas."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Mode
from lora.errors import ToolError
from lora.formats.adapter import load
from lora.formats.header import read_header
from lora.formats.names.naming import Naming
from lora.tools.adapters.reading import read_adapter
from lora.tools.adapters.saving import WriteOptions, write_adapter
from lora.tools.combine import CombineOptions, Method, combine, dare, ties
from lora.tools.factors.ranks import RankPolicy
from lora.tools.models.checkpoints import Checkpoint
from tests.adapters import randn, write
from tests.conftest import ROOT
from tests.lora.small import small, tensors_of
from tests.lora.tools import narrow
from tests.lora.tools.narrow import CONV, CROSS, SELF

LORAS = ROOT / "demo" / "loras"


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal to float32's 1e-6, relative to the largest number of a tensor."""
    return one.keys() == other.keys() and all(
        float((one[name] - other[name]).abs().max()) <= 1e-6 * float(other[name].abs().max())
        for name in one
    )


@pytest.mark.parametrize("scales", [(0.8, 0.5), (1.0, -0.7), (0.0, 1.3)])
def test_concatenation_equals_applying_both(tmp_path: Path, scales: tuple[float, float]) -> None:
    engine = LoraEngine({"unet": small()})
    root = engine.module(next(t for t in engine.key_map.targets if t.path == "linear"))
    assert root is not None
    kinds = ("lora", "locon", "tucker", "full")
    for one, other in itertools.product(kinds, kinds):
        paths = [tmp_path / f"{kind}-{i}.safetensors" for i, kind in enumerate((one, other))]
        for seed, (kind, path) in enumerate(zip((one, other), paths, strict=True)):
            tensors = tensors_of(kind, seed)
            stems = {key.rsplit(".lora_", 1)[0] for key in tensors if ".lora_" in key}
            write(path, tensors | {f"{stem}.alpha": torch.tensor(1.0 + seed) for stem in stems})
        sources = [LoraUse(path, scale) for path, scale in zip(paths, scales, strict=True)]
        output = tmp_path / f"{one}-{other}.safetensors"
        combine(sources, output, CombineOptions(), engine.key_map)
        files = [load(path, engine.key_map, str(path)) for path in (*paths, output)]
        assert files[2].unused == ()
        twin = small()
        both = LoraEngine({"unet": twin})
        found = []
        uses = [LoraUse(f, s) for f, s in zip(files[:2], scales, strict=True)]
        for stack in (uses, [LoraUse(files[2])]):
            with both.applied(stack, Mode.MERGED):
                found.append({n: p.detach().clone() for n, p in twin.named_parameters()})
        assert close(found[1], found[0]), (one, other)


@pytest.mark.parametrize("names", [("stripes", "outline"), ("stripes", "spiral")])
def test_the_demos_adapters_combined_are_both(tmp_path: Path, names: tuple[str, str]) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = ROOT / "demo" / "model"
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet").float(),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder").float(),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(
            folder / "text_encoder_2"
        ).float(),
    }
    engine = LoraEngine(parts)
    paths = [LORAS / f"demo-{name}.safetensors" for name in names]
    output = tmp_path / "both.safetensors"
    with Checkpoint.open(folder) as model:
        sources = [LoraUse(paths[0], 0.8), LoraUse(paths[1], 0.5)]
        report = combine(sources, output, CombineOptions(), model.key_map())
    assert report.changes == ()
    files = [load(path, engine.key_map, str(path)) for path in (*paths, output)]
    assert files[2].unused == ()
    found = []
    for stack in ([LoraUse(files[0], 0.8), LoraUse(files[1], 0.5)], [LoraUse(files[2])]):
        with engine.applied(stack, Mode.MERGED):
            found.append(
                {
                    f"{name}.{path}": parameter.detach().clone()
                    for name, root in parts.items()
                    for path, parameter in root.named_parameters()
                }
            )
    assert close(found[1], found[0])


def test_modules_that_one_file_has_alone_are_there_too(tmp_path: Path) -> None:
    sources = [
        LoraUse(narrow.source(tmp_path, "lora", torch.float32), 0.5),
        LoraUse(narrow.source(tmp_path, "lora_text", torch.float32, 1), 2.0),
    ]
    output = tmp_path / "out.safetensors"
    report = combine(sources, output, CombineOptions(), narrow.key_map())
    assert report.modules == 7
    stack = [LoraUse(narrow.read(s.lora), s.scale) for s in sources]
    assert close(narrow.merged(LoraUse(narrow.read(output))), narrow.merged(*stack))
    written = read_header(output)
    assert written.tensors[f"{SELF}.lora_down.weight"].shape == (8, 64)
    assert written.metadata["ss_network_dim"] == "Dynamic"
    assert written.metadata["merged_from"] == "lora-0.safetensors:0.5, lora_text-1.safetensors:2"


def test_files_of_an_unknown_model_combine_under_their_own_names(tmp_path: Path) -> None:
    sources = [
        LoraUse(narrow.source(tmp_path, "lora", torch.float32), 0.5),
        LoraUse(narrow.source(tmp_path, "lora_text", torch.float32, 1), 2.0),
    ]
    combine(sources, tmp_path / "known", CombineOptions(), narrow.key_map())
    combine(sources, tmp_path / "own", CombineOptions())
    known, own = load_file(tmp_path / "known"), load_file(tmp_path / "own")
    assert known.keys() - own.keys() <= {key for key in known if key.endswith(".alpha")}
    assert all(torch.equal(known[key], own[key]) for key in own)


def test_different_namings_combine_where_the_model_is_known(tmp_path: Path) -> None:
    adapter = read_adapter(narrow.source(tmp_path, "lora", torch.float32, 1), narrow.key_map())
    write_adapter(tmp_path / "other.safetensors", adapter, WriteOptions(Naming.DIFFUSERS))
    first = narrow.source(tmp_path, "lora", torch.float32)
    sources = [LoraUse(first), LoraUse(tmp_path / "other.safetensors")]
    with pytest.raises(ToolError) as caught:
        combine(sources, tmp_path / "out", CombineOptions())
    assert "--model" in str(caught.value)
    combine(sources, tmp_path / "out", CombineOptions(), narrow.key_map())
    stack = [LoraUse(narrow.read(source.lora)) for source in sources]
    assert close(narrow.merged(LoraUse(narrow.read(tmp_path / "out"))), narrow.merged(*stack))


def test_the_bias_of_lora_b_becomes_a_difference(tmp_path: Path) -> None:
    config = json.dumps({"unet.r": 4, "unet.lora_alpha": 6})  # scaling 1.5
    metadata = {"lora_adapter_metadata": config}
    path = write(
        tmp_path / "a.safetensors", narrow.tensors_of("lora_bias", torch.float32), metadata
    )
    sources = [
        LoraUse(path, 0.5),
        LoraUse(narrow.source(tmp_path, "lora_bias", torch.float32, 1), 2),
    ]
    options = CombineOptions(write=WriteOptions(Naming.KOHYA))
    combine(sources, tmp_path / "out", options, narrow.key_map())
    assert f"{CONV}.diff_b" in read_header(tmp_path / "out").tensors
    stack = [LoraUse(narrow.read(s.lora), s.scale) for s in sources]
    assert close(narrow.merged(LoraUse(narrow.read(tmp_path / "out"))), narrow.merged(*stack))


@pytest.mark.parametrize("name", ["loha", "lokr", "dora", "oft", "ia3", "set_weight"])
def test_what_does_not_add_up_is_refused(tmp_path: Path, name: str) -> None:
    sources = [
        LoraUse(narrow.source(tmp_path, "lora")),
        LoraUse(narrow.source(tmp_path, name)),
    ]
    with pytest.raises(ToolError) as caught:
        combine(sources, tmp_path / "out", CombineOptions(), narrow.key_map())
    assert "--algorithm lora" in str(caught.value)
    assert not (tmp_path / "out").exists()


def product(tensors: dict[str, Tensor], stem: str) -> Tensor:
    up = tensors[f"{stem}.lora_up.weight"].double().flatten(1)
    down = tensors[f"{stem}.lora_down.weight"].double().flatten(1)
    alpha = float(tensors.get(f"{stem}.alpha", torch.tensor(float(len(down)))))
    return alpha / len(down) * up @ down


def two(tmp_path: Path) -> list[LoraUse]:
    return [
        LoraUse(narrow.source(tmp_path, "lora", torch.float32), 0.8),
        LoraUse(narrow.source(tmp_path, "lora", torch.float32, 1), -0.5),
    ]


def test_a_chosen_rank_gives_the_nearest_of_that_rank(tmp_path: Path) -> None:
    sources = two(tmp_path)
    options = CombineOptions(policy=RankPolicy(rank=3))
    report = combine(sources, tmp_path / "out", options, narrow.key_map())
    before = [load_file(source.lora) for source in sources]
    after = load_file(tmp_path / "out")
    told = {change.name.removeprefix("unet."): change for change in report.changes}
    for stem in (SELF, CROSS, CONV):
        whole = sum(s.scale * product(b, stem) for s, b in zip(sources, before, strict=True))
        assert isinstance(whole, Tensor)
        error = (product(after, stem) - whole).norm()
        assert error <= torch.linalg.svdvals(whole)[3:].norm() * (1 + 1e-5)
        target = narrow.key_map().find(stem)
        assert target is not None
        change = told[target.path]
        assert change.relative_error == pytest.approx(float(error / whole.norm()), rel=1e-5)
        assert change.rank == 3


def slow_ties(tensors: list[Tensor], density: float) -> Tensor:
    """The paper's three steps, number by number."""
    lists = [tensor.flatten().tolist() for tensor in tensors]
    trimmed = []
    for values in lists:
        kept = sorted(values, key=abs, reverse=True)[: -(-int(density * 100 * len(values)) // 100)]
        least = abs(kept[-1])
        trimmed.append([value if abs(value) >= least else 0.0 for value in values])
    merged = []
    for values in zip(*trimmed, strict=True):
        sign = 1 if sum(values) > 0 else -1 if sum(values) < 0 else 0
        agreeing = [value for value in values if value * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged).reshape(tensors[0].shape)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_is_the_papers(density: float) -> None:
    tensors = [randn(10, 20, seed=seed) * (1 + seed) for seed in range(3)]
    assert torch.allclose(ties(tensors, density), slow_ties(tensors, density), atol=1e-6)


def test_ties_of_one_change_is_its_largest_numbers() -> None:
    tensor = torch.tensor([[4.0, -3.0], [2.0, -1.0]])
    assert torch.equal(ties([tensor], 0.5), torch.tensor([[4.0, -3.0], [0.0, 0.0]]))
    opposed = ties([tensor, -tensor], 1.0)
    assert torch.equal(opposed, torch.zeros(2, 2))


def test_dare_drops_and_rescales_and_keeps_the_mean() -> None:
    tensor = torch.ones(400, 500)
    found = dare([tensor], 0.25, seed=3)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(found, dare([tensor], 0.25, seed=3))
    assert not torch.equal(found, dare([tensor], 0.25, seed=4))
    apart = dare([tensor, tensor * 10], 0.5, seed=3)
    assert set(apart.unique().tolist()) == {0.0, 2.0, 20.0, 22.0}


def test_dare_with_everything_kept_is_the_sum() -> None:
    tensors = [randn(5, 6), randn(5, 6, seed=1)]
    assert torch.allclose(dare(tensors, 1.0, seed=0), tensors[0] + tensors[1])


@pytest.mark.parametrize("method", [Method.TIES, Method.DARE])
def test_a_files_layers_are_merged_by_the_method(tmp_path: Path, method: Method) -> None:
    sources = two(tmp_path)
    options = CombineOptions(method, RankPolicy(rank=96), density=0.3, seed=5)
    report = combine(sources, tmp_path / "out", options, narrow.key_map())
    before = [load_file(source.lora) for source in sources]
    after = load_file(tmp_path / "out")
    changes = [s.scale * product(b, SELF).float() for s, b in zip(sources, before, strict=True)]
    found = product(after, SELF)
    if method is Method.TIES:
        assert torch.allclose(found.float(), slow_ties(changes, 0.3), atol=1e-5)
    else:
        rescaled = [change / 0.3 for change in changes]
        options_of = torch.stack(
            [torch.zeros_like(rescaled[0]), *rescaled, rescaled[0] + rescaled[1]]
        )
        nearest = (options_of - found.float()).abs().amin(0)
        assert float(nearest.max()) < 1e-5
    combine(sources, tmp_path / "again", options, narrow.key_map())
    assert (tmp_path / "out").read_bytes() == (tmp_path / "again").read_bytes()
    assert report.relative_error < 1e-5


def test_ties_at_a_small_rank_tells_its_error(tmp_path: Path) -> None:
    sources = two(tmp_path)
    options = CombineOptions(Method.TIES, RankPolicy(rank=2), density=0.3)
    report = combine(sources, tmp_path / "out", options, narrow.key_map())
    before = [load_file(source.lora) for source in sources]
    changes = [s.scale * product(b, SELF).float() for s, b in zip(sources, before, strict=True)]
    whole = slow_ties(changes, 0.3).double()
    error = (product(load_file(tmp_path / "out"), SELF) - whole).norm()
    target = narrow.key_map().find(SELF)
    (told,) = [change for change in report.changes if change.name == str(target)]
    assert told.relative_error == pytest.approx(float(error / whole.norm()), rel=1e-4)
    assert error <= 1.01 * torch.linalg.svdvals(whole)[2:].norm()


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    for make in (
        lambda: CombineOptions(Method.TIES),
        lambda: CombineOptions(density=0.0),
        lambda: combine([LoraUse(tmp_path)], tmp_path / "out"),
        lambda: combine([LoraUse(tmp_path, float("nan"))] * 2, tmp_path / "out"),
        lambda: combine([LoraUse(tmp_path, end=0.5)] * 2, tmp_path / "out"),
        lambda: combine([LoraUse(tmp_path, blocks={"MID": 0})] * 2, tmp_path / "out"),
    ):
        with pytest.raises(ToolError):
            make()


def test_layers_of_other_shapes_are_refused(tmp_path: Path) -> None:
    wide = {f"{SELF}.lora_up.weight": randn(128, 2), f"{SELF}.lora_down.weight": randn(2, 64)}
    sources = [
        LoraUse(narrow.source(tmp_path, "lora")),
        LoraUse(write(tmp_path / "wide.safetensors", wide)),
    ]
    with pytest.raises(ToolError) as caught:
        combine(sources, tmp_path / "out", CombineOptions())
    assert "differ in shape" in str(caught.value)


def test_words_are_carried_and_must_agree(tmp_path: Path) -> None:
    word = {"bundle_emb.cat.clip_l": randn(2, 32)}
    lora = narrow.tensors_of("lora_text")
    one = write(tmp_path / "one.safetensors", lora | word)
    other = write(tmp_path / "other.safetensors", lora)
    combine([LoraUse(one), LoraUse(other)], tmp_path / "out", CombineOptions())
    assert torch.equal(load_file(tmp_path / "out")["bundle_emb.cat.clip_l"], word.popitem()[1])
    changed = write(tmp_path / "changed.safetensors", lora | {"bundle_emb.cat.clip_l": randn(2, 8)})
    with pytest.raises(ToolError) as caught:
        combine([LoraUse(one), LoraUse(changed)], tmp_path / "out2", CombineOptions())
    assert "and they differ" in str(caught.value)


def test_a_budget_for_the_whole_file_is_kept(tmp_path: Path) -> None:
    sources = two(tmp_path)
    for method in Method:
        options = CombineOptions(method, RankPolicy(max_bytes=15_000))
        output = tmp_path / f"{method}"
        combine(sources, output, options, narrow.key_map())
        assert 7_000 < output.stat().st_size <= 15_000


def test_an_input_is_not_written_over(tmp_path: Path) -> None:
    sources = two(tmp_path)
    before = sources[1].lora.read_bytes()
    with pytest.raises(ToolError) as caught:
        combine(sources, sources[1].lora, CombineOptions())
    assert "exists already" in str(caught.value)
    assert sources[1].lora.read_bytes() == before
