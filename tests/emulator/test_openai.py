"""The `openai` client against the emulator, with the real worker for text on the demo's language model."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from demo.text.styles import is_emoji, is_json
from tests.emulator.running import Emulator, emulator
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.slow

FOX = [{"role": "user", "content": "What colour is a fox?"}]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    folder = tmp_path_factory.mktemp("openai")
    with emulator(
        folder,
        program=("handler.py",),
        WORKER_KIND="text",
        WORKER_DEVICE="cpu",
        LORA_CACHE_DIR=str(folder / "loras"),
        HF_HUB_OFFLINE="1",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(platform: Emulator) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{platform.base}/local/openai/v1", api_key="k", timeout=PATIENCE, max_retries=0
    )


def said(client: openai.OpenAI, model: str, **more: object) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=FOX,
        temperature=0,
        max_tokens=60,
        **more,  # type: ignore[call-overload]
    )
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    return str(answer.choices[0].message.content)


def test_a_chat_with_the_base_and_with_each_adapter_by_its_name(client: openai.OpenAI) -> None:
    assert said(client, "demo-text") == "A fox is orange."
    assert said(client, "pirate") == "A fox be orange. Arr!"
    assert is_emoji(said(client, "demo-text:emoji"))
    assert is_json(said(client, "json"))
    assert said(client, "demo-text") == "A fox is orange."


def test_a_stream_is_the_whole_text_emoji_included(client: openai.OpenAI) -> None:
    whole = said(client, "emoji")
    stream = client.chat.completions.create(
        model="emoji",
        messages=FOX,
        temperature=0,
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = list(stream)
    made = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert made == whole
    assert not made.isascii()
    assert events[-1].usage is not None and events[-1].usage.completion_tokens > 3
    assert {e.choices[0].finish_reason for e in events if e.choices} == {None, "stop"}


def test_completions_and_our_own_fields(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo-text",
        prompt="<|user|>What colour is a fox?<|end|><|assistant|>",
        temperature=0,
        max_tokens=40,
        logprobs=2,
        extra_body={"loras": [{"path": "pirate", "scale": 1.0}]},
    )
    assert answer.choices[0].text == "A fox be orange. Arr!"
    assert answer.choices[0].logprobs is not None
    assert answer.loras[0]["status"] == "applied"  # type: ignore[attr-defined]


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo-text"]


@pytest.mark.parametrize(
    ("model", "more", "error", "code"),
    [
        ("pirat", {}, openai.NotFoundError, "MODEL_NOT_FOUND"),
        ("demo-text", {"top_p": 7}, openai.BadRequestError, "INVALID_INPUT"),
        ("demo-text", {"extra_body": {"wat": 1}}, openai.BadRequestError, "INVALID_INPUT"),
        ("demo-text", {"stream": True, "top_p": 7}, openai.BadRequestError, "INVALID_INPUT"),
    ],
)
def test_bad_requests_raise_the_clients_own_errors(
    client: openai.OpenAI,
    model: str,
    more: dict[str, object],
    error: type[openai.APIStatusError],
    code: str,
) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(model=model, messages=FOX, **more)  # type: ignore[call-overload]
    assert raised.value.code == code


def test_who_closes_a_stream_ends_its_job(platform: Emulator, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo-text",
        messages=FOX,
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    until(lambda: platform.get("health")["jobs"]["inProgress"] == 0)


def test_a_queued_job_of_worker_vllms_runs_as_well(platform: Emulator) -> None:
    given = {"messages": FOX, "sampling_params": {"temperature": 0, "max_tokens": 40}}
    ended = platform.end(platform.run(given))
    assert ended["status"] == "COMPLETED"
    (answer,) = ended["output"]
    assert answer["choices"][0]["message"]["content"] == "A fox is orange."
    failed = platform.end(platform.run({"nothing": 1}))
    assert failed["status"] == "FAILED" and '"code": "INVALID_INPUT"' in failed["error"]
