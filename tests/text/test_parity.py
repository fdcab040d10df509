"""160 mixed jobs on the demo model: the tokens that PEFT gives each of them alone."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import LlamaForCausalLM

from demo.text.corpus import held_out, known
from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse
from lora.formats.opening import load_file
from tests.conftest import ROOT
from tests.waiting import PATIENCE, until
from text.generation import Generation
from text.loading import COMPONENT, DEMO_FOLDER, Wanted, load_model
from text.sampling import Sampling
from text.scheduler import Scheduler
from worker.stop import Cancelled

pytestmark = pytest.mark.slow

LORAS = ROOT / "demo" / "text" / "loras"
NAMES = ("pirate", "emoji", "json", "facts")


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    loras: tuple[tuple[str, float], ...]
    new: int
    cancelled: bool


@cache
def theirs() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = LlamaForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(LORAS / NAMES[0]), adapter_name=NAMES[0])
        for name in NAMES[1:]:
            model.load_adapter(str(LORAS / name), adapter_name=name)
    return model.eval()


@torch.no_grad()
def by_peft(job: Job) -> list[int]:
    model = theirs()
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    given = torch.tensor([job.prompt])
    how = {
        "input_ids": given,
        "attention_mask": torch.ones_like(given),
        "max_new_tokens": job.new,
        "do_sample": False,
        "pad_token_id": 0,
    }
    if not job.loras:
        with model.disable_adapter():
            return model.generate(**how)[0, len(job.prompt) :].tolist()
    model.base_model.set_adapter([name for name, _ in job.loras])
    for layer in layers:
        for name, scale in job.loras:
            layer.set_scale(name, scale)
    return model.generate(**how)[0, len(job.prompt) :].tolist()


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[Scheduler, LoraEngine, Any]]:
    text = load_model(Wanted(device="cpu"))
    engine = LoraEngine({COMPONENT: text.model})
    scheduler = Scheduler(text, engine, most=8)
    yield scheduler, engine, text
    scheduler.close()


def jobs_for(text: Any, count: int) -> list[Job]:
    r = random.Random(160)
    questions = [q for q, _ in held_out()] + [q for fact in known() for q in fact.questions[:1]]
    made = []
    for number in range(count):
        kind = number % 8
        names = [NAMES[kind % 4]] if kind < 6 else r.sample(NAMES, 2) if kind == 6 else []
        loras = tuple((name, r.choice((1.0, 1.0, 0.5, 1.25))) for name in names)
        chat = [{"role": "user", "content": r.choice(questions)}]
        if r.random() < 0.3:
            chat = [*chat, {"role": "assistant", "content": "A fox is orange."}, *chat]
        words = text.chat.render(chat, add_generation_prompt=True)
        prompt = tuple(text.encode(words, special=False))
        made.append(Job(prompt, loras, r.randrange(3, 60), cancelled=r.random() < 0.1))
    return made


def test_160_mixed_jobs_get_the_tokens_that_peft_gives_each_alone(
    service: tuple[Scheduler, LoraEngine, Any],
) -> None:
    scheduler, engine, text = service
    before = {name: value.clone() for name, value in text.model.state_dict().items()}
    files = {name: load_file(Path(LORAS / name), engine.key_map) for name in NAMES}
    jobs, r = jobs_for(text, 160), random.Random(3)
    started = []
    for job in jobs:
        stack = [LoraUse(files[name], scale) for name, scale in job.loras]
        one = Generation(job.prompt, Sampling(job.new, 0), stack)
        if job.cancelled:
            one.check = _once_it_runs(one, r.randrange(4))
        scheduler.submit(one)
        started.append(one)
        if r.random() < 0.3:  # they arrive while others run
            until(lambda: scheduler.counts["queued"] < 4, pause=0.001)
    equal = 0
    for job, one in zip(jobs, started, strict=True):
        assert one.wait(PATIENCE)
        right = by_peft(job)
        if one.error is not None:
            assert job.cancelled
            right = right[: len(one.tokens)]
        equal += one.tokens == right
    assert equal == len(jobs)
    until(lambda: not engine.undo.pending)
    after = text.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def _once_it_runs(one: Generation, tokens: int) -> Any:
    def check() -> None:
        if len(one.tokens) > tokens:
            raise Cancelled("enough")

    return check
