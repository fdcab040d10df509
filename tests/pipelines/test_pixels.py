"""Every mode of Pillow means a colour; the colours here are known without Pillow's conversions."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.pixels import as_mask, as_rgb, shows_through

RED, GREY, WHITE = (255, 0, 0), (128, 128, 128), (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "value", "meant"),
    [
        ("1", 1, WHITE),
        ("L", 128, GREY),
        ("P", None, RED),
        ("RGB", RED, RED),
        ("RGBA", (*RED, 255), RED),
        ("RGBX", (*RED, 0), RED),
        ("CMYK", (0, 255, 255, 0), RED),
        ("YCbCr", (76, 85, 255), RED),
        ("HSV", (0, 255, 255), RED),
        ("LAB", (138, 208, 195), RED),
        ("I;16", 32_896, GREY),
        ("I;16B", 32_896, GREY),
        ("I;16", 65_535, WHITE),
        ("I;16", 255, (1, 1, 1)),
        ("I", 32_896, GREY),
        ("I", 2**31 - 1, WHITE),
        ("I", -5, (0, 0, 0)),
        ("F", 0.5, GREY),
        ("F", 128.0, GREY),
        ("F", 32_896.0, GREY),
        ("F", float("nan"), (0, 0, 0)),
        ("LA", (128, 255), GREY),
        ("LA", (0, 0), WHITE),
        ("LA", (0, 127), GREY),
        ("La", (0, 127), GREY),
        ("PA", None, WHITE),
        ("RGBA", (0, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
        ("RGBa", (128, 0, 0, 128), (255, 127, 127)),
    ],
)
def test_a_mode_is_converted_by_its_meaning(
    mode: str, value: object, meant: tuple[int, ...]
) -> None:
    picture = Image.new(mode, (3, 2), value)  # type: ignore[arg-type]
    if mode == "P":
        picture.putpalette([*RED])
    found = as_rgb(picture)
    assert (found.mode, found.size) == ("RGB", (3, 2))
    assert np.abs(np.asarray(found).astype(int) - meant).max() <= (12 if mode == "LAB" else 1)


def test_a_palettes_transparent_colour_shows_what_is_behind() -> None:
    picture = Image.new("P", (2, 2))
    picture.putpalette([*RED, 0, 0, 255])
    picture.putpixel((0, 0), 1)
    picture.info["transparency"] = 1
    assert as_rgb(picture).getpixel((0, 0)) == WHITE
    assert as_rgb(picture).getpixel((1, 1)) == RED
    assert as_mask(picture).getpixel((0, 0)) == 0


def test_white_strokes_on_a_transparent_canvas_are_a_mask() -> None:
    canvas = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    canvas.putpixel((1, 2), (255, 255, 255, 255))
    assert np.asarray(as_mask(canvas)).nonzero() == (np.array([2]), np.array([1]))


def test_only_a_pixel_that_is_not_opaque_shows_through() -> None:
    picture = Image.new("RGBA", (4, 4), (*RED, 255))
    assert not shows_through(picture)
    picture.putpixel((1, 1), (*RED, 254))
    assert shows_through(picture)
    assert not shows_through(Image.new("L", (4, 4)))


def test_sixteen_bits_keep_their_shades() -> None:
    ramp = np.linspace(0, 65_535, 256).round().astype(np.uint16)
    picture = Image.fromarray(ramp.reshape(16, 16))
    np.testing.assert_array_equal(np.asarray(as_rgb(picture))[..., 0].ravel(), np.arange(256))


def test_a_colour_profile_is_applied_and_srgbs_own_changes_nothing() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    plain = Image.fromarray(colours)
    tagged = plain.copy()
    tagged.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(as_rgb(tagged), colours)
    lab = Image.new("LAB", (2, 2), (138, 208, 195))
    lab.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert np.abs(np.asarray(as_rgb(lab)).astype(int) - RED).max() <= 12
    for broken in (
        b"no profile",
        b"",
        ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    ):
        plain.info["icc_profile"] = broken
        np.testing.assert_array_equal(as_rgb(plain), colours)


def test_a_picture_is_turned_upright_before_it_loses_its_exif() -> None:
    for mode in ("RGB", "RGBA", "I;16"):
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6
        Image.new(mode, (5, 3)).save(buffer, "TIFF" if mode == "I;16" else "PNG", exif=exif)
        assert as_rgb(Image.open(buffer)).size == (3, 5), mode
