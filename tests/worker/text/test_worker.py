"""The worker for text: worker-vllm's shapes in, OpenAI's out; every adapter on any request."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as tensors_of
from safetensors.torch import save_file

from lora.errors import SourceInvalid
from tests.server import LoopbackServer
from tests.text.small import base, folder, generated, peft, tokenizer
from tests.waiting import PATIENCE, until
from text_settings import TextSettings
from worker.text.worker import TextWorker

QUESTION = [{"role": "user", "content": "What is this?"}]
GREEDY = {"temperature": 0, "max_tokens": 12}


def prompt_tokens(messages: list[dict[str, str]] = QUESTION) -> list[int]:
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer().encode(text, add_special_tokens=False)


def right(kind: str | None, tokens: list[int], new: int = 12) -> str:
    return tokenizer().decode(generated(peft(kind), tokens, new), skip_special_tokens=True)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "small-model"
    base().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    for kind in ("plain", "other", "dora", "saved"):
        shutil.copytree(folder(kind), path / kind)
    return path


@pytest.fixture(scope="module")
def worker(model_folder: Path, cache: Path, own_fallback: None) -> Iterator[TextWorker]:
    made = TextWorker(
        TextSettings(
            model=str(model_folder),
            served_name="base",
            lora_cache_dir=cache,
            device="cpu",
            lora_allow_private_urls=True,
            lora_modules='[{"name": "named", "path": "plain"}]',
        )
    ).setup()
    yield made
    made.close()


async def pieces(worker: TextWorker, **values: Any) -> list[Any]:
    return [piece async for piece in worker.handle({"id": "job", "input": values})]


def ask(worker: TextWorker, **values: Any) -> Any:
    (answer,) = asyncio.run(pieces(worker, **values))
    return answer


def words(answer: Any) -> str:
    assert "error" not in answer, answer
    choice = answer["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def refused(worker: TextWorker, **values: Any) -> dict[str, Any]:
    answer = ask(worker, **values)
    assert set(answer) == {"error"}, answer
    assert answer["error"].keys() == {"message", "type", "param", "code", "hint"}
    assert json.loads(str(answer["error"])) == dict(answer["error"])  # what the SDK makes of it
    return answer["error"]


def events(told: list[str]) -> list[dict[str, Any]]:
    lines = [line for line in "".join(told).split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_bare_prompt_is_answered_as_a_completion(worker: TextWorker) -> None:
    answer = ask(worker, prompt="Hello World", sampling_params=GREEDY)
    tokens = tokenizer().encode("Hello World")
    assert answer["object"] == "text_completion"
    assert words(answer) == right(None, tokens)
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    assert answer["usage"]["total_tokens"] == len(tokens) + answer["usage"]["completion_tokens"]
    assert (answer["model"], answer["loras"], answer["warnings"]) == ("base", [], [])
    assert answer["timings"].keys() == {"load", "queue", "first_token", "decode"}


def test_openais_route_is_answered_as_a_chat(worker: TextWorker) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    body = {"model": "base", "messages": messages, "max_tokens": 12, "temperature": 0}
    answer = ask(worker, openai_route="/v1/chat/completions", openai_input=body)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert words(answer) == right(None, prompt_tokens(messages))
    same = ask(worker, route="/v1/chat/completions", body=body, method="POST")
    assert words(same) == words(answer)


def test_worker_vllms_published_inputs_run_unchanged(worker: TextWorker) -> None:
    first = ask(worker, prompt="Hello World")
    assert first["usage"]["completion_tokens"] <= 16
    second = ask(
        worker,
        openai_route="/v1/chat/completions",
        openai_input={
            "messages": [{"role": "system", "content": "You are helpful."}, *QUESTION],
            "max_tokens": 200,
            "temperature": 0.1,
        },
    )
    assert second["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("kind", ["plain", "other", "dora", "saved"])
@pytest.mark.parametrize("named", ["loras", "model", "base:model"])
def test_an_adapter_is_served_however_it_is_named(
    worker: TextWorker, kind: str, named: str
) -> None:
    how: dict[str, Any] = {
        "loras": {"loras": [kind]},
        "model": {"model": kind},
        "base:model": {"model": f"base:{kind}"},
    }[named]
    answer = ask(worker, messages=QUESTION, sampling_params=GREEDY, **how)
    assert words(answer) == right(kind, prompt_tokens())
    assert words(answer) != right(None, prompt_tokens())
    (told,) = answer["loras"]
    assert told["status"] == "applied" and told["scale"] == 1
    assert told["mode"] == ("alone" if kind in ("dora", "saved") else "shared")


def test_requests_at_once_get_what_each_alone_gets(worker: TextWorker) -> None:
    kinds = [None, "plain", "other", "dora", "named", "plain", None, "other"]

    async def all_of_them() -> list[Any]:
        jobs = [
            pieces(
                worker,
                prompt=f"number {n}",
                sampling_params=GREEDY,
                **({"model": kind} if kind else {}),
            )
            for n, kind in enumerate(kinds)
        ]
        return [answer for (answer,) in await asyncio.gather(*jobs)]

    made = [words(answer) for answer in asyncio.run(all_of_them())]
    wanted = [
        right("plain" if kind == "named" else kind, tokenizer().encode(f"number {n}"))
        for n, kind in enumerate(kinds)
    ]
    assert made == wanted


def test_a_conversation_changes_its_adapter_and_goes_back(worker: TextWorker) -> None:
    messages = list(QUESTION)
    for kind in (None, "plain", "other", None, "dora", "plain"):
        how = {"loras": [kind]} if kind else {}
        said = words(ask(worker, messages=messages, sampling_params=GREEDY, **how))
        assert said == right(kind, prompt_tokens(messages))
        messages = [*messages, {"role": "assistant", "content": said}, *QUESTION][-4:]


@pytest.mark.parametrize("chat", [True, False])
def test_streamed_text_is_the_unstreamed_text(worker: TextWorker, chat: bool) -> None:
    how: dict[str, Any] = {"messages": QUESTION} if chat else {"prompt": "caf\N{FOX FACE}"}
    rules = {"temperature": 1.5, "seed": 11, "max_tokens": 60, "n": 2}
    whole = ask(worker, sampling_params=rules, loras=["plain"], **how)
    told = asyncio.run(pieces(worker, sampling_params=rules, loras=["plain"], stream=True, **how))
    made = ["", ""]
    for event in events(told):
        for choice in event["choices"]:
            part = choice["delta"].get("content", "") if chat else choice["text"]
            made[choice["index"]] += part
    key = "message" if chat else "text"
    wanted = [c[key]["content"] if chat else c[key] for c in whole["choices"]]
    assert made == wanted
    assert len(set(made)) == 2
    assert events(told)[-1]["seed"] == whole["seed"] == 11


def test_the_last_event_has_the_usage_if_it_is_asked_for(worker: TextWorker) -> None:
    told = asyncio.run(
        pieces(
            worker,
            openai_route="/v1/chat/completions",
            openai_input={
                "messages": QUESTION,
                "stream": True,
                "max_tokens": 5,
                "stream_options": {"include_usage": True},
            },
        )
    )
    *others, last = events(told)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] >= 1
    assert all("usage" not in event for event in others)


def test_logprobs_in_both_shapes(worker: TextWorker) -> None:
    chat = ask(
        worker,
        openai_input={
            "messages": QUESTION,
            "logprobs": True,
            "top_logprobs": 2,
            "max_tokens": 4,
            "temperature": 0,
        },
    )
    entries = chat["choices"][0]["logprobs"]["content"]
    assert len(entries) == chat["usage"]["completion_tokens"]
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in entries)
    plain = ask(worker, prompt="abc", sampling_params={**GREEDY, "logprobs": 3})
    told = plain["choices"][0]["logprobs"]
    assert len(told["tokens"]) == plain["usage"]["completion_tokens"]
    assert all(len(likeliest) == 3 for likeliest in told["top_logprobs"])


def test_a_seed_is_told_and_gives_the_same_text(worker: TextWorker) -> None:
    first = ask(worker, prompt="abc", sampling_params={"temperature": 1.2, "max_tokens": 20})
    again = {"temperature": 1.2, "max_tokens": 20, "seed": first["seed"]}
    assert words(ask(worker, prompt="abc", sampling_params=again)) == words(first)


def test_an_action_that_fetches_tells_how_far_it_is(
    worker: TextWorker, cache: Path, server: LoopbackServer
) -> None:
    gate, updates = threading.Event(), list[dict[str, Any]]()
    body = (cache / "other" / "adapter_model.safetensors").read_bytes()
    url = server.serve("/other.safetensors", body, gate=gate, gate_after=len(body) // 2)

    async def scene() -> list[Any]:
        told = asyncio.Event()

        async def post(update: dict[str, Any]) -> None:
            updates.append(update)
            told.set()

        job = {"id": "job", "input": {"action": "loras.prefetch", "loras": [url]}}

        async def all_of_it() -> list[Any]:
            return [piece async for piece in worker.handle(job, post)]

        asking = asyncio.create_task(all_of_it())
        await asyncio.wait_for(told.wait(), PATIENCE)
        assert updates[0]["phase"] == "downloading" and 0 < updates[0]["fraction"] <= 0.5
        gate.set()
        return await asking

    (answer,) = asyncio.run(scene())
    assert answer["loras"][0]["origin"] == "downloaded", answer
    assert updates[-1]["fraction"] == 1.0


def test_models_are_the_base_and_the_adapters_with_names(worker: TextWorker, cache: Path) -> None:
    ask(worker, action="library.activate", name="other")
    listed = ask(worker, openai_route="/v1/models")["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [
        ("base", None),
        ("named", "base"),
        ("other", "base"),
    ]


def test_an_adapter_that_matches_nothing_is_an_error_and_a_part_is_told(
    worker: TextWorker, cache: Path
) -> None:
    whole = tensors_of(folder("plain") / "adapter_model.safetensors")
    for name, rename in (
        ("nothing", lambda n, key: f"base_model.model.elsewhere.{key}"),
        ("half", lambda n, key: key.replace("layers.1", "layers.9")),
    ):
        path = cache / name
        path.mkdir(exist_ok=True)
        tensors = {rename(n, key): tensor for n, (key, tensor) in enumerate(whole.items())}
        save_file(tensors, path / "adapter_model.safetensors")
        shutil.copy(folder("plain") / "adapter_config.json", path)
    assert refused(worker, prompt="a", loras=["nothing"])["code"] == "LORA_INCOMPATIBLE"
    half = ask(worker, prompt="a", loras=["half"], sampling_params=GREEDY)
    assert "14 of 28 tensors were not used" in " ".join(half["warnings"])
    assert len(half["loras"][0]["unused_keys"]) == 14
    strict = refused(worker, prompt="a", loras=["half"], strict_loras=True)
    assert strict["code"] == "LORA_UNSUPPORTED"


def test_an_adapter_with_a_vocabulary_of_its_own_is_refused_with_the_reason(
    worker: TextWorker, cache: Path
) -> None:
    path = cache / "wider"
    shutil.copytree(folder("plain"), path, dirs_exist_ok=True)
    tensors = tensors_of(path / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(300, 32)
    save_file(tensors, path / "adapter_model.safetensors")
    error = refused(worker, prompt="a", loras=["wider"])
    assert error["code"] == "LORA_UNSUPPORTED" and "vocabulary of its own" in error["message"]


def test_an_adapters_own_chat_template_is_taken(worker: TextWorker, cache: Path) -> None:
    path = cache / "speaks"
    shutil.copytree(folder("plain"), path, dirs_exist_ok=True)
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    answer = ask(worker, messages=QUESTION, loras=["speaks"], sampling_params=GREEDY)
    tokens = tokenizer().encode(QUESTION[0]["content"])
    assert words(answer) == right("plain", tokens)
    (path / "chat_template.jinja").write_text("{{ ''.__class__ }}{{ 9 ** 9 ** 9 }}")
    assert refused(worker, messages=QUESTION, loras=["speaks"])["code"] == "CHAT_TEMPLATE_FAILED"
    (path / "chat_template.jinja").unlink()
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    again = ask(worker, messages=QUESTION, loras=["speaks"], sampling_params=GREEDY)
    assert words(again) == words(answer)
    unused = ask(
        worker, messages=QUESTION, loras=[{"path": "speaks", "scale": 0}], sampling_params=GREEDY
    )
    assert words(unused) == right(None, prompt_tokens())
    config.write_text("{")
    error = refused(worker, messages=QUESTION, loras=["speaks"])
    assert error["code"] == "LORA_CORRUPT" and "speaks" in error["message"]
    assert words(ask(worker, prompt="abc", loras=["speaks"], sampling_params=GREEDY))


@pytest.mark.parametrize(
    ("values", "code", "said"),
    [
        ({}, "INVALID_INPUT", "prompt or messages"),
        ({"prompt": ""}, "INVALID_INPUT", "prompt is required"),
        ({"prompt": "a", "messages": QUESTION}, "INVALID_INPUT", "only one"),
        ({"messages": [{"content": "x"}]}, "INVALID_INPUT", "role"),
        ({"messages": [{"role": "user", "content": 3}]}, "INVALID_INPUT", "content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "INVALID_INPUT",
            "only parts of the type text",
        ),
        ({"prompt": "a", "sampling_params": {"temprature": 1}}, "INVALID_INPUT", "temperature"),
        ({"prompt": "a", "sampling_params": {"top_p": 2}}, "INVALID_INPUT", "top_p"),
        ({"prompt": "a", "sampling_params": 3}, "INVALID_INPUT", "sampling_params"),
        ({"prompt": "a" * 300}, "INVALID_INPUT", "300 tokens"),
        ({"prompt": "a", "sampling_params": {"max_tokens": 256}}, "INVALID_INPUT", "256"),
        ({"prompt": [1, 99999]}, "INVALID_INPUT", "99999"),
        ({"prompt": "a", "model": "plan"}, "MODEL_NOT_FOUND", "plain"),
        ({"prompt": "a", "model": "base:othr"}, "MODEL_NOT_FOUND", "other"),
        ({"prompt": "a", "lora_selection": "nobody"}, "LORA_NOT_FOUND", "nobody"),
        ({"prompt": "a", "loras": ["no-such-file.safetensors"]}, "LORA_NOT_FOUND", "no-such-file"),
        ({"prompt": "a", "loras": [{"path": "plain", "start": 0.5}]}, "INVALID_INPUT", "start"),
        (
            {"prompt": "a", "loras": [{"path": "plain", "scale": {"unet": 1}}]},
            "INVALID_INPUT",
            "sc",
        ),
        ({"openai_route": "/v1/embeddings", "openai_input": {}}, "INVALID_INPUT", "embeddings"),
        ({"openai_route": "/v1/chat/completions"}, "INVALID_INPUT", "openai_input"),
        ({"prompt": "a", "response_format": {"type": "grammar"}}, "INVALID_INPUT", "json_schema"),
        (
            {"prompt": "a", "response_format": {"type": "json_schema"}},
            "INVALID_INPUT",
            "schema is not an object",
        ),
        (
            {
                "prompt": "a",
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}},
            },
            "SCHEMA_UNSUPPORTED",
            "not",
        ),
        ({"messages": QUESTION, "tools": [{"type": "function"}]}, "INVALID_INPUT", "no functions"),
        ({"messages": QUESTION, "tool_choice": "required"}, "INVALID_INPUT", "no functions"),
        ({"prompt": "a", "sampling_params": {"logit_bias": {"999": 1}}}, "INVALID_INPUT", "999"),
        ({"prompt": "a", "sampling_params": {"logit_bias": {"9": 1e9}}}, "INVALID_INPUT", "100"),
        ({"prompt": "a", "sampling_params": {"stop_token_ids": [-1]}}, "INVALID_INPUT", "-1"),
        ({"action": "no.such"}, "INVALID_INPUT", "statistics"),
    ],
)
def test_bad_input_gets_openais_shape_with_our_code(
    worker: TextWorker, values: dict[str, Any], code: str, said: str
) -> None:
    error = refused(worker, **values)
    assert (error["code"], said in error["message"]) == (code, True), error


def test_a_schema_is_held_to_streamed_or_not_with_an_adapter_or_without(
    worker: TextWorker,
) -> None:
    schema = {"type": "array", "items": {"enum": ["yes", "no"]}, "minItems": 1, "maxItems": 3}
    form = {"type": "json_schema", "json_schema": {"name": "votes", "schema": schema}}
    body = {
        "messages": QUESTION,
        "response_format": form,
        "max_tokens": 200,
        "seed": 3,
        "n": 2,
        "tools": None,
        "tool_choice": "none",
    }
    for loras in ([], ["plain"], ["dora"]):
        whole = ask(worker, openai_input={**body, "loras": loras})
        told = asyncio.run(pieces(worker, openai_input={**body, "loras": loras, "stream": True}))
        made = ["", ""]
        for event in events(told):
            for choice in event["choices"]:
                made[choice["index"]] += choice["delta"].get("content", "")
        assert made == [choice["message"]["content"] for choice in whole["choices"]]
        for text in made:
            assert set(json.loads(text)) <= {"yes", "no"} and json.loads(text)


def test_a_json_object_is_a_whole_object_or_ends_for_its_length(worker: TextWorker) -> None:
    rules = {"max_tokens": 150, "temperature": 1, "seed": 1, "min_tokens": 3}
    answer = ask(
        worker,
        prompt="a",
        response_format={"type": "json_object"},
        sampling_params={**rules, "logit_bias": {str(tokenizer().encode("}")[0]): 30}},
    )
    assert isinstance(json.loads(words(answer)), dict)
    assert "min_tokens has no effect with response_format" in answer["warnings"][0]


def test_what_has_no_effect_is_told(worker: TextWorker) -> None:
    answer = ask(worker, openai_input={"messages": QUESTION, "user": "me", "max_tokens": 2})
    assert answer["warnings"] == ["user has no effect here"]


def test_presets_are_served_and_a_default_is_none_where_a_model_is_named(
    worker: TextWorker,
) -> None:
    ask(worker, action="presets.set", name="both", loras=[{"path": "plain", "scale": 0.5}, "other"])
    answer = ask(worker, prompt="abc", lora_selection="both", sampling_params=GREEDY)
    assert [(one["file"].split("/")[0], one["scale"]) for one in answer["loras"]] == [
        ("plain", 0.5),
        ("other", 1.0),
    ]
    listed = ask(
        worker,
        prompt="abc",
        loras=[{"path": "plain", "scale": 0.5}, "other"],
        sampling_params=GREEDY,
    )
    assert words(listed) == words(answer)


def test_statistics_count_texts_under_their_models_names(worker: TextWorker) -> None:
    ask(worker, prompt="a", model="other", sampling_params=GREEDY)
    told = ask(worker, action="statistics")
    assert told["models"]["other"]["texts"] >= 1
    assert told["models"]["other"]["tokens_per_second"] > 0
    assert 'worker_text_texts_total{model="other"}' in told["prometheus"]
    assert ask(worker, action="health")["kind"] == "text"


def test_who_stops_listening_ends_the_text_within_a_step(worker: TextWorker) -> None:
    async def leave() -> None:
        job = {"id": "gone", "input": {"prompt": "abc", "stream": True}}
        job["input"]["sampling_params"] = {"max_tokens": 250, "ignore_eos": True}  # type: ignore[index]
        stream = worker.handle(job)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    until(lambda: worker.base.scheduler.counts["running"] == 0)


def test_a_cancelled_task_ends_the_text(worker: TextWorker) -> None:
    async def cancel() -> None:
        values = {"prompt": "abc", "sampling_params": {"max_tokens": 250, "ignore_eos": True}}
        task = asyncio.ensure_future(pieces(worker, **values))
        while not worker.base.scheduler.counts["running"]:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    until(lambda: worker.base.scheduler.counts["running"] == 0)


def test_after_all_this_every_weight_is_what_it_was(worker: TextWorker) -> None:
    until(lambda: not worker.base.engine.undo.pending)
    now = worker.base.text.model.state_dict()
    assert all(torch.equal(now[name], was) for name, was in base().state_dict().items())


def preloading(model_folder: Path, cache: Path, **more: Any) -> TextWorker:
    settings = TextSettings(model=str(model_folder), lora_cache_dir=cache, device="cpu", **more)
    return TextWorker(settings).setup()


def test_preloaded_adapters_are_told_and_a_fit_worker_passes(
    model_folder: Path, cache: Path, own_fallback: None
) -> None:
    worker = preloading(model_folder, cache, lora_preload="plain, no-such-one")
    until(lambda: "under way" not in worker.preloaded.values())
    worker.check_fitness()
    told = ask(worker, action="health")["preloaded"]
    assert told["plain"] == "ready" and told["no-such-one"].startswith("LORA_NOT_FOUND")
    worker.close()


@pytest.mark.parametrize(
    "more", [{"lora_preload": "https://"}, {"lora_modules": '[{"name": "x", "path": "../up"}]'}]
)
def test_a_malformed_source_makes_the_worker_unfit(
    model_folder: Path, cache: Path, own_fallback: None, more: dict[str, str]
) -> None:
    worker = preloading(model_folder, cache, **more)
    until(lambda: "under way" not in worker.preloaded.values())
    with pytest.raises(SourceInvalid):
        worker.check_fitness()
    worker.close()
