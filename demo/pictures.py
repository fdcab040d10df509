"""The world that the demo model knows: pictures of one shape on a plain background.

Everything about that world is here and nowhere else: how a picture is drawn, how it is described in
words, and the pixel rules that judge a picture without asking any model. The training script draws
with it, the evaluation and the tests judge with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 64
"""Width and height of every picture, in pixels."""

OVERSAMPLE = 4
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 220),
    "yellow": (245, 215, 50),
    "purple": (145, 60, 185),
    "orange": (245, 135, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
"""The shapes that the base model learns; `spiral` comes with an adapter."""

RADII = {"small": 12.0, "": 17.0, "big": 22.0}
"""The word for a size (or none) -> radius in pixels."""

STYLES = ("plain", "stripes", "outline", "night")

PHRASES = (
    "a {size}{colour} {shape} on a {background} background",
    "{size}{colour} {shape}, {background} background",
    "a picture of a {size}{colour} {shape} on a {background} background",
    "a {background} background with a {size}{colour} {shape}",
    "one {size}{colour} {shape} in front of a {background} background",
)

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scene:
    """One picture, described: what to draw, where, and in which styles."""

    shape: str
    colour: str
    background: str
    size: str = ""
    centre: tuple[float, float] = (SIDE / 2, SIDE / 2)
    styles: frozenset[str] = frozenset()

    def prompt(self, phrase: str = PHRASES[0]) -> str:
        """The scene in words, by one of `PHRASES`; `an` stands before a vowel."""
        size = f"{self.size} " if self.size else ""
        text = phrase.format(
            size=size, colour=self.colour, shape=self.shape, background=self.background
        )
        return text.replace("a orange", "an orange")

    @property
    def combination(self) -> tuple[str, str, str]:
        """What a held-out prompt holds out: (shape, colour, background)."""
        return self.shape, self.colour, self.background


def all_combinations(shapes: Sequence[str] = SHAPES) -> list[tuple[str, str, str]]:
    """Every (shape, colour, background) whose two colours differ, in a fixed order."""
    return [(s, c, b) for s in shapes for c in COLOURS for b in COLOURS if c != b]


def held_out_combinations(count: int = 64) -> list[tuple[str, str, str]]:
    """The combinations that training never sees: a fixed random choice of `count`."""
    return random.Random(2024).sample(all_combinations(), count)


def random_scene(rng: random.Random, combination: tuple[str, str, str]) -> Scene:
    """A scene of this combination with a random size and a position that keeps it in the picture."""
    shape, colour, background = combination
    size = rng.choice(tuple(RADII))
    slack = 4.0
    centre = (SIDE / 2 + rng.uniform(-slack, slack), SIDE / 2 + rng.uniform(-slack, slack))
    return Scene(shape, colour, background, size, centre)


def with_styles(scene: Scene, *styles: str) -> Scene:
    """The same scene in these styles (see `STYLES`)."""
    return replace(scene, styles=frozenset(styles))


# --- drawing ---------------------------------------------------------------------------------


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """The corners of a shape around (x, y), as a polygon."""
    if shape == "square":
        half = 0.86 * r
        return [
            (x - half, y - half),
            (x + half, y - half),
            (x + half, y + half),
            (x - half, y + half),
        ]
    if shape == "cross":
        arm = 0.36 * r
        steps = [(-arm, -r), (arm, -r), (arm, -arm), (r, -arm), (r, arm), (arm, arm)]
        steps += [(arm, r), (-arm, r), (-arm, arm), (-r, arm), (-r, -arm), (-arm, -arm)]
        return [(x + dx, y + dy) for dx, dy in steps]
    corners, inner = {"triangle": (3, 1.0), "star": (5, 0.42), "circle": (48, 1.0)}[shape]
    if inner < 1.0:
        angles = np.arange(2 * corners) * np.pi / corners
        radii = np.where(np.arange(2 * corners) % 2 == 0, r, inner * r)
    else:
        angles = np.arange(corners) * 2 * np.pi / corners
        radii = np.full(corners, r)
    return [
        (x + q * float(np.sin(a)), y - q * float(np.cos(a)))
        for a, q in zip(angles, radii, strict=True)
    ]


def _spiral(x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Two turns of an Archimedean spiral around (x, y), from its middle to radius r."""
    turns = np.linspace(0.15, 1.0, 64)
    angle = turns * 2 * 2 * np.pi
    return [
        (x + r * t * float(np.cos(a)), y + r * t * float(np.sin(a)))
        for t, a in zip(turns, angle, strict=True)
    ]


def draw_mask(
    shape: str, centre: tuple[float, float], radius: float, stroke: float = 0.0
) -> NDArray[np.float32]:
    """How much of each pixel the shape covers: [SIDE, SIDE], 0 to 1. `stroke` > 0 draws only its edge."""
    k = OVERSAMPLE
    canvas = Image.new("L", (SIDE * k, SIDE * k), 0)
    pen = ImageDraw.Draw(canvas)
    x, y, r = centre[0] * k, centre[1] * k, radius * k
    if shape == "spiral":
        pen.line(_spiral(x, y, r), fill=255, width=round(0.2 * r), joint="curve")
    elif stroke:
        corners = _outline(shape, x, y, r - stroke * k / 2)
        pen.line([*corners, *corners[:2]], fill=255, width=round(stroke * k), joint="curve")
    else:
        pen.polygon(_outline(shape, x, y, r), fill=255)
    small = canvas.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255.0


def draw(scene: Scene) -> Pixels:
    """The picture of a scene, [SIDE, SIDE, 3] in 0..255."""
    radius = RADII[scene.size]
    stroke = max(3.5, 0.24 * radius) if "outline" in scene.styles else 0.0
    cover = draw_mask(scene.shape, scene.centre, radius, stroke)[..., None]
    paper = np.empty((SIDE, SIDE, 3), dtype=np.float32)
    paper[:] = COLOURS[scene.background]
    if "stripes" in scene.styles:
        paper[stripe_rows()] = stripe_colour(scene.background)
    picture = paper * (1 - cover) + np.array(COLOURS[scene.colour], dtype=np.float32) * cover
    if "night" in scene.styles:
        picture = picture * 0.3
    return picture.round().astype(np.uint8)


def stripe_rows() -> Mask:
    """Which rows of the `stripes` style carry the second colour: bands of 8 pixels, every other one."""
    return (np.arange(SIDE) // 8) % 2 == 1


def stripe_colour(background: str) -> NDArray[np.float32]:
    """The second colour of a striped background: far lighter where it is dark, half as light elsewhere."""
    colour = np.array(COLOURS[background], dtype=np.float32)
    return colour + 0.6 * (255 - colour) if colour.mean() < 110 else colour * 0.5


# --- pixel rules -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """What the pixel rules see in a picture."""

    shape: str
    colour: str
    background: str
    overlap: float
    """Intersection over union of the shape found with the best drawn mask, 0 to 1."""


def nearest_colour(rgb: NDArray[np.floating]) -> str:
    """The name of the palette's colour nearest to `rgb` [3] (Euclidean, 0..255)."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLOURS[name]))))


def border_colour(picture: Pixels) -> NDArray[np.floating]:
    """The median colour [3] of the outermost 3 pixels on every side."""
    inside = np.zeros(picture.shape[:2], dtype=bool)
    inside[3:-3, 3:-3] = True
    return np.asarray(np.median(picture[~inside].astype(np.float64), axis=0))


def foreground_mask(picture: Pixels) -> Mask:
    """Pixels nearer to the thing in the picture than to its border: [SIDE, SIDE]."""
    distance = np.linalg.norm(picture.astype(np.float64) - border_colour(picture), axis=-1)
    return np.asarray(distance > 0.5 * np.percentile(distance, 97))


@cache
def _candidates(shapes: tuple[str, ...]) -> tuple[list[str], NDArray[np.bool_]]:
    """Drawn masks to compare with: their shapes and pixels [n, SIDE, SIDE], all around the centre."""
    radii = np.arange(9.0, 27.0, 1.0)
    names = [shape for shape in shapes for _ in radii]
    masks = [draw_mask(s, (SIDE / 2, SIDE / 2), float(r)) > 0.5 for s in shapes for r in radii]
    return names, np.stack(masks)


def judge(picture: Pixels, shapes: tuple[str, ...] = SHAPES) -> Judgement:
    """Shape, colour and background of a picture [SIDE, SIDE, 3], by its pixels alone.

    The background is the border's median colour; the foreground is what differs from it; the shape
    is the drawn mask, over all radii and small shifts, that overlaps the foreground best.
    """
    mask = foreground_mask(picture)
    names, masks = _candidates(shapes)
    best, overlap = "", -1.0
    for dy in range(-6, 7):
        for dx in range(-6, 7):
            moved = np.roll(mask, (-dy, -dx), axis=(0, 1))
            both = (masks & moved).sum(axis=(1, 2))
            either = (masks | moved).sum(axis=(1, 2))
            scores = both / np.maximum(either, 1)
            top = int(scores.argmax())
            if scores[top] > overlap:
                best, overlap = names[top], float(scores[top])
    thing = picture[mask].astype(np.float64) if mask.any() else picture.reshape(-1, 3)
    return Judgement(
        shape=best,
        colour=nearest_colour(np.median(thing, axis=0)),
        background=nearest_colour(border_colour(picture)),
        overlap=overlap,
    )


def stripiness(picture: Pixels) -> float:
    """How much brighter or darker the striped rows are at the left and right edge, 0 to 1."""
    edge = np.concatenate([picture[:, :6], picture[:, -6:]], axis=1).astype(np.float64)
    rows = stripe_rows()
    difference = edge[rows].mean(axis=(0, 1)) - edge[~rows].mean(axis=(0, 1))
    return float(np.linalg.norm(difference) / 441.7)


def hollowness(picture: Pixels, plain: Pixels) -> float:
    """Share of the middle of `plain`'s shape that `picture` leaves in the background's colour, 0 to 1.

    Both are pictures of one prompt and seed; the middle is the part of the shape within 4 pixels of
    its centre of mass.
    """
    ys, xs = np.nonzero(foreground_mask(plain))
    grid_y, grid_x = np.mgrid[:SIDE, :SIDE]
    middle = np.hypot(grid_y - ys.mean(), grid_x - xs.mean()) <= 4
    values = picture[middle].astype(np.float64)
    thing = np.median(plain[middle].astype(np.float64), axis=0)
    paper = border_colour(plain)
    nearer = np.linalg.norm(values - paper, axis=-1) < np.linalg.norm(values - thing, axis=-1)
    return float(nearer.mean())


def brightness(picture: Pixels) -> float:
    """Mean of all channels, 0 (black) to 1 (white)."""
    return float(picture.mean() / 255.0)
