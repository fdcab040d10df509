"""The worker's own HTTP server, for text: OpenAI's own client against the demo's language model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import PATIENCE, until
from tests.worker.http.serving import Thread, served
from text.scheduler import Closed
from text_settings import TextSettings
from worker.http.app import State
from worker.http.text import Texts
from worker.openai_answers import error_answer
from worker.text.worker import TextWorker

FOX = [{"role": "user", "content": "What colour is a fox?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 60}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, own_fallback: None) -> Iterator[TextWorker]:
    made = TextWorker(TextSettings(device="cpu", lora_cache_dir=tmp_path_factory.mktemp("loras")))
    yield made.setup()
    made.close()


@pytest.fixture(scope="module")
def site(worker: TextWorker) -> Iterator[Thread]:
    with served(Texts(worker), worker.settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(site: Thread) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{site.address}/v1", api_key="any", timeout=PATIENCE, max_retries=0
    )


def chat(client: openai.OpenAI, model: str, **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=FOX, **GREEDY, **more)  # type: ignore[call-overload]


def test_a_chat_with_the_base_and_with_an_adapter(client: openai.OpenAI) -> None:
    assert chat(client, "demo-text").choices[0].message.content == "A fox is orange."
    assert chat(client, "pirate").choices[0].message.content == "A fox be orange. Arr!"


def test_a_stream_is_the_whole_text(client: openai.OpenAI) -> None:
    whole = chat(client, "emoji").choices[0].message.content
    got = list(chat(client, "emoji", stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].delta.content or "" for e in got if e.choices) == whole
    assert got[-1].usage.completion_tokens > 3


def test_a_completion_and_the_models(client: openai.OpenAI) -> None:
    prompt = "<|user|>What colour is a fox?<|end|><|assistant|>"
    answer = client.completions.create(model="demo-text", prompt=prompt, **GREEDY)
    assert answer.choices[0].text == "A fox is orange."
    assert [model.id for model in client.models.list()] == ["demo-text"]


@pytest.mark.parametrize(
    ("model", "more", "error", "code"),
    [
        ("pirat", {}, openai.NotFoundError, "MODEL_NOT_FOUND"),
        ("demo-text", {"top_p": 7}, openai.BadRequestError, "INVALID_INPUT"),
        ("demo-text", {"stream": True, "top_p": 7}, openai.BadRequestError, "INVALID_INPUT"),
    ],
)
def test_bad_requests_raise_the_clients_own_errors(
    client: openai.OpenAI, model: str, more: dict[str, Any], error: Any, code: str
) -> None:
    with pytest.raises(error) as raised:
        chat(client, model, **more)
    assert raised.value.code == code and raised.value.body["hint"]


def test_a_jobs_input_is_answered_as_by_the_queue(site: Thread) -> None:
    given = {"messages": FOX, "sampling_params": GREEDY}
    whole = site.post("/generate", given).json()
    assert whole["choices"][0]["message"]["content"] == "A fox is orange."
    stream = site.post("/generate", {**given, "stream": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.text.startswith("data: {") and stream.text.endswith("data: [DONE]\n\n")
    event = site.post("/generate", given, headers={"Accept": "text/event-stream"}).text
    name, data = event.strip().split("\n")
    assert name == "event: answer"
    answer = json.loads(data.removeprefix("data: "))
    assert answer["choices"][0]["message"] == whole["choices"][0]["message"]
    assert site.post("/generate", {"action": "statistics"}).json()["models"]["demo-text"]


def test_who_closes_a_stream_ends_its_text(
    site: Thread, client: openai.OpenAI, worker: TextWorker
) -> None:
    more = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(
        model="demo-text",
        messages=FOX,
        stream=True,
        **more,  # type: ignore[call-overload]
    )
    next(iter(stream))
    stream.close()
    until(lambda: worker.counts == {"queued": 0, "running": 0})
    until(lambda: site.serving.jobs.working == 0)


def test_a_full_line_is_429_for_texts_too(
    worker: TextWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung_up = threading.Event()

    async def endless(job: Any, post: Any) -> Any:
        yield "data: {}\n\n"
        try:
            await asyncio.Event().wait()
        finally:
            hung_up.set()

    monkeypatch.setattr(worker, "handle", endless)
    with served(Texts(worker), worker.settings, concurrency=1, waiting=0) as site:
        body = {"messages": FOX, "stream": True}
        with requests.post(
            f"{site.address}/v1/chat/completions", json=body, stream=True, timeout=PATIENCE
        ) as first:
            lines = first.iter_lines()  # kept, because to forget it closes the connection
            assert next(lines) == b"data: {}"
            refused = site.post("/v1/chat/completions", body)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        until(hung_up.is_set)
        until(lambda: site.serving.jobs.working == 0)


def test_a_worker_that_cannot_go_on_ends_the_server(
    site: Thread, worker: TextWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(job: Any, post: Any) -> Any:
        yield error_answer(Closed("the worker cannot go on"))

    monkeypatch.setattr(worker, "handle", broken)
    response = site.post("/v1/chat/completions", {"messages": FOX})
    assert response.status_code == 503 and response.json()["error"]["code"] == "WORKER_CLOSED"
    assert site.given_up == [True]


def test_metrics_have_the_texts_figures_also_before_the_base_is_loaded(
    site: Thread, client: openai.OpenAI
) -> None:
    chat(client, "pirate")
    until(lambda: site.post("/generate", {"action": "statistics"}).json()["running"] == 0)
    families = {f.name: f for f in text_string_to_metric_families(site.get("/metrics").text)}
    (texts,) = (s for s in families["worker_text_texts"].samples if s.labels["model"] == "pirate")
    assert families["worker_text_texts"].type == "counter" and texts.value >= 1
    assert families["worker_text_running"].samples[0].value == 0

    loading = TextWorker(TextSettings(device="cpu"))
    with served(Texts(loading), loading.settings) as early:
        early.serving.state = State.LOADING
        assert "worker_text_peak_memory_bytes" in early.get("/metrics").text
        assert early.get("/ping").status_code == 204
        assert "models" not in loading.__dict__
