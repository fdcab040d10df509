"""No frame belongs to two looks: each is, bit for bit, what it is without the others."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from handler import Worker
from live.looks import Look, Looks
from live.painter import Drawn, Painter, Ticket
from live.queue import Waiting
from live.request import Asked, parse_frame
from lora.engine.stack import Mode
from lora.errors import LoraIncompatible
from pipelines.live import Guidance, LiveStream, Spec
from tests.live.streams import PROMPT, picture
from tests.test_handler import pipeline_unchanged

LORAS = {
    "none": [],
    "stripes": ["demo-stripes"],
    "outline": ["demo-outline"],
    "both": [{"path": "demo-stripes", "scale": 0.6}, {"path": "demo-outline", "scale": 0.8}],
    "spiral": ["demo-spiral"],
    "weak": [{"path": "demo-stripes", "scale": 0.3}],
    "late": [{"path": "demo-outline", "start": 0.5}],
}
"""`spiral` changes the text encoders, too; `late` begins at the second of two steps."""

NIGHT = ["demo-night"]
"""A LoHa: it has no factors."""


def looks_of(worker: Worker) -> dict[str, Look]:
    looks = Looks(worker.parts.library, worker.parts.selection)
    asked = {
        name: Asked(prompt=PROMPT, seed=5).changed(parse_frame({"loras": loras}))
        for name, loras in {**LORAS, "night": NIGHT}.items()
    }
    made = {name: looks.of(one, fetch=True) for name, one in asked.items()}
    return {name: look for name, look in made.items() if look}


def new_painter(worker: Worker, steps: int = 2, **options: object) -> Painter:
    guidance = options.pop("guidance", Guidance.NONE)
    spec = Spec(64, 64, {1: (30,), 2: (25, 38), 4: (20, 28, 36, 44)}[steps], guidance)  # type: ignore[arg-type]
    stream = LiveStream(worker.parts.pipeline, spec)
    done: list[Drawn] = []
    painter = Painter(stream, worker.parts.engine, done.append, **options)  # type: ignore[arg-type]
    painter.done = done  # type: ignore[attr-defined]
    return painter


def ticket(look: Look, number: int) -> Ticket:
    return Ticket(Waiting(number, b"", look), look, picture(number))


def drawn(painter: Painter, frames: Sequence[tuple[Look, int]]) -> dict[int, Drawn]:
    """By the frames' places in the stream."""
    painter.done.clear()  # type: ignore[attr-defined]
    for place, (look, number) in enumerate(frames):
        one = ticket(look, number)
        one.waiting.seq = place
        painter.draw(one)
    painter.drain()
    painter.close()
    return {one.ticket.waiting.seq or 0: one for one in painter.done}  # type: ignore[attr-defined]


def pixels(frames: dict[int, Drawn]) -> dict[int, bytes]:
    return {place: one.image.tobytes() for place, one in frames.items()}


@pytest.mark.parametrize("mode", [Mode.DYNAMIC, Mode.MERGED])
def test_one_by_one_each_frame_is_what_it_is_alone(demo_worker: Worker, mode: Mode) -> None:
    looks, chance = looks_of(demo_worker), random.Random(7)
    names = [*LORAS, "night"] if mode is Mode.DYNAMIC else ["none", "stripes", "both", "night"]
    order = [(chance.choice(names), chance.randrange(3)) for _ in range(24)]
    with pipeline_unchanged(demo_worker):
        alone: dict[tuple[str, int], bytes] = {}
        for one in sorted(set(order)):
            demo_worker.parts.engine.free()
            painter = new_painter(demo_worker, mode=mode)
            alone[one] = pixels(drawn(painter, [(looks[one[0]], one[1])]))[0]
        painter = new_painter(demo_worker, mode=mode)
        made = pixels(drawn(painter, [(looks[name], number) for name, number in order]))
    assert [made[place] == alone[one] for place, one in enumerate(order)] == [True] * len(order)
    assert len({alone[name, 0] for name in names if (name, 0) in alone}) > 3


@pytest.mark.parametrize(
    ("steps", "guidance", "count"),
    [
        (2, Guidance.NONE, 12),
        (4, Guidance.NONE, 10),
        (2, Guidance.INITIALIZE, 5),
        (2, Guidance.FULL, 5),
    ],
)
def test_in_a_stream_batch_each_frame_is_what_it_is_under_its_look_alone(
    demo_worker: Worker, steps: int, guidance: Guidance, count: int
) -> None:
    looks, chance = looks_of(demo_worker), random.Random(steps)
    names = [chance.choice(list(LORAS)) for _ in range(count)]
    with pipeline_unchanged(demo_worker):
        painter = new_painter(demo_worker, steps, stream_batch=True, guidance=guidance)
        for look in looks.values():
            painter.warm(look)  # all adapters have their columns from now on
        mixed = pixels(drawn(painter, [(looks[name], place) for place, name in enumerate(names)]))
        for name in sorted(set(names))[:4]:
            last = max(place for place, one in enumerate(names) if one == name)
            uniform = pixels(drawn(painter, [(looks[name], place) for place in range(last + 1)]))
            mine = [place for place, one in enumerate(names) if one == name]
            assert all(mixed[place] == uniform[place] for place in mine), name
        assert len(set(mixed.values())) == count


def test_a_stream_batch_draws_what_one_by_one_draws(demo_worker: Worker) -> None:
    """But for last digits: a product of another shape adds up in another order."""
    looks = looks_of(demo_worker)
    frames = [(looks[name], 3) for name in ("stripes", "both", "spiral", "late", "none", "outline")]
    batch = drawn(new_painter(demo_worker, 4, stream_batch=True), frames)
    single = drawn(new_painter(demo_worker, 4), frames)
    for place in range(len(frames)):
        first, second = (
            torch.frombuffer(bytearray(one[place].image.tobytes()), dtype=torch.uint8).float()
            for one in (batch, single)
        )
        assert (first - second).abs().max() <= 2


def test_what_cannot_be_a_row_waits_until_the_batch_is_drained(demo_worker: Worker) -> None:
    looks = looks_of(demo_worker)
    names = ["stripes", "stripes", "night", "outline", "stripes", "night"]
    frames = [(looks[name], 2) for name in names]
    with pipeline_unchanged(demo_worker):
        made = drawn(new_painter(demo_worker, 4, stream_batch=True), frames)
        alone = pixels(drawn(new_painter(demo_worker, 4), frames))
    assert [made[place].alone is not None for place in range(6)] == [n == "night" for n in names]
    assert "loha" in (made[2].alone or "")
    assert [made[place].how for place in range(6)][:3] == ["row", "row", "dynamic"]
    assert made[2].image.tobytes() == alone[2]


def test_prompts_of_other_lengths_share_no_batch_and_no_frame_is_lost(demo_worker: Worker) -> None:
    looks = Looks(demo_worker.parts.library, demo_worker.parts.selection)
    short = looks.of(Asked(prompt=PROMPT, seed=5), fetch=True)
    long = looks.of(
        Asked(prompt=f"{PROMPT} BREAK a small green square on a white background", seed=5),
        fetch=True,
    )
    assert short and long
    frames = [(short, 0), (long, 0), (long, 0), (short, 0)]
    made = pixels(drawn(new_painter(demo_worker, 4, stream_batch=True), frames))
    assert made[0] == made[3] != made[1] == made[2]


def test_a_frame_that_cannot_be_applied_harms_no_frame_under_way(demo_worker: Worker) -> None:
    looks = looks_of(demo_worker)
    huge = Look(
        uses=tuple(use.of(use.lora) for use in looks["stripes"].uses),
        loaded=looks["stripes"].loaded,
        prompt=PROMPT,
        seed=5,
    )
    object.__setattr__(huge.uses[0], "scale", 1e300)
    with pipeline_unchanged(demo_worker):
        painter = new_painter(demo_worker, 4, stream_batch=True)
        painter.draw(ticket(looks["outline"], 1))
        painter.draw(ticket(looks["none"], 2))
        with pytest.raises(LoraIncompatible, match="overflows"):
            painter.draw(ticket(huge, 3))
        painter.drain()
        painter.close()
        done = painter.done  # type: ignore[attr-defined]
        again = new_painter(demo_worker, 4, stream_batch=True)
        wanted = drawn(again, [(looks["outline"], 1), (looks["none"], 2)])
    assert [one.ticket.waiting.seq for one in done] == [1, 2]
    assert done[1].image.tobytes() == wanted[1].image.tobytes()


def test_letting_the_model_go_between_frames_changes_no_frame(demo_worker: Worker) -> None:
    looks = looks_of(demo_worker)
    frames = [(looks[name], place) for place, name in enumerate(["stripes", "both", "spiral"] * 2)]
    for batch in (False, True):
        painter = new_painter(demo_worker, 2, stream_batch=batch)
        for look in looks.values():
            painter.warm(look)
        wanted = pixels(drawn(painter, frames))
        painter.done.clear()  # type: ignore[attr-defined]
        with pipeline_unchanged(demo_worker):
            for place, (look, number) in enumerate(frames):
                one = ticket(look, number)
                one.waiting.seq = place
                painter.draw(one)
                painter.close()
            painter.drain()
            painter.close()
        again = {one.ticket.waiting.seq: one.image.tobytes() for one in painter.done}  # type: ignore[attr-defined]
        assert again == wanted


def test_a_baked_look_is_merged_while_the_painter_is_open(demo_worker: Worker) -> None:
    looks = looks_of(demo_worker)
    weight = demo_worker.parts.pipeline.base.unet.conv_in.weight
    for name in ("both", "spiral", "night"):
        baked = looks[name]
        with pipeline_unchanged(demo_worker):
            before = next(iter(demo_worker.parts.pipeline.base.unet.parameters())).clone()
            painter = new_painter(demo_worker, 2, baked=baked)
            painter.draw(ticket(baked, 1))
            (one,) = painter.done  # type: ignore[attr-defined]
            assert one.how == "baked" and "forward" not in weight.__dict__
            changed = [
                module
                for module in demo_worker.parts.pipeline.base.unet.modules()
                if "forward" in module.__dict__
            ]
            assert changed == []
            painter.close()
            assert torch.equal(
                before, next(iter(demo_worker.parts.pipeline.base.unet.parameters()))
            )
        merged = new_painter(demo_worker, 2, mode=Mode.MERGED)
        assert one.image.tobytes() == drawn(merged, [(baked, 1)])[0].image.tobytes()


def test_a_prompt_is_encoded_again_only_where_that_changes_something(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, calls = looks_of(demo_worker), []
    real = LiveStream.conditions
    monkeypatch.setattr(
        LiveStream, "conditions", lambda self, *prompts: calls.append(1) or real(self, *prompts)
    )
    painter = new_painter(demo_worker)
    for name in ("none", "stripes", "outline", "both", "night", "weak", "none"):
        painter.draw(ticket(looks[name], 0))
    assert len(calls) == 1  # none of them changes the text encoders
    for name in ("spiral", "none", "spiral", "stripes", "spiral"):
        painter.draw(ticket(looks[name], 0))
    assert len(calls) == 2  # both are kept
    painter.close()
