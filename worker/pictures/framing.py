"""The size at which a request's picture is drawn, and how the picture is brought to it."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageOps

STEP = 8
"""Sides are multiples of this: what one pixel of SDXL's latents stands for."""

SLACK = (0.5, 1.5)
"""Areas, as shares of the model's own, that are drawn as they are: SDXL knows the sizes around it."""

LANCZOS = Image.Resampling.LANCZOS

Size = tuple[int, int]
"""Width and height in pixels."""


def drawn_size(own: Size, width: int | None, height: int | None, side: int) -> Size:
    """The size at which a picture of the size `own` is drawn.

    `width` and `height` count where they are given; one of them alone brings the other, at the picture's
    aspect. Without them it is the picture's own size if its area is near the model's, which is `side` times
    `side`, and else the model's area at the picture's aspect. What is not given is a multiple of 8.
    """
    if width and height:
        return width, height
    if width:
        return width, _stepped(width * own[1] / own[0])
    if height:
        return _stepped(height * own[0] / own[1]), height
    share = own[0] * own[1] / side**2
    factor = 1.0 if SLACK[0] <= share <= SLACK[1] else math.sqrt(1 / share)
    # Sides that are nearly their own size lose a few pixels rather than gain some.
    rounded = math.floor if factor == 1.0 else round
    first, second = (max(STEP, rounded(one * factor / STEP) * STEP) for one in own)
    return first, second


def _stepped(pixels: float) -> int:
    return max(STEP, round(pixels / STEP) * STEP)


def framed(picture: Image.Image, size: Size, resize_mode: str) -> Image.Image:
    """The picture at this size.

    `cover` fills it and cuts off what stands over, evenly on both sides; `contain` shows all of the picture
    and continues its edges to the frame (a mask is black there); `stretch` changes the aspect.
    """
    if picture.size == size:
        return picture
    if resize_mode == "stretch":
        return picture.resize(size, LANCZOS)
    if resize_mode == "cover":
        return ImageOps.fit(picture, size, LANCZOS)
    inner = ImageOps.contain(picture, size, LANCZOS)
    left, top = (size[0] - inner.width) // 2, (size[1] - inner.height) // 2
    around = ((top, size[1] - inner.height - top), (left, size[0] - inner.width - left))
    if picture.mode == "L":
        return Image.fromarray(np.pad(np.asarray(inner), around))
    return Image.fromarray(np.pad(np.asarray(inner), (*around, (0, 0)), mode="edge"))
