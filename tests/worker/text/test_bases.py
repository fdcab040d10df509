"""Another base swaps in when its turn comes, the old one is freed first, and the same is not loaded again."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import worker.text.base
from tests.text.small import base, folder, generated, peft, tokenizer
from text.loading import TextModel, Wanted
from text_settings import TextSettings
from worker.text.bases import Bases
from worker.text.worker import TextWorker

GREEDY = {"temperature": 0, "max_tokens": 8}
WORDS = tokenizer().encode("abc")


def other() -> Any:
    """The same shape with other weights."""
    model = type(base())(base().config).eval()
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    return model


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Each base that was loaded, and how many models were alive just before."""
    told: list[tuple[str, int]] = []
    alive: list[weakref.ref[Any]] = []
    load = worker.text.base.load_model

    def counted(wanted: Wanted) -> TextModel:
        gc.collect()
        told.append((Path(wanted.name).name, sum(one() is not None for one in alive)))
        made = load(wanted)
        alive.append(weakref.ref(made.model))
        return made

    monkeypatch.setattr(worker.text.base, "load_model", counted)
    return told


@pytest.fixture
def served(
    tmp_path: Path, loaded: list[tuple[str, int]], own_fallback: None
) -> Iterator[TextWorker]:
    for name, model in (("one", base()), ("two", other())):
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    shutil.copytree(folder("plain"), tmp_path / "cache" / "plain")
    made = TextWorker(
        TextSettings(
            model=str(tmp_path / "one"),
            served_name="one",
            other_bases=f"{tmp_path / 'two'}, {tmp_path / 'gone'}",
            lora_cache_dir=tmp_path / "cache",
            device="cpu",
        )
    ).setup()
    yield made
    made.close()


async def ask(worker: TextWorker, **values: Any) -> Any:
    (answer,) = [piece async for piece in worker.handle({"id": "job", "input": values})]
    return answer


def words(answer: Any) -> str:
    assert "error" not in answer, answer
    return answer["choices"][0]["text"]


def right(model: Any) -> str:
    return tokenizer().decode(generated(model, WORDS, 8), skip_special_tokens=True)


def test_another_base_takes_the_place_of_the_one_before_and_the_same_stays(
    served: TextWorker, loaded: list[tuple[str, int]], tmp_path: Path
) -> None:
    async def all_of_them() -> list[Any]:
        models = ["one", str(tmp_path / "two"), str(tmp_path / "two"), "one:plain", "plain", ""]
        jobs = [ask(served, prompt="abc", model=model, sampling_params=GREEDY) for model in models]
        return await asyncio.gather(*jobs)

    own, second = right(base()), right(other())
    assert own != second
    adapted = right(peft("plain"))
    answers = asyncio.run(all_of_them())
    assert [words(one) for one in answers] == [own, second, second, adapted, adapted, own]
    # each was gone before the next was loaded
    assert loaded == [("one", 0), ("two", 0), ("one", 0)]
    listed = asyncio.run(ask(served, openai_route="/v1/models"))["data"]
    assert [one["id"] for one in listed][:2] == ["one", str(tmp_path / "two")]


def test_an_adapter_of_another_base_is_named_behind_it(served: TextWorker, tmp_path: Path) -> None:
    model = f"{tmp_path / 'two'}:plain"
    answer = asyncio.run(ask(served, prompt="abc", model=model, sampling_params=GREEDY))
    assert answer["loras"][0]["status"] == "applied"
    assert words(answer) not in (right(peft("plain")), right(other()))


def test_a_base_that_cannot_be_loaded_fails_its_own_jobs_and_the_others_go_on(
    served: TextWorker, tmp_path: Path
) -> None:
    async def all_of_them() -> list[Any]:
        models = ["one", str(tmp_path / "gone"), "one"]
        jobs = [ask(served, prompt="abc", model=model, sampling_params=GREEDY) for model in models]
        return await asyncio.gather(*jobs)

    first, failed, last = asyncio.run(all_of_them())
    assert failed["error"]["code"] == "MODEL_UNUSABLE"
    assert words(first) == words(last) == right(base())
    assert asyncio.run(ask(served, action="health"))["kind"] == "text"


class Loaded:
    """A base that notes when it is closed."""

    def __init__(self, name: str) -> None:
        self.name, self.closed = name, False

    def close(self) -> None:
        self.closed = True


def test_who_waits_for_a_base_and_gives_up_keeps_nobody_waiting() -> None:
    bases = Bases(Loaded)
    bases.start("a")

    async def run() -> list[str]:
        entered: list[str] = []

        async def job(name: str | None) -> None:
            async with bases.entered(name) as one:
                assert not one.closed
                entered.append(one.name)

        async with bases.entered("a") as held:
            gives_up = asyncio.ensure_future(job("b"))
            behind = asyncio.ensure_future(job("a"))
            asked = asyncio.ensure_future(job(None))
            await asked  # what asks for no base waits for nobody
            assert not behind.done() and not held.closed
            gives_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gives_up
            await behind
        await asyncio.gather(job("b"), job("c"), job("a"), job(None))
        return entered

    assert asyncio.run(run())[:4] == ["a", "a", "b", "c"]


def test_those_for_one_base_run_together_and_in_order() -> None:
    order: list[str] = []

    def load(name: str) -> Loaded:
        order.append(name)
        return Loaded(name)

    bases = Bases(load)
    bases.start("a")

    async def run() -> None:
        together = asyncio.Barrier(2)

        async def job(name: str, meet: bool) -> None:
            async with bases.entered(name):
                if meet:
                    await together.wait()

        await asyncio.gather(
            job("a", True), job("a", True), job("b", True), job("b", True), job("a", False)
        )

    asyncio.run(run())
    assert order == ["a", "b", "a"]
