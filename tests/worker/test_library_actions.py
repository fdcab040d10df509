"""The library's actions, and what presets do to a job."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from handler import Worker
from lora.engine.engine import LoraEngine
from lora.errors import CodedError, LoraNotFound
from lora.library.catalog import Catalog
from lora.volume.cache import VolumeCache
from lora.volume.loader import LoraLibrary
from lora.volume.presets import Presets
from schemas import ImageRequest, parse_job
from settings import SettingsError
from tests.adapters import kohya, loha, write
from tests.conftest import ROOT
from tests.test_handler import FAST, job
from tests.worker.test_actions import ask as act
from validation import InvalidInput
from worker.actions import Actions
from worker.opening import read_settings
from worker.selection import PRESET, Chosen, Selection, ready


@pytest.fixture
def actions(engine: LoraEngine, tmp_path: Path) -> Actions:
    cache = VolumeCache(tmp_path / "loras")
    cache.shelf.prepare()
    training = tmp_path / "training"
    training.mkdir()
    catalog = Catalog(cache, engine.key_map, training)
    parts: Any = SimpleNamespace(
        catalog=catalog,
        selection=Selection(Presets(cache.shelf.root)),
        library=LoraLibrary(cache, engine.key_map),
    )
    return Actions(parts, {})


@pytest.fixture
def root(tmp_path: Path, actions: Actions) -> Path:
    return tmp_path / "loras"


def ask(actions: Actions, action: str, **values: Any) -> dict[str, Any]:
    """The answer, as JSON holds it."""
    answer = actions.answer({"input": {"action": action, **values}})
    found: dict[str, Any] = json.loads(json.dumps(answer, allow_nan=False))
    return found


def test_every_field_of_every_action_is_described(actions: Actions) -> None:
    for action in actions.table.values():
        assert all(rule["description"] for rule in action.fields.values())
        assert action.required in ("", *action.fields)


def test_the_library_is_scanned_listed_activated_and_deleted(
    actions: Actions, root: Path, tmp_path: Path
) -> None:
    write(root / "a.safetensors", kohya(), {"modelspec.trigger_phrase": "wtrclr"})
    write(tmp_path / "training" / "last.safetensors", loha())
    (root / "bad.safetensors").write_bytes(b"<html>")
    scanned = ask(actions, "library.scan")
    assert scanned == {"discovered": 2, "active": 0, "failed": 1, "looked_at": 3, "warnings": []}
    found = ask(actions, "library.list", word="wtrclr")
    assert (found["total"], found["page"], found["pages"]) == (1, 1, 1)
    one = found["loras"][0]
    assert one["name"] == one["file"] == "a.safetensors"
    assert (one["state"], one["rank"], one["words"]) == ("discovered", 4, ["wtrclr"])
    assert ask(actions, "library.activate", name="a")["state"] == "active"
    published = ask(actions, "library.activate", name="training:last")["file"]
    assert (root / published).is_file()
    active = ask(actions, "library.list", state="active", per_page=2)
    assert (active["total"], active["pages"], len(active["loras"])) == (3, 2, 2)
    assert "web page" in ask(actions, "library.list", state="failed")["loras"][0]["reason"]
    assert ask(actions, "library.deactivate", name="a")["state"] == "discovered"
    assert ask(actions, "library.delete", name="a") == {"deleted": "a.safetensors"}
    with pytest.raises(LoraNotFound):
        ask(actions, "library.activate", name="a")


def test_both_lists_pass_over_hidden_files_and_links_that_lead_out(
    actions: Actions, root: Path, tmp_path: Path
) -> None:
    write(root / "a.safetensors", kohya())
    write(root / ".hidden.safetensors", kohya())
    (root / "out.safetensors").symlink_to(write(tmp_path / "secret.safetensors", kohya()))
    for action in ("loras.list", "library.list"):
        assert [one["name"] for one in ask(actions, action)["loras"]] == ["a.safetensors"]
    with pytest.raises(LoraNotFound):
        ask(actions, "loras.delete", name=".hidden")
    assert (root / ".hidden.safetensors").exists()


@pytest.mark.parametrize("action", ["loras.delete", "library.delete"])
def test_a_peft_folder_is_deleted_with_its_config_its_state_and_its_pin(
    actions: Actions, root: Path, action: str
) -> None:
    folder = root / "fox"
    folder.mkdir()
    write(folder / "adapter_model.safetensors", kohya())
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4}')
    ask(actions, "library.scan")
    ask(actions, "loras.pin", name="fox")
    listed = ask(actions, "loras.list")["loras"]
    assert [one["name"] for one in listed] == ["fox/adapter_model.safetensors"]
    name = "fox" if action == "library.delete" else "fox/adapter_model.safetensors"
    assert ask(actions, action, name=name) == {"deleted": name}
    assert [path for path in root.iterdir() if path.name != ".incoming"] == []


def test_no_path_of_this_machine_is_answered(actions: Actions, root: Path, tmp_path: Path) -> None:
    write(tmp_path / "training" / "last.safetensors", kohya())
    ask(actions, "library.scan")
    ask(actions, "library.activate", name="training:last")
    assert str(tmp_path) not in json.dumps(ask(actions, "library.list"))


@pytest.mark.parametrize(
    ("action", "values", "said"),
    [
        ("library.list", {"state": "done"}, "state: 'done' is none of discovered, active, failed"),
        ("library.list", {"page": 0, "per_page": 5000}, "page: 0 is less than 1; per_page: 5000"),
        ("library.activate", {"name": 5}, "name: 5 is not a string"),
        ("library.scan", {"x": 1}, "x is not a field"),
        ("presets.set", {"name": "a", "loras": "x", "words": 1}, "words is not a field"),
        ("presets.set", {"name": "none", "loras": ["x"]}, "none means no preset"),
        ("presets.set", {"name": " a", "loras": ["x"]}, "blanks at its ends"),
        ("presets.set", {"name": "a" * 101, "loras": ["x"]}, "100 printable characters"),
        ("presets.set", {"name": "a"}, "loras is empty"),
        (
            "presets.set",
            {"name": "a", "loras": [5, {"path": "x", "scale": 99}]},
            "99 is more than 10",
        ),
        ("presets.set", {"name": "a", "loras": [5]}, "loras[0] names no LoRA"),
        ("presets.set", {"name": "a", "loras": ["x"] * 17}, "more than 16 entries"),
        ("presets.set", {"name": "a", "trigger_words": ["\ud800"]}, "surrogate"),
        ("presets.set", {"name": "a", "loras": ["../x"]}, "leads out of the LoRA cache"),
        ("presets.delete", {"name": "a"}, "there is no preset 'a'"),
    ],
)
def test_bad_values_are_refused(
    actions: Actions, action: str, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(CodedError) as caught:
        ask(actions, action, **values)
    assert said in str(caught.value)
    assert ask(actions, "presets.list")["presets"] == {}


def test_presets_are_kept_and_shown_without_secrets(actions: Actions, root: Path) -> None:
    url = "https://user:canary@host/a.safetensors?token=canary"
    given = {"loras": [url, {"path": "b", "scale": 0.5}], "trigger_words": ["wtrclr"]}
    answer = ask(actions, "presets.set", name="watercolor", **given)
    assert answer["loras"] == [
        {"path": "https://host/a.safetensors"},
        {"path": "b", "scale": 0.5},
    ]
    assert json.loads((root / "presets.json").read_text()) == {"watercolor": given}
    listed = ask(actions, "presets.list")
    assert "canary" not in json.dumps(listed)
    assert listed["presets"]["watercolor"]["trigger_words"] == ["wtrclr"]
    assert ask(actions, "presets.delete", name="watercolor") == {"deleted": "watercolor"}


def test_aliases_in_a_preset_are_understood_with_a_warning(actions: Actions) -> None:
    url = "https://user:canary@host/a.safetensors?token=canary"
    answer = ask(actions, "presets.set", name="p", loras=["b", {"url": url, "weight": 0.5}])
    assert answer["loras"][1] == {"path": "https://host/a.safetensors", "scale": 0.5}
    renames = ["loras[1].url was taken as path", "loras[1].weight was taken as scale"]
    assert answer["warnings"] == renames
    assert "canary" not in json.dumps(ask(actions, "presets.list"))
    chosen = choose(actions.parts.selection, "p", loras=[{"lora": "own"}]).request
    assert [(use.lora.path, use.scale) for use in chosen.loras][1:] == [(url, 0.5), ("own", 1.0)]
    assert chosen.warnings == (
        "loras[0].lora was taken as path",
        *(f"preset 'p': {sentence}" for sentence in renames),
    )


def test_one_bad_preset_does_not_break_the_others(actions: Actions, root: Path) -> None:
    bad = {"loras": [{"path": "x", "scale": "much"}], "prompt_prefx": "a"}
    text = json.dumps({"good": {"loras": ["a"]}, "bad": bad, "worse": 5})
    (root / "presets.json").write_text(text)
    found = ask(actions, "presets.list")
    assert list(found["presets"]) == ["good"]
    assert found["faults"]["bad"].startswith("preset 'bad': prompt_prefx is not a field")
    assert found["faults"]["worse"] == "presets.json: worse is not an object"
    chosen = choose(actions.parts.selection, "good")
    assert [use.lora.path for use in chosen.request.loras] == ["a"]
    with pytest.raises(InvalidInput) as caught:
        choose(actions.parts.selection, "bad")
    assert "preset 'bad'" in str(caught.value)


# --- what a job selects --------------------------------------------------------------------------


def request(**values: Any) -> ImageRequest:
    return parse_job({"input": {"prompt": "a fox", **values}})


def choose(selection: Selection, wanted: object, **values: Any) -> Chosen:
    has_loras = values.get("loras") is not None
    return selection.choose(request(lora_selection=wanted, **values), has_loras=has_loras)


def paths(chosen: Chosen) -> list[str]:
    return [use.lora.path for use in chosen.request.loras]


@pytest.fixture
def selection(tmp_path: Path) -> Selection:
    presets = Presets(tmp_path)
    presets.set(
        "watercolor",
        {
            "loras": ["w1", {"path": "w2", "scale": 0.5}],
            "prompt_prefix": "watercolor painting of",
            "prompt_suffix": ", soft light,",
            "trigger_words": ["wtrclr", "ohwx"],
        },
    )
    presets.set("ink", {"loras": ["i"], "trigger_words": ["ohwx", "ink"]})
    presets.set("ranged", {"loras": [{"path": "r", "end": 0.5}]})
    presets.set("many", {"loras": ["m"] * 16})
    return Selection(presets)


def test_a_preset_comes_before_the_jobs_own_loras(selection: Selection) -> None:
    chosen = choose(selection, "watercolor", loras=[{"path": "own", "scale": 2}])
    assert paths(chosen) == ["w1", "w2", "own"]
    assert [lora.scale for lora in chosen.request.loras] == [1.0, 0.5, 2.0]
    prompt = "watercolor painting of a fox, wtrclr, ohwx, soft light"
    assert chosen.request.prompt == prompt
    assert chosen.as_answer() == {"preset": ["watercolor"], "prompt": prompt}


def test_what_stands_in_the_prompt_is_not_added_again(selection: Selection) -> None:
    prompt = "Watercolor  painting of an OHWX fox, wtrclr (soft light)"
    chosen = choose(selection, "watercolor", prompt=prompt)
    assert chosen.request.prompt == prompt
    assert chosen.as_answer() == {"preset": ["watercolor"]}
    part = choose(selection, "ink", prompt="a pink ohwx2")
    assert part.prompt == "a pink ohwx2, ohwx, ink"


def test_presets_stack_in_their_order_and_add_each_word_once(selection: Selection) -> None:
    chosen = choose(selection, ["watercolor", "ink", "ink"])
    assert paths(chosen) == ["w1", "w2", "i"]
    assert chosen.prompt == "watercolor painting of a fox, wtrclr, ohwx, soft light, ink"
    assert chosen.presets == ("watercolor", "ink")


def test_a_job_without_a_selection_is_what_it_was(selection: Selection) -> None:
    for wanted in (None, "none", ["None"], []):
        own = request(loras=["own"], lora_selection=wanted)
        chosen = selection.choose(own, has_loras=True)
        assert chosen.request is own
        assert chosen.as_answer() == {}


def test_a_picture_without_a_prompt_gets_the_presets_words(selection: Selection) -> None:
    url = "https://example.com/a.png"
    chosen = choose(selection, "ink", prompt=None, image_url=url)
    assert chosen.prompt == "ohwx, ink"


def test_the_default_preset_is_for_jobs_that_ask_for_nothing(selection: Selection) -> None:
    with_default = Selection(selection.presets, default_preset="ink")
    assert paths(choose(with_default, None)) == ["i"]
    assert choose(with_default, None).presets == ("ink",)
    assert paths(choose(with_default, "none")) == []
    assert paths(choose(with_default, None, loras=["own"])) == ["own"]
    assert paths(choose(with_default, None, loras=[])) == []
    assert paths(choose(with_default, "ranged")) == ["r"]


def test_a_config_files_stack_is_for_jobs_that_ask_for_nothing(selection: Selection) -> None:
    stack = ({"path": "c", "scale": 0.7},)
    with_config = Selection(selection.presets, default_loras=stack)
    chosen = choose(with_config, None)
    assert (paths(chosen), chosen.request.loras[0].scale) == (["c"], 0.7)
    assert chosen.as_answer() == {}
    assert paths(choose(with_config, "none")) == []
    assert paths(choose(with_config, "ink")) == ["i"]
    assert paths(choose(with_config, None, loras=["own"])) == ["own"]


@pytest.mark.parametrize(
    ("wanted", "values", "said"),
    [
        (
            "watercolour",
            {},
            "LORA_NOT_FOUND: there is no preset 'watercolour'. Did you mean waterc",
        ),
        (["ink", "zzz"], {}, "LORA_NOT_FOUND: there is no preset 'zzz'. There are: ink, many"),
        (
            "many",
            {"loras": ["own"]},
            "INVALID_INPUT: loras: with those of the presets and tags there are 17",
        ),
        (
            "ranged",
            {"lora_mode": "merged"},
            "INVALID_INPUT: preset 'ranged': lora_mode: a LoRA with",
        ),
    ],
)
def test_a_selection_that_cannot_be_had_is_told(
    selection: Selection, wanted: object, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(CodedError) as caught:
        choose(selection, wanted, **values)
    assert str(caught.value).startswith(said)


def test_a_default_preset_that_is_gone_is_told_as_the_workers_fault(selection: Selection) -> None:
    with pytest.raises(LoraNotFound) as caught:
        choose(Selection(selection.presets, default_preset="gone"), None)
    assert "LORA_DEFAULT_PRESET: there is no preset 'gone'" in str(caught.value)


def test_the_presets_schema_says_what_each_field_means() -> None:
    assert all(rule["description"] for rule in PRESET["properties"].values())


# --- through the whole worker ----------------------------------------------------------------------


def test_a_job_draws_with_a_preset_and_says_so(demo_worker: Worker) -> None:
    preset = {"loras": [{"path": "demo-stripes", "scale": 0.5}], "trigger_words": ["striped"]}
    act(demo_worker, "presets.set", name="stripes", **preset)
    try:
        answer = demo_worker(job(lora_selection="stripes"))
        assert answer["preset"] == ["stripes"]
        assert answer["prompt"] == f"{FAST['prompt']}, striped"
        assert [(one["file"], one["scale"]) for one in answer["loras"]] == [
            ("demo-stripes.safetensors", 0.5)
        ]
        same = demo_worker(job(prompt=answer["prompt"], **{"loras": preset["loras"]}))
        assert same["images"] == answer["images"]
        assert not {"preset", "prompt"} & same.keys()
        told = demo_worker(job(lora_selection="stripse"))["error"]
        assert told == "LORA_NOT_FOUND: there is no preset 'stripse'. Did you mean stripes?"
    finally:
        act(demo_worker, "presets.delete", name="stripes")


def test_the_defaults_of_a_worker_are_for_jobs_that_ask_for_nothing(
    demo_worker: Worker, tmp_path: Path
) -> None:
    root = demo_worker.settings.lora_cache_dir
    config = tmp_path / "wan.json"
    path = str(root / "demo-night.safetensors")
    config.write_text(json.dumps({"lora_path": [path], "strength_model": 0.7}))
    settings = replace(demo_worker.settings, lora_config=str(config))
    parts = replace(demo_worker.parts, settings=settings)
    chosen = parts.selection.choose(request(), has_loras=False)
    assert paths(chosen) == ["demo-night.safetensors"]
    assert chosen.request.loras[0].scale == 0.7


def test_the_library_of_a_worker_is_its_cache_and_its_model(demo_worker: Worker) -> None:
    assert act(demo_worker, "library.scan")["failed"] == 0
    found = act(demo_worker, "library.activate", name="demo-spiral")
    assert (found["state"], found["reason"], found["algorithm"]) == ("active", None, "lora")
    assert act(demo_worker, "library.list", state="active")["total"] >= 1
    refused = demo_worker({"id": "x", "input": {"action": "library.activate"}})
    assert "name is required" in refused["error"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "LORA_CONFIG: config.json cannot be read (No such file or directory)"),
        ("{}", "LORA_CONFIG: it names no LoRA"),
        (
            '{"lora_path": "/elsewhere/a.safetensors"}',
            "a.safetensors does not lie in the LoRA cache",
        ),
        ('{"lora_path": "ftp://x/a"}', "LORA_CONFIG: 'ftp://x/a' is not an http(s) URL"),
    ],
)
def test_a_config_that_cannot_be_used_stops_the_worker_at_its_start(
    tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SettingsError) as caught:
        read_settings({"LORA_CONFIG": str(tmp_path / "config.json")})
    assert said in str(caught.value)


def test_a_default_preset_and_a_config_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"lora_path": "a"}')
    environ = {"LORA_CONFIG": str(tmp_path / "config.json"), "LORA_DEFAULT_PRESET": "ink"}
    with pytest.raises(SettingsError) as caught:
        read_settings(environ)
    assert "only one of them can be the default" in str(caught.value)


def test_the_presets_and_actions_in_the_documents_are_sound(actions: Actions) -> None:
    section = (ROOT / "docs" / "library.md").read_text().split("## Presets")[1].split("\n## ")[0]
    shown = json.loads(section.split("```json\n")[1].split("```")[0])
    for name, preset in shown.items():
        assert ready(name, preset).loras
    page = (ROOT / "docs" / "requests.md").read_text()
    table = page.split("\n## Actions\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE) == list(actions.table)
