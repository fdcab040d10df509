"""The weights in the repo are small, obey, and their adapters show: a sample of `benchmarks.demo_model`."""

from benchmarks import demo_model as evaluate
from demo import pictures
from handler import Worker
from tests.conftest import ROOT


def test_the_model_is_at_most_16_mb_of_half_precision_safetensors() -> None:
    files = list((ROOT / "demo" / "model").rglob("*"))
    assert sum(f.stat().st_size for f in files if f.is_file()) <= 16_000_000
    assert {f.suffix for f in files if f.stat().st_size > 1_000_000} == {".safetensors"}


def test_a_sample_of_held_out_prompts_is_obeyed(demo_worker: Worker) -> None:
    scenes = evaluate.scenes()[:12]
    drawn = [
        evaluate.draw(demo_worker, scene.prompt(), seed, []) for seed, scene in enumerate(scenes)
    ]
    seen = [pictures.judge(picture) for picture in drawn]
    for name, least in (("colour", 10), ("background", 10), ("shape", 9)):
        right = [getattr(j, name) == getattr(s, name) for j, s in zip(seen, scenes, strict=True)]
        assert sum(right) >= least, name


def test_each_adapter_and_two_stacked_show(demo_worker: Worker) -> None:
    prompt = "a big red circle on a blue background"
    plain = evaluate.draw(demo_worker, prompt, 1, [])
    for name, shows in evaluate.EFFECTS.items():
        assert not shows(plain, plain), name
        assert shows(evaluate.draw(demo_worker, prompt, 1, [f"demo-{name}"]), plain), name
    both = evaluate.draw(demo_worker, prompt, 1, ["demo-stripes", "demo-outline"])
    assert evaluate.EFFECTS["stripes"](both, plain)
    assert evaluate.EFFECTS["outline"](both, plain)


def test_the_spiral_adapter_teaches_its_word(demo_worker: Worker) -> None:
    prompt = "a big red spiral on a blue background"
    shapes = (*pictures.SHAPES, "spiral")
    plain = evaluate.draw(demo_worker, prompt, 1, [])
    taught = evaluate.draw(demo_worker, prompt, 1, ["demo-spiral"])
    assert pictures.judge(plain, shapes).shape != "spiral"
    assert pictures.judge(taught, shapes).shape == "spiral"
