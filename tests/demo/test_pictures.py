"""The pixel rules judge drawn pictures right: else they could judge no model."""

import random

import numpy as np
import pytest

from demo import pictures


def test_held_out_combinations_are_fixed_and_of_the_world() -> None:
    held_out = pictures.held_out_combinations()
    assert held_out == pictures.held_out_combinations()
    assert len(set(held_out)) == 64
    assert set(held_out) <= set(pictures.all_combinations())


def test_drawn_pictures_are_judged_as_what_they_are() -> None:
    rng = random.Random(1)
    for combination in rng.sample(pictures.all_combinations((*pictures.SHAPES, "spiral")), 24):
        picture = pictures.draw(pictures.random_scene(rng, combination))
        seen = pictures.judge(picture, (*pictures.SHAPES, "spiral"))
        assert (seen.shape, seen.colour, seen.background) == combination
        assert seen.overlap > 0.7


@pytest.mark.parametrize("background", pictures.COLOURS)
def test_the_styles_are_measured(background: str) -> None:
    colour = "white" if background != "white" else "blue"
    scene = pictures.Scene("square", colour, background, "big")
    plain, stripes, outline, night = (
        pictures.draw(pictures.with_styles(scene, *styles))
        for styles in ((), ("stripes",), ("outline",), ("night",))
    )
    assert pictures.stripiness(plain) < 0.02
    assert pictures.stripiness(stripes) > 0.15
    assert pictures.hollowness(plain, plain) == 0
    assert pictures.hollowness(outline, plain) > 0.9
    assert pictures.brightness(night) < 0.4 * pictures.brightness(plain)


def test_noise_is_nothing_in_particular() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert pictures.judge(noise).overlap < 0.6


def test_prompts_say_an_before_orange() -> None:
    assert "an orange star" in pictures.Scene("star", "orange", "blue").prompt()
    assert "an orange background" in pictures.Scene("star", "blue", "orange").prompt()
