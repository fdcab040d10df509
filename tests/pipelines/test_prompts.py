"""Prompts of any length and with weights: as a slow computation, and as diffusers where that cuts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.chunks import MAX_CHUNKS, chunked, measure, readers_of
from pipelines.image import ImagePipeline, Timings
from pipelines.loading import LoadedModels, load_models
from pipelines.prompts import encode
from pipelines.routes import choose_route
from pipelines.syntax import MAX_WEIGHT, UNCLOSED
from schemas import MAX_PROMPT, ImageRequest
from settings import Settings
from tests.pipelines.test_image import PROMPT, request, tiny_refiner
from tests.pipelines.test_tokens import ENCODERS, word
from tests.test_handler import data_uri
from validation import InvalidInput

Weighted = list[tuple[str, float]]


@pytest.fixture(scope="module")
def models() -> LoadedModels:
    return load_models(Settings(model="demo", device="cpu"))


@pytest.fixture(scope="module")
def refined(models: LoadedModels) -> LoadedModels:
    return replace(models, refiner=tiny_refiner(models.base))


# --- one chunk without weights: diffusers ---------------------------------------------------------

ONE_CHUNK = (
    *(
        PROMPT,
        "",
        " ",
        "red " * 75,
        "Red, circle!\n\ncircle",
        "x" * 60,
        "\u00e9\u4e2d\U0001f600 e\u0301",
    ),
    *("a<|endoftext|>b", "(red:1.0) circle", "a: b - c; d|e"),
)


@torch.no_grad()
def of_diffusers(pipeline: Any, prompt: str, negative: str | None, **options: Any) -> list[Any]:
    prompt = prompt.replace("(red:1.0)", "red")
    return list(pipeline.encode_prompt(prompt, device="cpu", negative_prompt=negative, **options))


def assert_same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("negative", [None, "", "green, blue"])
@pytest.mark.parametrize("prompt", ONE_CHUNK)
def test_one_chunk_without_weights_gives_diffusers_own_bits(
    refined: LoadedModels, prompt: str, negative: str | None
) -> None:
    for pipeline in (refined.base, ImagePipeline(refined)._base_image, refined.refiner):
        assert_same(encode(pipeline, prompt, negative), of_diffusers(pipeline, prompt, negative))


def test_without_guidance_there_is_no_negative(models: LoadedModels) -> None:
    found = encode(models.base, PROMPT, "green", guided=False)
    expected = of_diffusers(models.base, PROMPT, "green", do_classifier_free_guidance=False)
    assert_same(found, expected)


def test_clip_skip_counts_as_web_uis_do_and_holds_for_both_prompts(models: LoadedModels) -> None:
    """diffusers counts the layers that are skipped beyond SDXL's own, and skips none of the negative's."""
    plain, last, third = (encode(models.base, PROMPT, "green", clip_skip=n) for n in (2, 1, 3))
    assert_same(plain, encode(models.base, PROMPT, "green"))
    expected = of_diffusers(models.base, PROMPT, "green", clip_skip=1)
    assert_same(third[::2], expected[::2])
    assert torch.equal(third[1], of_diffusers(models.base, "green", None, clip_skip=1)[0])  # type: ignore[arg-type]
    assert not torch.equal(last[0], plain[0])
    assert torch.equal(last[2], plain[2]), "the pooled output is always the last layer's"


# --- long and weighted: the slow formula ----------------------------------------------------------


@torch.no_grad()
def slow(pipeline: Any, chunks: Sequence[Weighted], layer: int = -2) -> Tensor:
    """Chunk by chunk and token by token in float64: e + w * (h - e), e of the empty prompt."""
    sides = []
    for name in ENCODERS:
        encoder, tokenizer = (
            getattr(pipeline, name),
            getattr(pipeline, name.replace("text_encoder", "tokenizer")),
        )

        def hidden(ids: list[int], encoder: Any = encoder, tokenizer: Any = tokenizer) -> Tensor:
            row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            row += [tokenizer.pad_token_id] * (77 - len(row))
            out = encoder(torch.tensor([row]), output_hidden_states=True)
            return out.hidden_states[layer][0].double()

        empty, rows = hidden([]), []
        for chunk in chunks:
            ids, weights = [], [1.0]
            for text, weight in chunk:
                new = tokenizer(text, add_special_tokens=False).input_ids
                ids, weights = ids + new, weights + [weight] * len(new)
            states = hidden(ids)
            for place, weight in enumerate(weights):
                states[place] = empty[place] + weight * (states[place] - empty[place])
            rows.append(states)
        sides.append(torch.cat(rows))
    return torch.cat(sides, dim=-1)[None]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


CASES: dict[str, tuple[str, list[Weighted]]] = {
    "a weight": ("a (red:1.5) circle", [[("a ", 1.0), ("red", 1.5), ("circle", 1.0)]]),
    "brackets": ("((red)) [circle]", [[("red", 1.21), ("circle", 1 / 1.1)]]),
    "nothing of it": ("a (red:0) circle", [[("a", 1.0), ("red", 0.0), ("circle", 1.0)]]),
    "the reverse": ("a (red circle:-1.2)", [[("a", 1.0), ("red circle", -1.2)]]),
    "76 words": ("red " * 76, [[("red " * 75, 1.0)], [("red", 1.0)]]),
    "200 words, a weight in each chunk": (
        f"{'red ' * 70}(circle:1.4) {'blue ' * 70}(big circle:0.6){' red' * 58}",
        [
            [("red " * 70, 1.0), ("circle", 1.4), ("blue " * 4, 1.0)],
            [("blue " * 66, 1.0), ("big circle", 0.6), (" red" * 7, 1.0)],
            [(" red" * 51, 1.0)],
        ],
    ),
    "a word of several tokens is not cut": (
        f"{'red ' * 73}xyz blue",
        [[("red " * 73, 1.0)], [("xyz blue", 1.0)]],
    ),
    "breaks": (
        "a red BREAK (circle:1.3)\nBREAK big",
        [[("a red", 1.0)], [("circle", 1.3)], [("big", 1.0)]],
    ),
    "a weight beyond a break": ("(a red BREAK circle:1.3)", [[("a red", 1.3)], [("circle", 1.3)]]),
}


@pytest.mark.parametrize(("prompt", "chunks"), CASES.values(), ids=CASES.keys())
def test_embeddings_are_those_of_the_slow_formula(
    models: LoadedModels, prompt: str, chunks: list[Weighted]
) -> None:
    found = encode(models.base, prompt, "green")
    expected = slow(models.base, chunks)
    assert found.prompt_embeds.shape == expected.shape
    assert error(found.prompt_embeds, expected) < 1e-5
    negative = slow(
        models.base, [[("green", 1.0)], *[list[tuple[str, float]]()] * (len(chunks) - 1)]
    )
    assert found.negative_prompt_embeds is not None
    assert error(found.negative_prompt_embeds, negative) < 1e-5
    first = " ".join(text for text, _ in chunks[0])
    torch.testing.assert_close(
        found.pooled_prompt_embeds, of_diffusers(models.base, first, None)[2], rtol=0, atol=1e-5
    )


def test_a_weight_moves_its_own_tokens_and_no_other(models: LoadedModels) -> None:
    plain = encode(models.base, "a red circle", None).prompt_embeds
    moved = encode(models.base, "a (red:1.5) circle", None).prompt_embeds
    changed = (plain != moved).any(dim=-1)[0].nonzero().flatten().tolist()
    assert changed == [2]


def test_a_long_negative_prompt_counts_in_full(models: LoadedModels) -> None:
    negative = f"{'red ' * 100}(circle:1.4)"
    found = encode(models.base, "blue", negative)
    expected = slow(models.base, [[("red " * 75, 1.0)], [("red " * 25, 1.0), ("circle", 1.4)]])
    assert found.negative_prompt_embeds is not None
    assert error(found.negative_prompt_embeds, expected) < 1e-5
    assert error(found.prompt_embeds, slow(models.base, [[("blue", 1.0)], []])) < 1e-5
    zeros = encode(models.base, negative, None)
    assert zeros.negative_prompt_embeds is not None
    assert zeros.negative_prompt_embeds.shape == zeros.prompt_embeds.shape
    assert not zeros.negative_prompt_embeds.any()


def test_the_largest_weight_has_a_number_in_half_precision(models: LoadedModels) -> None:
    half = ImagePipeline(models)._base_image
    half.register_modules(
        **{name: type(getattr(half, name))(getattr(half, name).config).half() for name in ENCODERS}
    )
    found = encode(half, f"(red circle:{MAX_WEIGHT})", f"(blue:-{MAX_WEIGHT})")
    assert found.prompt_embeds.dtype is torch.float16
    assert all(bool(one.isfinite().all()) for one in found if one is not None)


# --- words of textual inversions ------------------------------------------------------------------


def ids_of(models: LoadedModels, prompt: str) -> list[list[list[int]]]:
    """By chunk, by encoder: the ids without begin, end and padding."""
    readers = list(readers_of(models.base).values())
    return [
        [[number for one in chunk.words for number in one.ids[side]] for side in range(2)]
        for chunk in chunked(prompt, readers).chunks
    ]


def test_only_a_word_longer_than_a_chunk_is_cut(models: LoadedModels) -> None:
    tokenizer = readers_of(models.base)["text_encoder"].tokenizer
    ids = tokenizer("x" * 80, add_special_tokens=False, verbose=False).input_ids
    assert len(ids) == 80
    red = tokenizer("red", add_special_tokens=False).input_ids
    assert [chunk[0] for chunk in ids_of(models, f"red {'x' * 80} red")] == [
        red,
        ids[:75],
        ids[75:] + red,
    ]


def test_a_word_of_several_vectors_is_never_cut(models: LoadedModels) -> None:
    embeddings = word(models.base, "<dog>", 3, 5)
    with ImagePipeline(models).tokens(embeddings):
        for before in range(66, 77):
            chunks = ids_of(models, f"{'red ' * before}<dog> blue")
            new = [[[n for n in ids if n >= 603] for ids in chunk] for chunk in chunks]
            assert [row for row in new if row != [[], []]] == [
                [[603, 604, 605], [603, 604, 605, 606, 607]]
            ], before
            assert len(chunks) == 1 + (before > 69)


def test_encoders_with_other_counts_have_the_same_words_in_the_same_chunk(
    models: LoadedModels,
) -> None:
    with ImagePipeline(models).tokens(word(models.base, "<dog>", 1, 20)):
        chunks = ids_of(models, "<dog> red " * 8)
    assert [[len(side) for side in chunk] for chunk in chunks] == [[6, 63], [6, 63], [4, 42]]


def test_a_word_at_token_200_is_read_as_its_vectors(models: LoadedModels) -> None:
    base, pipeline = models.base, ImagePipeline(models)
    embeddings = word(base, "<dog>", 2, 2)
    prompt = f"{'red ' * 199}(<dog>:1.5) blue"
    plain = encode(base, prompt, None).prompt_embeds
    with pipeline.tokens(embeddings):
        found = encode(base, prompt, None).prompt_embeds
        alone = encode(base, f"{'red ' * 49}(<dog>:1.5) blue", None).prompt_embeds
        others = measure(base, request(prompt=prompt), word(base, "<cat>", 9, 9))
    assert others.prompts["prompt"].tokens == 205, "words of the job that draws now do not count"
    assert torch.equal(found[:, :154], plain[:, :154])
    torch.testing.assert_close(found[:, 154:], alone, rtol=0, atol=1e-5)
    assert measure(base, request(prompt=prompt), embeddings).prompts["prompt"].tokens == 202


# --- pictures -------------------------------------------------------------------------------------

ROUTES: dict[str, dict[str, Any]] = {
    "text": {"refiner_mode": "none"},
    "refined": {"strength": 0.9},
    "ensemble": {"refiner_mode": "ensemble", "high_noise_frac": 0.3, "num_inference_steps": 8},
    "image": {"refiner_mode": "none", "image_url": data_uri(), "strength": 0.9},
    "refiner's image": {"image_url": data_uri(), "strength": 0.9},
}


def drawn(models: LoadedModels, asked: ImageRequest) -> Any:
    pipeline = ImagePipeline(models)
    route, _ = choose_route(asked, has_refiner=pipeline.has_refiner)
    picture = Image.new("RGB", (64, 64), (30, 60, 200)) if asked.image_url else None
    return np.asarray(pipeline.generate(asked, route, picture, Timings())[0])


@pytest.mark.parametrize("values", ROUTES.values(), ids=ROUTES.keys())
def test_a_trigger_word_at_token_200_changes_the_picture(
    refined: LoadedModels, values: dict[str, Any]
) -> None:
    filler = f"{PROMPT}{' big' * 190} "
    first, second, weighted = (
        drawn(refined, request(prompt=filler + tail, **values))
        for tail in ("", "green star", "(green star:1.6)")
    )
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, weighted)


def test_clip_skip_changes_the_picture_and_two_is_the_models_own(models: LoadedModels) -> None:
    plain = drawn(models, request())
    np.testing.assert_array_equal(plain, drawn(models, request(clip_skip=2)))
    assert not np.array_equal(plain, drawn(models, request(clip_skip=3)))


# --- limits, and what the answer says -------------------------------------------------------------


def refused(models: LoadedModels, asked: ImageRequest) -> str:
    with pytest.raises(InvalidInput) as caught:
        measure(models.base, asked, ())
    return str(caught.value)


def test_what_is_too_long_is_refused_with_a_sentence(models: LoadedModels) -> None:
    full = "1" * (75 * MAX_CHUNKS)
    assert (
        len(measure(models.base, request(prompt=full), ()).prompts["prompt"].chunks) == MAX_CHUNKS
    )
    sentence = (
        "INVALID_INPUT: {}: 2401 tokens make 33 chunks, and at most 32 are drawn. "
        "Shorten it; a chunk holds 75 tokens."
    )
    assert refused(models, request(prompt=full + "1")) == sentence.format("prompt")
    assert refused(models, request(negative_prompt=full + "1")) == sentence.format(
        "negative_prompt"
    )
    with_presets = replace(request(), prompt="a" * (MAX_PROMPT + 1))
    assert "with what presets add, it is longer than 10000 characters" in refused(
        models, with_presets
    )
    with pytest.raises(InvalidInput) as caught:
        request(prompt="a" * 20_000)
    assert "prompt: the text is longer than 10000 characters" in str(caught.value)


def test_a_weight_or_a_layer_that_is_not_there_is_refused(models: LoadedModels) -> None:
    assert "negative_prompt: a weight is over 100" in refused(
        models, request(negative_prompt="(a:1000)")
    )
    assert "clip_skip: this model's text encoders have 3 layers" in refused(
        models, request(clip_skip=4)
    )
    for skip in (0, 13, 1.5):
        with pytest.raises(InvalidInput):
            request(clip_skip=skip)


def test_the_answer_counts_tokens_where_a_prompt_is_longer_than_a_chunk(
    models: LoadedModels,
) -> None:
    short = measure(models.base, request(negative_prompt="a (red:1.2) circle"), ())
    assert (short.as_answer(), short.warnings) == ({}, [])
    long = measure(models.base, request(prompt="red " * 201, negative_prompt="a (red"), ())
    assert long.as_answer() == {
        "prompt_tokens": {
            "prompt": {"tokens": 201, "chunks": 3},
            "negative_prompt": {"tokens": 2, "chunks": 1},
        }
    }
    assert long.warnings == [UNCLOSED]
