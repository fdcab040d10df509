"""`<lora:name:0.8>` in a prompt is an entry of `loras`, and no part of the prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from handler import Worker
from schemas import MAX_LORAS, parse_job
from tests.test_handler import pixels as pixels_of
from worker.tags import IN_NEGATIVE, taken

PROMPT = "a big red circle on a blue background"
BOTH = ("text_encoder", "text_encoder_2")


def split(unet: float, clip: float) -> dict[str, float]:
    return {"unet": unet, **dict.fromkeys(BOTH, clip)}


@pytest.mark.parametrize(
    ("tag", "scale"),
    [
        ("<lora:x>", 1.0),
        ("<lora:x:0.8>", 0.8),
        ("<LoRA: x : -1.5 >", -1.5),
        ("<lyco:x:.5>", 0.5),
        ("<lora:x:0.8:0.8>", 0.8),
        ("<lora:x:0.8:0.2>", split(0.8, 0.2)),
        ("<lora:x:te=0.5>", split(1.0, 0.5)),
        ("<lora:x:0.7:te=0>", split(0.7, 0.0)),
        ("<lora:x:te=0.5:unet=0.9>", split(0.9, 0.5)),
    ],
)
def test_a_tag_is_an_entry(tag: str, scale: Any) -> None:
    tagged = taken(f" a cat, {tag}, in a hat {tag} ")
    assert tagged.text == "a cat, , in a hat"
    assert tagged.entries == ({"path": "x", "scale": scale},) * 2
    assert tagged.faults == ()


@pytest.mark.parametrize(
    "text", ["", " a <s0> cat ", "<lora> a<b:c>", "<hypernet:x:1>", "lora:x:1>"]
)
def test_what_is_no_tag_stays_as_it_is(text: str) -> None:
    assert taken(text).text is text


BAD = {
    "<lora:x:0.8": "has no > at its end",
    "<lora:x <lora:y>": "has no > at its end",
    "<lora:>": "names no LoRA",
    "<lora::0.8>": "names no LoRA",
    "<lora:x:strong>": "has a scale that is not a number",
    "<lora:x:>": "has a scale that is not a number",
    "<lora:x:nan>": "has a scale that is not a number",
    "<lora:x:0,8>": "has a scale that is not a number",
    "<lora:x:te=>": "has a scale that is not a number",
    "<lora:x:1:1:32>": "has more numbers than one for the UNet and one for the text encoders",
    "<lora:x:dyn=3>": "has a part that is neither a number nor unet= nor te=",
    "<lora:https://h/x?token=canary>": "has a part that is neither a number nor unet= nor te=",
}


@pytest.mark.parametrize(("tag", "fault"), BAD.items(), ids=BAD.keys())
def test_a_tag_that_means_nothing_is_a_sentence(demo_worker: Worker, tag: str, fault: str) -> None:
    answer = demo_worker({"id": "j", "input": {"prompt": f"a cat <lora:y> {tag}"}})
    assert answer["error"].startswith(
        f"INVALID_INPUT: prompt: its LoRA tag 2 {fault}. A tag is <lora:name>"
    )
    assert "canary" not in answer["error"]


def draw(worker: Worker, **values: Any) -> tuple[dict[str, Any], Any]:
    job = {"id": "j", "input": {"prompt": PROMPT, "num_inference_steps": 2, "seed": 3, **values}}
    answer = worker(job)
    return answer, pixels_of(answer) if "error" not in answer else None


def test_tags_draw_what_loras_draw(demo_worker: Worker) -> None:
    stripes, night = "demo-stripes", "demo-night"
    _, plain = draw(demo_worker)
    expected, pixels = draw(
        demo_worker,
        loras=[{"path": night, "scale": 0.5}, {"path": stripes, "scale": split(0.8, 0.0)}],
    )
    answer, tagged = draw(
        demo_worker,
        prompt=f"{PROMPT} <lora:{stripes}:0.8:0>",
        loras=[{"path": night, "scale": 0.5}],
    )
    assert answer["prompt"] == PROMPT
    assert answer["warnings"] == []
    assert [one["scale"] for one in answer["loras"]] == [one["scale"] for one in expected["loras"]]
    np.testing.assert_array_equal(tagged, pixels)
    assert not np.array_equal(plain, pixels)


def test_tags_can_be_left_alone(demo_worker: Worker) -> None:
    answer, pixels = draw(demo_worker, prompt=f"{PROMPT} <lora:nothing:1>", lora_tags=False)
    assert answer["loras"] == []
    assert "prompt" not in answer
    assert not np.array_equal(pixels, draw(demo_worker)[1])


def test_a_tag_of_the_negative_prompt_counts_with_a_warning(demo_worker: Worker) -> None:
    answer, pixels = draw(demo_worker, negative_prompt="green <lora:demo-stripes:0.5>")
    assert answer["warnings"] == [IN_NEGATIVE]
    same = draw(
        demo_worker, negative_prompt="green", loras=[{"path": "demo-stripes", "scale": 0.5}]
    )
    np.testing.assert_array_equal(pixels, same[1])


def test_a_name_that_is_not_there_is_not_found_with_the_nearest(demo_worker: Worker) -> None:
    answer, _ = draw(demo_worker, prompt="a cat <lora:demo-stripe:1>")
    assert answer["error"].startswith("LORA_NOT_FOUND: ")
    assert "demo-stripes" in answer["error"]


def test_limits_hold_for_tags_too(demo_worker: Worker) -> None:
    answer, _ = draw(demo_worker, prompt="<lora:demo-stripes:11>")
    assert answer["error"].startswith("INVALID_INPUT: a LoRA tag: scale: 11.0 is more than 10")
    tags = "<lora:demo-stripes:0.1>" * (MAX_LORAS + 1)
    answer, _ = draw(demo_worker, prompt=tags)
    assert "with those of the presets and tags there are 17" in answer["error"]


def test_presets_bring_tags_along_and_an_empty_selection_is_none(demo_worker: Worker) -> None:
    def preset(**values: Any) -> dict[str, Any]:
        return demo_worker({"input": {"action": "presets.set", "name": "tagged", **values}})

    try:
        assert "its LoRA tag 1 has no >" in preset(prompt_prefix="<lora:x")["error"]
        assert "error" not in preset(prompt_suffix="striped <lora:demo-stripes:0.5>")
        answer, pixels = draw(demo_worker, lora_selection="tagged")
        assert (answer["prompt"], answer["preset"]) == (f"{PROMPT}, striped", ["tagged"])
        same = draw(
            demo_worker, prompt=f"{PROMPT}, striped", loras=[{"path": "demo-stripes", "scale": 0.5}]
        )
        np.testing.assert_array_equal(pixels, same[1])
        for empty in ("", " ", "none", [], [""]):
            asked, _ = draw(demo_worker, lora_selection=empty)
            assert (asked["loras"], asked.get("preset")) == ([], None)
    finally:
        demo_worker({"input": {"action": "presets.delete", "name": "tagged"}})


def test_a_request_with_tags_alone_gets_no_default_loras(demo_worker: Worker) -> None:
    selection = replace(demo_worker.parts.selection, default_loras=({"path": "demo-night"},))

    def chosen(**values: Any) -> list[str]:
        request = parse_job({"input": {"prompt": PROMPT, **values}})
        return [one.lora.path for one in selection.choose(request, has_loras=False).request.loras]

    assert chosen() == ["demo-night"]
    assert chosen(prompt="a <lora:demo-stripes>") == ["demo-stripes"]
    assert chosen(prompt="a <lora:demo-stripes>", lora_tags=False) == ["demo-night"]
    assert chosen(lora_selection="") == []
