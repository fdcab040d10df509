import re
from typing import Any

import pytest

from live.request import Asked, parse_frame, parse_start
from pipelines.live import INDICES, spread
from validation import InvalidInput


def test_a_first_message_may_say_nothing() -> None:
    one, other = parse_start({}), parse_start({})
    assert one.values["steps"] == 2 and one.asked.prompt == ""
    assert one.asked.seed != other.asked.seed  # chosen at random, and told in the answer


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"steps": 0}, "steps: 0 is less than 1"),
        ({"t_index": [3, 3]}, "t_index: the numbers do not rise"),
        ({"t_index": []}, "t_index: the numbers do not rise"),
        ({"t_index": [50]}, "50 is more than 49"),
        ({"size": 100}, "size: 100 is not a multiple of 8"),
        ({"size": [512]}, "size"),
        ({"guidance": "some"}, "guidance: 'some' is none of none, self, initialize, full"),
        ({"colour": 1}, "colour is not a field"),
        ({"bake": True, "presets": ["a"]}, "presets: with bake there is nothing to choose"),
        ({"loras": [{"path": "a", "scale": 99}]}, "scale"),
        ({"strength": float("nan")}, "strength"),
    ],
)
def test_a_wrong_first_message_is_told_what_is_wrong(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(fault)):
        parse_start(given)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(InvalidInput, match=r"2 faults: .*(similar.*steps|steps.*similar)"):
        parse_start({"steps": 99, "similar": 7})


def test_a_frame_changes_what_it_names_and_the_rest_stays() -> None:
    asked = Asked(prompt="a", lora_selection=("one",), scales=(("x", 0.5),), seed=4)
    assert asked.changed(parse_frame({"seq": 1})) == asked
    again = asked.changed(parse_frame({"prompt": "b", "scales": {"y": 2}}))
    assert (again.prompt, dict(again.scales), again.lora_selection) == (
        "b",
        {"x": 0.5, "y": 2},
        ("one",),
    )
    other = again.changed(parse_frame({"lora_selection": "two"}))
    assert other.scales == () and other.lora_selection == ("two",)
    named = other.changed(parse_frame({"loras": ["demo-stripes"], "scales": {"demo-stripes": 0.1}}))
    assert named.has_loras and dict(named.scales) == {"demo-stripes": 0.1}
    assert named.changed(parse_frame({"seed": 9})).seed == 9


@pytest.mark.parametrize(
    "given", [{"seq": -1}, {"steps": 3}, {"scales": {"a": 1e9}}, {"wait": "no!"}]
)
def test_a_wrong_frame_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        parse_frame(given)


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("strength", [0.02, 0.1, 0.3, 0.5, 0.77, 1.0])
def test_steps_are_spread_over_the_strength(steps: int, strength: float) -> None:
    index = spread(steps, strength)
    assert len(index) == steps and list(index) == sorted(set(index))
    assert index[0] >= 0 and index[-1] < INDICES
    assert index[0] == min(round(INDICES * (1 - strength)), INDICES - steps)
