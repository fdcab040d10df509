"""New words of a prompt: what the encoders give equals a slow computation, and nothing of it stays."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from tokenizers import AddedToken
from torch import Tensor, nn

from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Mode
from lora.errors import LoraIncompatible
from lora.formats.adapter import load
from lora.formats.embeddings import TokenEmbedding
from pipelines import prompts
from pipelines.chunks import Reader, chunked
from pipelines.image import ImagePipeline, Timings
from pipelines.loading import LoadedModels, load_models
from pipelines.routes import choose_route
from pipelines.tokens import WordTokenizer, added_tokens
from settings import Settings
from tests.adapters import randn, write
from tests.pipelines.test_image import PROMPT, request, tiny_refiner

ENCODERS = ("text_encoder", "text_encoder_2")
Q_PROJ = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", params=["eos as in the tokenizer", "eos 2, as in SDXL"])
def models(request: pytest.FixtureRequest) -> LoadedModels:
    """The demo model with both conventions for where the pooled output is."""
    models = load_models(Settings(model="demo", device="cpu"))
    if request.param.startswith("eos 2"):
        models.base.text_encoder_2.config.eos_token_id = 2
        models.base.text_encoder_2.text_model.eos_token_id = 2
    assert models.base.tokenizer_2.eos_token_id == len(models.base.tokenizer_2) - 1 != 2
    return models


@pytest.fixture(scope="module")
def refined(models: LoadedModels) -> LoadedModels:
    return replace(models, refiner=tiny_refiner(models.base))


def vectors(base: StableDiffusionXLPipeline, component: str, count: int, seed: int) -> Tensor:
    """As large as the table's own, so that they matter."""
    table = getattr(base, component).get_input_embeddings().weight
    return randn(count, table.shape[1], seed=seed) * table.std()


def word(
    base: StableDiffusionXLPipeline, name: str, first: int = 1, second: int = 1, seed: int = 0
) -> list[TokenEmbedding]:
    """A word of `first` vectors for the first text encoder and `second` for the second."""
    counts = zip(ENCODERS, (first, second), strict=True)
    return [
        TokenEmbedding(name, component, vectors(base, component, count, seed + i))
        for i, (component, count) in enumerate(counts)
        if count
    ]


# --- the slow computation -------------------------------------------------------------------------


def slow_ids(tokenizer: Any, prompt: str, counts: Mapping[str, int], most: int = 75) -> list[int]:
    """By a copy of the tokenizer that has the words, one token each, which are then written out."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens(
        [
            AddedToken(name, normalized=False, special=False, single_word=name.isalnum())
            for name in counts
        ]
    )
    written: dict[int, list[int]] = {}
    following = len(tokenizer)
    for name, count in counts.items():
        written[own.convert_tokens_to_ids(name)] = list(range(following, following + count))
        following += count
    ids = own(prompt, add_special_tokens=False).input_ids
    ids = [new for one in ids for new in written.get(one, [one])][:most]
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (77 - len(ids))


@torch.no_grad()
def slow(
    base: StableDiffusionXLPipeline,
    prompt: str,
    embeddings: Sequence[TokenEmbedding],
    deltas: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states and pooled output by copies of the encoders with larger tables."""
    hidden = []
    for component, name in zip(ENCODERS, ("tokenizer", "tokenizer_2"), strict=True):
        own = {one.word: one.vectors for one in embeddings if one.component == component}
        encoder, tokenizer = copy.deepcopy(getattr(base, component)), getattr(base, name)
        table = encoder.get_input_embeddings().weight
        weight = torch.cat([table, *own.values()])
        encoder.set_input_embeddings(nn.Embedding.from_pretrained(weight))
        text = getattr(encoder, "text_model", encoder)
        if deltas:
            text.get_submodule(Q_PROJ).weight += deltas[component]
        ids = slow_ids(tokenizer, prompt, {one: len(own[one]) for one in own})
        out = encoder(torch.tensor([ids]), output_hidden_states=True)
        hidden.append(out.hidden_states[-2])
        end = ids.index(tokenizer.eos_token_id)
    pooled = encoder.text_projection(text.final_layer_norm(out.hidden_states[-1][:, end]))
    return torch.cat(hidden, dim=-1), pooled


def encode(pipeline: Any, prompt: str, negative: str | None = None) -> list[Tensor]:
    """Hidden states, negative ones, pooled output, negative one."""
    return [one for one in prompts.encode(pipeline, prompt, negative) if one is not None]


CASES: dict[str, tuple[str, list[tuple[str, int, int]]]] = {
    "one vector": ("a big <dog> circle", [("<dog>", 1, 1)]),
    "several vectors": ("a big <dog> circle", [("<dog>", 3, 3)]),
    "another count for each encoder": ("a big <dog> circle", [("<dog>", 2, 4)]),
    "one encoder only": ("a big <dog> circle", [("<dog>", 0, 2)]),
    "two words, one twice": ("<s0><s1> red, <s0>", [("<s0>", 1, 1), ("<s1>", 2, 2)]),
    "at both ends": ("<dog> circle <dog>", [("<dog>", 2, 2)]),
    "nothing else": ("<dog>", [("<dog>", 1, 1)]),
    "signs and commas around": ("{myDog-1.2},myDog's", [("myDog", 2, 2)]),
    "the longest of two": ("dog10 dog1", [("dog1", 1, 1), ("dog10", 2, 2)]),
    "letters of a pattern": ("a.b a+b axb", [("a.b", 1, 1), ("a+b", 1, 1)]),
    "made of signs": ("a big [V] circle", [("[V]", 2, 2)]),
}


@pytest.mark.parametrize(("prompt", "asked"), CASES.values(), ids=CASES.keys())
def test_encoders_read_the_vectors_where_the_prompt_says_the_word(
    models: LoadedModels, prompt: str, asked: list[tuple[str, int, int]]
) -> None:
    base = models.base
    embeddings = [e for i, one in enumerate(asked) for e in word(base, *one, seed=10 * i)]
    hidden, pooled = slow(base, prompt, embeddings)
    plain = encode(base, prompt)
    with ImagePipeline(models).tokens(embeddings) as warnings:
        found = encode(base, prompt)
    assert not warnings
    torch.testing.assert_close(found[0], hidden, rtol=0, atol=0)
    torch.testing.assert_close(found[2], pooled, rtol=0, atol=1e-6)
    assert not torch.equal(found[0], plain[0])
    assert not torch.equal(found[2], plain[2])


def test_negative_prompts_say_the_word_too(models: LoadedModels) -> None:
    base = models.base
    embeddings = word(base, "ugly", 3, 3)
    hidden, pooled = slow(base, "green, ugly", embeddings)
    with ImagePipeline(models).tokens(embeddings):
        found = encode(base, "a red circle", "green, ugly")
    for one, plain in zip(found[::2], encode(base, "a red circle")[::2], strict=True):
        assert torch.equal(one, plain)
    torch.testing.assert_close(found[1], hidden, rtol=0, atol=0)
    torch.testing.assert_close(found[3], pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prompt", [PROMPT, "", "DOG, dog!", "(red:1.2) circle " * 60])
def test_a_prompt_without_the_word_gives_the_same_bits(models: LoadedModels, prompt: str) -> None:
    plain = encode(models.base, prompt, "green")
    with ImagePipeline(models).tokens(word(models.base, "Dog", 2, 2)):
        found = encode(models.base, prompt, "green")
    assert all(torch.equal(*pair) for pair in zip(plain, found, strict=True))


def test_vectors_follow_the_precision_of_the_table(models: LoadedModels) -> None:
    base = models.base
    embeddings = word(base, "dog", 2, 2)
    halves = [replace(one, vectors=one.vectors.bfloat16()) for one in embeddings]
    half = copy.copy(base)
    for name in ENCODERS:
        half.register_modules(**{name: copy.deepcopy(getattr(base, name)).bfloat16()})
    hidden, pooled = slow(half, "a red dog", halves)
    with added_tokens([half], embeddings):
        found = encode(half, "a red dog")
    assert found[0].dtype is torch.bfloat16
    assert torch.equal(found[0], hidden)
    torch.testing.assert_close(found[2], pooled, rtol=1e-2, atol=1e-2)


def test_an_encoder_whose_end_is_the_id_0_still_finds_it(models: LoadedModels) -> None:
    base = copy.copy(models.base)
    encoder = copy.deepcopy(base.text_encoder_2)
    encoder.config.eos_token_id = encoder.text_model.eos_token_id = 0
    base.register_modules(text_encoder_2=encoder)
    first = word(base, "dog", 0, 1)
    ids = torch.tensor([[5, 603, 7, 0, 9]])
    with added_tokens([base], first), torch.no_grad():
        out = encoder(input_ids=ids, output_hidden_states=True)
        hidden = encoder.text_model.final_layer_norm(out.hidden_states[-1][:, 3])
        torch.testing.assert_close(out.text_embeds, encoder.text_projection(hidden))


# --- the tokenizer --------------------------------------------------------------------------------


def test_ids_are_those_of_a_tokenizer_with_the_words_added(models: LoadedModels) -> None:
    counts = {"<s0>": 1, "<s1>": 3, "Red": 2, "sx": 1}
    pieces = [
        *counts,
        "a red circle",
        " ",
        "",
        "'s",
        "  ",
        "é",
        "1.5",
        "(",
        ")",
        ",",
        "\n",
        "x" * 40,
    ]
    choices = np.random.default_rng(0)
    for tokenizer in (models.base.tokenizer, models.base.tokenizer_2):
        ids, following = {}, len(tokenizer)
        for name, count in counts.items():
            ids[name] = range(following, following := following + count)
        ours = Reader(WordTokenizer(tokenizer, ids), models.base.text_encoder)
        for _ in range(100):
            prompt = "".join(choices.choice(pieces, size=choices.integers(0, 30)))
            prompt = re.sub(r"([()])", r"\\\1", prompt)
            words = [word for chunk in chunked(prompt, [ours]).chunks for word in chunk.words]
            found = [number for word in words for number in word.ids[0]]
            plain = slow_ids(tokenizer, prompt.replace("\\", ""), counts, 1000)
            assert found == plain[1 : plain.index(tokenizer.eos_token_id)], prompt


# --- nothing stays --------------------------------------------------------------------------------


class Snapshot:
    """All attributes of some pipelines and their modules, which must be the same objects later."""

    def __init__(self, *pipelines: Any) -> None:
        for one in pipelines:
            encode(one, PROMPT)  # transformers writes attributes the first time
        modules = [
            module for one in pipelines for name in ENCODERS for module in self.tree(one, name)
        ]
        self.pipelines = pipelines
        self.attributes = [(owner, dict(vars(owner))) for owner in (*pipelines, *modules)]
        self.tensors = [
            (tensor, tensor.detach().clone())
            for module in modules
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        ]
        self.texts = self.describe()

    @staticmethod
    def tree(pipeline: Any, name: str) -> list[nn.Module]:
        encoder = getattr(pipeline, name)
        return list(encoder.modules()) if encoder is not None else []

    def describe(self) -> list[str]:
        own = [
            getattr(one, name) for one in self.pipelines for name in ("tokenizer", "tokenizer_2")
        ]
        tokenizers = [
            f"{len(one)} {one} {one.added_tokens_encoder}" for one in own if one is not None
        ]
        encoders = [getattr(one, name) for one in self.pipelines for name in ENCODERS]
        configs = [str(one.config) for one in (*self.pipelines, *encoders) if one is not None]
        return tokenizers + configs

    def assert_unchanged(self) -> None:
        for owner, before in self.attributes:
            assert list(vars(owner)) == list(before)
            assert all(vars(owner)[name] is value for name, value in before.items())
        assert all(torch.equal(tensor, before) for tensor, before in self.tensors)
        assert self.describe() == self.texts


def pipelines_of(pipeline: ImagePipeline) -> list[Any]:
    return [one for one in (pipeline._base, pipeline._base_image, pipeline._refiner) if one]


def test_everything_is_as_before_after_a_block(refined: LoadedModels) -> None:
    pipeline = ImagePipeline(refined)
    before = Snapshot(*pipelines_of(pipeline))
    for _ in range(2):
        with pipeline.tokens(word(refined.base, "dog", 2, 2)):
            standing = [one.tokenizer_2 for one in pipelines_of(pipeline)]
            assert all(isinstance(one, WordTokenizer) for one in standing)
            encode(refined.base, "a red dog")
        before.assert_unchanged()


def test_everything_is_as_before_after_an_error_in_the_block(refined: LoadedModels) -> None:
    pipeline = ImagePipeline(refined)
    before = Snapshot(*pipelines_of(pipeline))
    with pytest.raises(ZeroDivisionError), pipeline.tokens(word(refined.base, "dog")):
        encode(refined.base, "a red dog")
        raise ZeroDivisionError
    before.assert_unchanged()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_everything_is_as_before_after_an_error_on_the_way_in(
    models: LoadedModels, place: int
) -> None:
    pipelines = pipelines_of(ImagePipeline(models))
    before = Snapshot(*pipelines)
    broken = SimpleNamespace(text_encoder=None, text_encoder_2=models.base.text_encoder_2)
    with pytest.raises(AttributeError) as caught, ExitStack() as stack:
        stack.enter_context(
            added_tokens([*pipelines[:place], broken, *pipelines[place:]], word(models.base, "dog"))
        )
    assert "tokenizer_2" in str(caught.value)
    before.assert_unchanged()


def test_an_encoder_that_fails_hides_no_ids_afterwards(models: LoadedModels) -> None:
    encoder = models.base.text_encoder_2
    with added_tokens([models.base], word(models.base, "dog")), torch.no_grad():
        with pytest.raises(ValueError, match="Sequence length"):
            encoder(torch.full((1, 78), 603))
        row = encoder.get_input_embeddings()(torch.tensor([0]))
    assert torch.equal(row[0], encoder.get_input_embeddings().weight[0])


def test_no_words_touch_nothing(refined: LoadedModels) -> None:
    pipeline = ImagePipeline(refined)
    before = Snapshot(*pipelines_of(pipeline))
    with pipeline.tokens(()) as warnings:
        before.assert_unchanged()
    assert warnings == ()


def test_a_forward_that_was_shadowed_before_is_put_back(models: LoadedModels) -> None:
    table = models.base.text_encoder.get_input_embeddings()
    calls = []

    def hooked(ids: Tensor) -> Tensor:
        calls.append(ids)
        return type(table).forward(table, ids)

    table.forward = hooked
    try:
        with added_tokens([models.base], word(models.base, "dog")):
            encode(models.base, "a red dog")
        assert vars(table)["forward"] is hooked
    finally:
        del table.forward
    assert int(calls[0].max()) < table.num_embeddings


# --- several files, several pipelines -------------------------------------------------------------


def test_a_word_of_two_files_is_the_first_ones_with_a_warning(models: LoadedModels) -> None:
    base = models.base
    first, second = word(base, "<s0>", 2, 2, seed=1), word(base, "<s0>", 1, 1, seed=7)
    hidden, _ = slow(base, "a red <s0>", first)
    with ImagePipeline(models).tokens([*first, *second]) as warnings:
        assert torch.equal(encode(base, "a red <s0>")[0], hidden)
    assert warnings == ('the word "<s0>" comes with several LoRAs: the first one\'s is used',)


def test_the_same_file_twice_needs_no_warning(models: LoadedModels) -> None:
    same = word(models.base, "<s0>"), word(models.base, "<s0>")
    with ImagePipeline(models).tokens([one for each in same for one in each]) as warnings:
        assert warnings == ()


def test_vectors_that_no_encoder_can_read_are_refused_before_any_change(
    models: LoadedModels,
) -> None:
    before = Snapshot(models.base)
    wrong = TokenEmbedding("dog", "text_encoder_2", randn(1, 7))
    with pytest.raises(LoraIncompatible) as caught, ExitStack() as stack:
        stack.enter_context(added_tokens([models.base], [*word(models.base, "cat", 1, 0), wrong]))
    assert "no text_encoder_2 here can read the vectors of dog" in str(caught.value)
    before.assert_unchanged()


def test_an_embedding_without_a_word_is_refused_before_any_change(models: LoadedModels) -> None:
    before = Snapshot(models.base)
    with pytest.raises(ValueError, match="without a word"), ExitStack() as stack:
        stack.enter_context(added_tokens([models.base], word(models.base, "")))
    before.assert_unchanged()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "its own"])
def test_a_refiner_reads_the_words_too(refined: LoadedModels, shared: bool) -> None:
    if not shared:
        refiner = copy.copy(refined.refiner)
        assert refiner is not None
        refiner.register_modules(
            text_encoder_2=copy.deepcopy(refiner.text_encoder_2),
            tokenizer_2=copy.deepcopy(refiner.tokenizer_2),
        )
        refined = replace(refined, refiner=refiner)
    embeddings = word(refined.base, "dog", 2, 3)
    hidden, pooled = slow(refined.base, "a red dog", embeddings)
    with ImagePipeline(refined).tokens(embeddings):
        found = encode(refined.refiner, "a red dog")
    assert torch.equal(found[0], hidden[..., -64:])
    torch.testing.assert_close(found[2], pooled, rtol=0, atol=1e-6)


def test_pictures_are_drawn_with_the_word_on_every_route(refined: LoadedModels) -> None:
    def draw(**values: Any) -> Any:
        asked = request(prompt="a big <dog> on blue", **values)
        route, _ = choose_route(asked, has_refiner=True)
        return np.asarray(pipeline.generate(asked, route, None, Timings())[0])

    pipeline = ImagePipeline(refined)
    for values in ({"refiner_mode": "none"}, {}, {"refiner_mode": "ensemble"}):
        plain = draw(**values)
        with pipeline.tokens(word(refined.base, "<dog>", 2, 2)):
            assert not np.array_equal(draw(**values), plain)
        np.testing.assert_array_equal(draw(**values), plain)


# --- together with the engine ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", [Mode.DYNAMIC, Mode.MERGED])
@pytest.mark.parametrize("tokens_outside", [True, False])
def test_words_and_layers_of_one_file_work_together(
    models: LoadedModels, tmp_path: Path, mode: Mode, tokens_outside: bool
) -> None:
    base, pipeline = models.base, ImagePipeline(models)
    tensors: dict[str, Tensor] = {}
    deltas = {}
    for i, (component, short) in enumerate(zip(ENCODERS, ("te1", "te2"), strict=True)):
        width = getattr(base, component).config.hidden_size
        down, up = randn(4, width, seed=20 + i) / 8, randn(width, 4, seed=30 + i) / 8
        stem = f"lora_{short}_text_model_{Q_PROJ.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"bundle_emb.<dog>.clip_{'lg'[i]}"] = vectors(base, component, 2, seed=40 + i)
        deltas[component] = up @ down
    engine = LoraEngine(pipeline.components)
    file = load(write(tmp_path / "dog.safetensors", tensors), engine.key_map, "0" * 64)
    assert (len(file.layers), len(file.embeddings), file.unused) == (2, 2, ())
    before = Snapshot(base)
    hidden, pooled = slow(base, "a red <dog>", file.embeddings, deltas)
    with ExitStack() as stack:
        if tokens_outside:
            stack.enter_context(pipeline.tokens(file.embeddings))
        stack.enter_context(engine.applied([LoraUse(file)], mode))
        if not tokens_outside:
            stack.enter_context(pipeline.tokens(file.embeddings))
        found = encode(base, "a red <dog>")
    torch.testing.assert_close(found[0], hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], pooled, rtol=1e-4, atol=1e-5)
    before.assert_unchanged()
