"""Packed weights: rows over NF4 and int8 on a CPU, beside PEFT over the same; what cannot be is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed here")

from peft import PeftModel

from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse
from lora.errors import LoraUnsupported
from lora.formats.opening import load_file
from tests.conftest import ROOT
from tests.waiting import PATIENCE, until
from text.generation import Generation
from text.loading import COMPONENT, TextModel, Wanted, load_model
from text.sampling import Sampling
from text.scheduler import Scheduler

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LORAS = ROOT / "demo" / "text" / "loras"
QUESTIONS = ("What colour is a fox?", "What is 4 plus 5?", "What does a cow say?", "Hello!")


@pytest.fixture(scope="module", params=["nf4", "int8"])
def text(request: pytest.FixtureRequest) -> Iterator[TextModel]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield load_model(Wanted(device="cpu", quantisation=request.param))


def prompt(text: TextModel, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return text.encode(text.chat.render(messages, add_generation_prompt=True), special=False)


@torch.no_grad()
def by_transformers(model: Any, tokens: list[int]) -> list[int]:
    given = torch.tensor([tokens])
    out = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(tokens) :].tolist()


def test_rows_over_packed_weights_are_what_peft_makes_of_them(text: TextModel) -> None:
    engine = LoraEngine({COMPONENT: text.model})
    scheduler = Scheduler(text, engine, most=8)
    names = [None, "pirate", "json", "emoji"]
    texts = []
    for name in names:
        stack = [] if name is None else [LoraUse(load_file(LORAS / name, engine.key_map))]
        for question in QUESTIONS:
            texts.append(Generation(prompt(text, question), Sampling(12, 0), stack))
    scheduler.submit(*texts)
    assert all(one.wait(PATIENCE) for one in texts)
    until(lambda: not engine.undo.pending)
    scheduler.close()
    wanted = []
    for name in names:
        model: Any = text.model
        wrapped = PeftModel.from_pretrained(model, str(LORAS / name)) if name else None
        for question in QUESTIONS:
            wanted.append(by_transformers(wrapped or model, prompt(text, question)))
        if wrapped is not None:
            wrapped.unload()
    assert [one.tokens for one in texts] == wanted
    assert len({tuple(one.tokens) for one in texts}) > len(QUESTIONS)


def test_what_needs_the_weights_themselves_is_refused_by_name(text: TextModel) -> None:
    engine = LoraEngine({COMPONENT: text.model})
    file = load_file(LORAS / "pirate", engine.key_map)
    whole = file.layers[0]
    dora = type("Dora", (type(whole.algorithm),), {"is_low_rank": False, "name": "dora"})
    changed = replace(whole, algorithm=dora(**vars(whole.algorithm)))
    file = replace(file, layers=(changed,), identity="dora")
    scheduler = Scheduler(text, engine, most=2)
    one = Generation([5, 6], Sampling(3, 0), [LoraUse(file)])
    after = Generation([5, 6], Sampling(3, 0))
    scheduler.submit(one, after)
    assert one.wait(PATIENCE) and after.wait(PATIENCE)
    assert isinstance(one.error, LoraUnsupported)
    assert "quantised" in str(one.error) and "dora" in str(one.error)
    assert after.error is None
    scheduler.close()
