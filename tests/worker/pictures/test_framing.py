import math

import numpy as np
import pytest
from PIL import Image

from worker.pictures.framing import drawn_size, framed


@pytest.mark.parametrize(
    ("own", "width", "height", "size"),
    [
        ((4032, 3024), 1024, 768, (1024, 768)),
        ((4032, 3024), 800, None, (800, 600)),
        ((4032, 3024), None, 600, (800, 600)),
        ((1000, 3), 800, None, (800, 8)),
        ((1024, 1024), None, None, (1024, 1024)),
        ((1216, 832), None, None, (1216, 832)),
        ((1280, 720), None, None, (1280, 720)),
        ((1001, 1023), None, None, (1000, 1016)),
        ((4032, 3024), None, None, (1184, 888)),
        ((300, 300), None, None, (1024, 1024)),
        ((16, 16), None, None, (1024, 1024)),
    ],
)
def test_the_drawn_size(
    own: tuple[int, int], width: int | None, height: int | None, size: tuple[int, int]
) -> None:
    assert drawn_size(own, width, height, 1024) == size


@pytest.mark.parametrize("own", [(100, 67), (8000, 20), (20, 8000), (5000, 5000), (17, 19)])
@pytest.mark.parametrize("side", [64, 1024])
def test_what_is_not_given_is_near_the_models_area_at_the_pictures_aspect(
    own: tuple[int, int], side: int
) -> None:
    width, height = drawn_size(own, None, None, side)
    assert width % 8 == height % 8 == 0
    lesser = min(width, height)
    assert abs(math.log((width / height) / (own[0] / own[1]))) <= 8 / lesser
    assert 0.4 <= width * height / side**2 <= 1.6 or lesser == 8


def corners(picture: Image.Image) -> list[object]:
    right, bottom = picture.width - 1, picture.height - 1
    return [picture.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)


@pytest.fixture
def flag() -> Image.Image:
    """Three upright bands, 40 x 20 pixels each: red, blue, green."""
    bands = [np.full((20, 40, 3), colour, np.uint8) for colour in (RED, BLUE, GREEN)]
    return Image.fromarray(np.concatenate(bands, axis=1))


def test_cover_cuts_evenly(flag: Image.Image) -> None:
    assert corners(framed(flag, (20, 20), "cover")) == [BLUE] * 4


def test_contain_shows_all_and_continues_the_edges(flag: Image.Image) -> None:
    found = framed(flag, (60, 60), "contain")
    assert found.size == (60, 60)
    assert corners(found) == [RED, GREEN] * 2
    assert found.getpixel((30, 3)) == BLUE


def test_contain_leaves_a_mask_black_around_it() -> None:
    found = np.asarray(framed(Image.new("L", (120, 20), 255), (60, 60), "contain"))
    assert found[25:35].min() == 255
    assert found[:25].max() == found[35:].max() == 0


def test_stretch_changes_the_aspect(flag: Image.Image) -> None:
    found = framed(flag, (30, 60), "stretch")
    assert found.size == (30, 60)
    assert corners(found) == [RED, GREEN] * 2


@pytest.mark.parametrize("mode", ["cover", "contain", "stretch"])
def test_a_picture_of_that_size_is_left_alone(flag: Image.Image, mode: str) -> None:
    assert framed(flag, flag.size, mode) is flag
