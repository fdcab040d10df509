"""TEXT_ENGINE=vllm: a request is checked here and handed to a vLLM server, whose API a stand-in speaks."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file as tensors_of
from safetensors.torch import save_file

from settings import SettingsError
from tests.conftest import ROOT
from tests.text.small import adapter, base, engine_of, folder, generated, text_model, tokenizer
from tests.vllm_stub import VllmStub
from tests.waiting import PATIENCE, until
from tests.worker.text.test_worker import ask, pieces, refused, words
from text.vllm import EngineFailed
from text_settings import TextSettings
from worker.text.vllm import VllmBase
from worker.text.worker import TextWorker

QUESTION = [{"role": "user", "content": "What is this?"}]
CHAT, LOAD, UNLOAD = "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "small-model"
    base().config.save_pretrained(path)  # no weights, and no tokenizer: the server has them
    return path


@pytest.fixture
def stub() -> Iterator[VllmStub]:
    with VllmStub("small-model") as made:
        yield made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for kind in ("plain", "other", "ranked", "head", "dora", "saved", "loha"):
        shutil.copytree(folder(kind), tmp_path / "cache" / kind)
    return tmp_path / "cache"


def settings(model_folder: Path, cache: Path, url: str, **more: Any) -> TextSettings:
    return TextSettings(
        model=str(model_folder),
        served_name="mine",
        lora_cache_dir=cache,
        engine="vllm",
        vllm_url=url,
        **more,
    )


@pytest.fixture
def worker(
    model_folder: Path, cache: Path, stub: VllmStub, own_fallback: None
) -> Iterator[TextWorker]:
    made = TextWorker(settings(model_folder, cache, stub.url)).setup()
    yield made
    made.close()


def published(stub: VllmStub) -> Path:
    return Path(stub.asked(LOAD)[-1]["lora_path"])


def test_a_request_is_handed_on_and_the_answer_is_in_our_words(
    worker: TextWorker, stub: VllmStub
) -> None:
    answer = ask(
        worker, messages=QUESTION, sampling_params={"temperature": 0.5, "top_k": 3, "max_tokens": 5}
    )
    assert words(answer) == "small-model hears What is this?"
    assert (answer["model"], answer["loras"], answer["warnings"]) == ("mine", [], [])
    (body,) = stub.asked(CHAT)
    assert body["model"] == "small-model" and body["seed"] == answer["seed"]
    assert (body["temperature"], body["top_k"], body["max_tokens"]) == (0.5, 3, 5)
    assert not {"loras", "user", "tools", "strict_loras"} & body.keys()
    completed = ask(worker, prompt=[1, 2], sampling_params={"seed": 2**64 - 1})
    assert words(completed) == "small-model hears [1, 2]" and completed["seed"] == 2**64 - 1
    assert stub.asked("/v1/completions")[0]["seed"] == -1


def test_an_adapter_is_loaded_once_under_its_contents_name(
    worker: TextWorker, stub: VllmStub
) -> None:
    first = ask(worker, messages=QUESTION, model="plain")
    again = ask(worker, messages=QUESTION, model="mine:plain")
    scaled = ask(worker, messages=QUESTION, loras=[{"path": "plain", "scale": 0.5}])
    names = [body["lora_name"] for body in stub.asked(LOAD)]
    assert len(names) == len(set(names)) == 2
    assert [words(one).split()[0] for one in (first, again, scaled)] == [
        names[0],
        names[0],
        names[1],
    ]
    assert first["model"] == "plain" and first["loras"][0]["status"] == "applied"
    shutil.copytree(
        folder("plain", seed=3), worker.settings.lora_cache_dir / "plain", dirs_exist_ok=True
    )
    ask(worker, messages=QUESTION, model="plain")  # the same name with another content
    assert len(stub.asked(LOAD)) == 3
    none = ask(worker, messages=QUESTION, loras=[{"path": "plain", "scale": 0}])
    assert words(none).startswith("small-model ") and len(stub.asked(LOAD)) == 3


@pytest.mark.parametrize(
    "loras", [["plain"], ["ranked"], ["head"], [{"path": "other", "scale": -0.7}]]
)
def test_what_is_published_is_the_adapter_as_peft_reads_it(
    worker: TextWorker, stub: VllmStub, loras: list[Any]
) -> None:
    ask(worker, prompt="a", loras=loras)
    entry = loras[0] if isinstance(loras[0], dict) else {"path": loras[0], "scale": 1.0}
    own, theirs = text_model().model, text_model().model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right: Any = PeftModel.from_pretrained(own, str(folder(entry["path"])))
        made: Any = PeftModel.from_pretrained(theirs, str(published(stub)))
    for module in right.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {
                name: scaling * entry["scale"] for name, scaling in module.scaling.items()
            }
    prompt = tokenizer().encode("What is this?")
    assert generated(made, prompt, 12) == generated(right, prompt, 12)
    assert generated(made, prompt, 12) != generated(base(), prompt, 12)


def test_a_stack_is_published_as_the_sum_of_its_adapters(
    worker: TextWorker, stub: VllmStub
) -> None:
    ask(worker, prompt="a", loras=[{"path": "plain", "scale": 0.5}, "other"])
    tensors = tensors_of(published(stub) / "adapter_model.safetensors")
    engine = engine_of(text_model())
    wanted: dict[str, Any] = {}
    for kind, scale in (("plain", 0.5), ("other", 1.0)):
        for layer in adapter(engine, kind).layers:
            part = layer.algorithm.low_rank()
            assert part is not None
            delta = scale * part.scaling * part.up.float() @ part.down.float()
            wanted[layer.target.path] = wanted.get(layer.target.path, 0) + delta
    assert len(tensors) == 2 * len(wanted)
    for path, delta in wanted.items():
        stem = f"base_model.model.{path}"
        made = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        assert (made - delta).abs().max() < 1e-5
        assert tensors[f"{stem}.lora_A.weight"].shape[0] == 12


def test_what_vllm_would_serve_wrongly_is_refused_by_name(
    worker: TextWorker, stub: VllmStub, cache: Path
) -> None:
    tensors = tensors_of(folder("plain") / "adapter_model.safetensors")
    for name, rename in (("nothing", "elsewhere."), ("biased", "")):
        shutil.copytree(folder("plain"), cache / name)
        made = {
            f"base_model.model.{rename}{k.removeprefix('base_model.model.')}": t
            for k, t in tensors.items()
        }
        if name == "biased":
            stem = next(key for key in tensors if "q_proj.lora_B" in key).removesuffix(".weight")
            made[f"{stem}.bias"] = tensors[f"{stem}.weight"][:, 0].clone()
        save_file(made, cache / name / "adapter_model.safetensors")
    for name, code, said in (
        ("nothing", "LORA_INCOMPATIBLE", ""),
        ("dora", "LORA_UNSUPPORTED", "dora"),
        ("saved", "LORA_UNSUPPORTED", "norm"),
        ("loha", "LORA_UNSUPPORTED", "loha"),
    ):
        error = refused(worker, prompt="a", model=name)
        assert (error["code"], said in error["message"]) == (code, True), error
    error = refused(worker, prompt="a", model="biased", strict_loras=True)
    assert error["code"] == "LORA_UNSUPPORTED" and "bias" in error["message"]
    error = refused(worker, prompt="a", loras=["plain", "other", "ranked", "other"])
    assert (
        "rank 24 is over the server's 16" in error["message"] and "MAX_LORA_RANK" in error["hint"]
    )
    assert stub.calls == []


def test_a_stream_is_the_servers_with_ours_in_its_last_event(
    worker: TextWorker, stub: VllmStub
) -> None:
    told = asyncio.run(
        pieces(
            worker,
            messages=[{"role": "user", "content": "caf\N{FOX FACE}"}],
            stream=True,
            model="plain",
        )
    )
    lines = [line for line in "".join(told).split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == f"{stub.asked(LOAD)[0]['lora_name']} hears caf\N{FOX FACE}"
    assert {event["model"] for event in events} == {"plain"}
    assert [("seed" in event, "loras" in event) for event in events[:-1]] == [(False, False)] * (
        len(events) - 1
    )
    assert (
        events[-1]["loras"][0]["status"] == "applied"
        and events[-1]["choices"][0]["finish_reason"] == "stop"
    )


def test_a_stream_that_breaks_off_is_an_error(worker: TextWorker, stub: VllmStub) -> None:
    stub.cut = True
    *_, last = asyncio.run(pieces(worker, messages=QUESTION, stream=True))
    assert last["error"]["code"] == "ENGINE_FAILED"


def test_who_stops_listening_ends_the_servers_request(worker: TextWorker, stub: VllmStub) -> None:
    stub.endless.set()

    async def leave() -> None:
        stream = worker.handle(
            {"id": "gone", "input": {"prompt": "abc", "stream": True, "model": "plain"}}
        )
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert stub.broken_off.wait(PATIENCE)
    until(lambda: worker.base.counts["running"] == 0)
    stub.endless.clear()


def test_a_server_that_has_forgotten_an_adapter_gets_it_again(
    worker: TextWorker, stub: VllmStub
) -> None:
    first = ask(worker, prompt="a", model="plain")
    stub.adapters.clear()  # it was started anew
    assert words(ask(worker, prompt="a", model="plain")) == words(first)
    assert len(stub.asked(LOAD)) == 2


def test_a_server_that_had_an_adapter_before_this_worker_keeps_it(
    worker: TextWorker, stub: VllmStub, model_folder: Path, cache: Path
) -> None:
    first = ask(worker, prompt="a", model="plain")
    other = TextWorker(settings(model_folder, cache, stub.url)).setup()
    assert words(ask(other, prompt="a", model="plain")) == words(first)
    other.close()


def test_adapters_used_longest_ago_make_room_and_those_in_use_do_not(
    worker: TextWorker, stub: VllmStub
) -> None:
    assert isinstance(worker.base, VllmBase)
    worker.base.server._most = 2
    names = {}
    for kind in ("plain", "other", "plain", "ranked"):
        names[kind] = words(ask(worker, prompt="a", model=kind)).split()[0]
    assert [body["lora_name"] for body in stub.asked(UNLOAD)] == [names["other"]]
    worker.base.server.hold(names["plain"])
    ask(worker, prompt="a", model="other")
    assert stub.asked(UNLOAD)[-1]["lora_name"] == names["ranked"]
    assert names["plain"] in stub.adapters
    worker.base.server.release(names["plain"])


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        (CHAT, 400, "INVALID_INPUT"),
        (CHAT, 500, "ENGINE_FAILED"),
        (LOAD, 500, "ENGINE_FAILED"),
        (LOAD, 404, "ENGINE_FAILED"),
    ],
)
def test_what_the_server_refuses_is_told_in_its_words(
    worker: TextWorker, stub: VllmStub, path: str, status: int, code: str
) -> None:
    stub.fails[path] = status, "too long by 5 tokens"
    error = refused(worker, messages=QUESTION, model="plain")
    assert error["code"] == code
    runtime = (path, status) == (LOAD, 404)
    assert ("VLLM_ALLOW_RUNTIME_LORA_UPDATING" if runtime else "too long by 5") in error["message"]


def test_an_adapters_chat_template_goes_with_the_request(
    worker: TextWorker, stub: VllmStub, cache: Path
) -> None:
    (cache / "plain" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    ask(worker, messages=QUESTION, model="plain")
    assert stub.asked(CHAT)[0]["chat_template"] == "{{ messages[0].content }}"


def test_actions_are_answered_beside(worker: TextWorker) -> None:
    health = ask(worker, action="health")
    assert (health["kind"], health["engine"], health["running"]) == ("text", "vllm", 0)
    assert "vllm:num_requests" in ask(worker, action="statistics")["prometheus"]
    assert ask(worker, action="library.activate", name="plain")["state"] == "active"


def test_a_server_with_another_base_is_refused(model_folder: Path, cache: Path) -> None:
    with VllmStub("somebody-else") as stub, pytest.raises(EngineFailed) as refusal:
        TextWorker(settings(model_folder, cache, stub.url)).setup()
    assert "serves somebody-else" in str(refusal.value)


def test_a_server_is_started_and_ended_with_the_worker(
    model_folder: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_fallback: None,
) -> None:
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncd {ROOT}\nexec {sys.executable} -m tests.vllm_stub "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    worker = TextWorker(settings(model_folder, cache, "")).setup()
    process = worker.base._process  # type: ignore[union-attr]
    try:
        assert words(ask(worker, prompt="a")) == "mine hears a"
    finally:
        worker.close()
    assert process.poll() is not None


def test_a_server_that_ends_as_it_starts_is_an_error(
    model_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineFailed, match=r"no vllm here"):
        TextWorker(settings(model_folder, cache, "")).setup()
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(EngineFailed, match="ended with 3"):
        TextWorker(settings(model_folder, cache, "")).setup()


@pytest.mark.parametrize(
    "wrong", [{"max_lora_rank": "many"}, {"quantisation": "int8"}, {"max_memory_gb": 3.0}]
)
def test_settings_that_vllm_cannot_keep_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        TextSettings(engine="vllm", **wrong)
