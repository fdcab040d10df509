"""Embeddings inside adapter files: which words they are, and what is reported."""

from pathlib import Path

import pytest
import torch

from lora.engine.engine import LoraEngine
from lora.errors import LoraIncompatible, LoraUnsupported
from lora.fetch.sources import Reference
from lora.formats.adapter import load
from lora.formats.embeddings import word_of
from lora.formats.pickles import convert
from lora.volume.cache import VolumeCache
from lora.volume.loader import LoraLibrary
from tests.adapters import kohya, randn, write


@pytest.fixture
def engine() -> LoraEngine:
    """Text encoders of two widths, and a layer that LoRAs of the tests fit."""
    embeddings = {
        width: torch.nn.ModuleDict({"token_embedding": torch.nn.Embedding(50, width)})
        for width in (8, 12)
    }
    unet = torch.nn.Sequential(torch.nn.Linear(4, 4))
    first = torch.nn.ModuleDict({"embeddings": embeddings[8]})
    second = torch.nn.ModuleDict(
        {"text_model": torch.nn.ModuleDict({"embeddings": embeddings[12]})}
    )
    return LoraEngine({"unet": unet, "text_encoder": first, "text_encoder_2": second})


def test_bundled_words_belong_to_their_encoders(engine: LoraEngine, tmp_path: Path) -> None:
    tensors = {
        "unet.0.lora_A.weight": randn(2, 4),
        "unet.0.lora_B.weight": randn(4, 2),
        "bundle_emb.<my cat>.clip_l": randn(3, 8),
        "bundle_emb.<my cat>.clip_g": randn(2, 12),
        "bundle_emb.a.b.string_to_param.*": randn(1, 8),
        "bundle_emb.<my cat>.clip_g_out": randn(2, 12),
        "bundle_emb.x.clip_l": randn(3, 9),
        "bundle_emb..clip_l": randn(3, 8),
    }
    file = load(write(tmp_path / "a.safetensors", tensors), engine.key_map, "x")
    assert {(e.word, e.component, tuple(e.vectors.shape)) for e in file.embeddings} == {
        ("<my cat>", "text_encoder", (3, 8)),
        ("<my cat>", "text_encoder_2", (2, 12)),
        ("a.b", "text_encoder", (1, 8)),
    }
    assert file.keys == 5
    assert file.algorithms == ("textual inversion", "lora")
    reasons = {u.key: u.reason for u in file.unused}
    assert "behind the text encoder" in reasons["bundle_emb.<my cat>.clip_g_out"]
    assert "which reads 8 values per token" in reasons["bundle_emb.x.clip_l"]
    assert "which word" in reasons["bundle_emb..clip_l"]
    assert file.keys + len(file.unused) == len(tensors)


def test_a_file_of_embeddings_is_called_by_its_name(engine: LoraEngine, tmp_path: Path) -> None:
    cache = VolumeCache(tmp_path)
    cache.shelf.prepare()
    tensors = {"clip_l": randn(2, 8), "clip_g": randn(2, 12)}
    write(tmp_path / "my-style.safetensors", tensors)
    write(tmp_path / "twin-0123456789abcdef.safetensors", tensors)
    library = LoraLibrary(cache, engine.key_map)
    first, twin = (library.load(Reference(n)) for n in ("my-style", "twin-0123456789abcdef"))
    assert {word.word for word in first.embeddings} == {"my-style"}
    assert {word.word for word in twin.embeddings} == {"twin"}
    assert first.file is twin.file
    assert (first.file.layers, first.file.rank, first.file.keys) == ((), None, 2)


def test_an_encoder_that_is_not_there_is_told(unet: torch.nn.Module, tmp_path: Path) -> None:
    engine = LoraEngine({"unet": unet})
    file = load(
        write(tmp_path / "a.safetensors", kohya() | {"bundle_emb.cat.clip_g": randn(1, 12)}),
        engine.key_map,
        "x",
    )
    assert [u.reason for u in file.unused] == ["this model has no text_encoder_2"]
    with pytest.raises(LoraIncompatible) as caught:
        load(write(tmp_path / "b.safetensors", {"clip_g": randn(1, 12)}), engine.key_map, "x")
    assert "none of its 1 tensors fits this model" in str(caught.value)


@pytest.mark.parametrize(
    ("stem", "word"),
    [
        ("cat", "cat"),
        ("my-cat", "my-cat"),
        ("cat-0123456789abcdef", "cat"),
        ("cat-0123456789ABCDEF", "cat-0123456789ABCDEF"),
        ("0123456789abcdef", "0123456789abcdef"),
    ],
)
def test_the_caches_own_ending_is_not_part_of_the_word(stem: str, word: str) -> None:
    assert word_of(stem) == word


@pytest.mark.parametrize(("width", "name"), [(8, "text_encoder"), (12, "text_encoder_2")])
@pytest.mark.parametrize("rows", [(), (1,), (3,)])
def test_diffusers_learned_embeds_are_for_the_encoder_of_their_width(
    engine: LoraEngine, tmp_path: Path, width: int, name: str, rows: tuple[int, ...]
) -> None:
    vectors = randn(*rows, width)
    file = load(write(tmp_path / "a.safetensors", {"<cat-toy>": vectors}), engine.key_map, "x")
    (word,) = file.embeddings
    assert (word.word, word.component) == ("<cat-toy>", name)
    assert torch.equal(word.vectors, vectors.reshape(-1, width))
    with pytest.raises(LoraUnsupported) as caught:
        load(write(tmp_path / "a.safetensors", {"<cat>": randn(9)}), engine.key_map, "x")
    assert "<cat>" in caught.value.sentence


@pytest.mark.parametrize(
    "word", ["cat-toy", "my style", "v1.5", "cat", "*", "text_encoder", "café", "lora_unet_x"]
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_diffusers_takes_any_key_for_a_word(
    engine: LoraEngine, tmp_path: Path, word: str, form: str
) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    if form == "bin":
        torch.save({word: randn(12)}, tmp_path / "learned_embeds.bin")
        convert(tmp_path / "learned_embeds.bin", path, 1_000_000)
    else:
        write(path, {word: randn(12)})
    file = load(path, engine.key_map, "x")
    (one,) = file.embeddings
    assert (one.word, one.component, file.unused) == (word, "text_encoder_2", ())


def test_several_words_may_be_in_one_file(engine: LoraEngine, tmp_path: Path) -> None:
    tensors = {"cat": randn(8), "dog": randn(2, 12), "<s0>": randn(1, 8)}
    file = load(write(tmp_path / "a.safetensors", tensors), engine.key_map, "x")
    assert {one.word for one in file.embeddings} == tensors.keys()
    assert file.keys == 3


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.a.vera_lambda_b",
        "a.b.c",
        "conv.weight",
        "a.hada_w3",
        " ",
        "x" * 200,
    ],
)
def test_a_layers_tensor_is_no_word(engine: LoraEngine, tmp_path: Path, key: str) -> None:
    others = {"a.lora_B.weight": randn(8, 2)} if key == "a.hada_w3" else {}
    with pytest.raises((LoraUnsupported, LoraIncompatible)):
        load(write(tmp_path / "a.safetensors", {key: randn(8), **others}), engine.key_map, "x")


def test_a_word_beside_layers_must_have_a_form(engine: LoraEngine, tmp_path: Path) -> None:
    tensors = {"unet.0.lora_A.weight": randn(2, 4), "unet.0.lora_B.weight": randn(4, 2)}
    tensors |= {"cat": randn(8), "<dog>": randn(8)}
    file = load(write(tmp_path / "a.safetensors", tensors), engine.key_map, "x")
    assert [one.word for one in file.embeddings] == ["<dog>"]
    assert [one.key for one in file.unused] == ["cat"]


def test_a1111s_embedding_is_converted_and_read(engine: LoraEngine, tmp_path: Path) -> None:
    vectors = randn(2, 8)
    own = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "within"}
    own |= {"step": 500, "sd_checkpoint": "abc", "sd_checkpoint_name": "v1-5"}
    torch.save(own, tmp_path / "cat.pt")
    convert(tmp_path / "cat.pt", tmp_path / "cat.safetensors", 1_000_000)
    file = load(tmp_path / "cat.safetensors", engine.key_map, "x")
    (word,) = file.embeddings
    assert (word.word, word.component, file.unused) == ("", "text_encoder", ())
    assert torch.equal(word.vectors, vectors)
    assert file.metadata["step"] == "500"
