"""What a request's drawing starts from: nothing, a picture, or a picture and its mask."""

from __future__ import annotations

import math

from PIL import Image

from lora.fetch.web import Web
from pipelines.inpainting import Masked
from schemas import ImageRequest
from validation import InvalidInput
from worker.pictures.framing import drawn_size, framed
from worker.pictures.inputs import Say, load_mask, load_picture

MAX_KEPT = 2048 * 1536
"""Most pixels of a picture that comes back with its mask drawn anew: as PNG it fits into RunPod's answer."""

DRAWN, DRAWN_IF_SCALED = 128, 64
"""The grey from which on a mask's pixel is drawn anew. Scaling makes thin lines darker, so less is asked."""


def start_of(request: ImageRequest, web: Web, side: int, say: Say) -> Image.Image | Masked | None:
    """The request's picture at the size at which it is drawn, with its mask if it has one; None without both.

    `side` is that of the model's own squares; `say` takes what the answer must tell. Raises: InvalidInput.
    """
    if not request.image_url:
        return None
    picture = load_picture(request.image_url, web, say)
    if request.mask_url:
        return _masked(request, picture, load_mask(request.mask_url, web, say), side, say)
    size = drawn_size(picture.size, request.width, request.height, side)
    if request.width or request.height:
        return framed(picture, size, request.resize_mode)
    if size != picture.size:
        say(
            f"image_url: the picture has {_by(picture.size)} pixels and was drawn at {_by(size)}, near the "
            "model's size; width and height choose another"
        )
    return framed(picture, size, "stretch")  # by less than a step of 8 pixels


def _masked(
    request: ImageRequest, picture: Image.Image, mask: Image.Image, side: int, say: Say
) -> Masked:
    """The picture and its mask at the size of the answer: the request's, or the picture's own.

    Raises: InvalidInput if nothing is to be drawn.
    """
    lightest = mask.getextrema()[1]
    mask = _binary(mask, DRAWN)
    if mask.size != picture.size and not _same_aspect(mask.size, picture.size):
        say(f"mask_url: the mask of {_by(mask.size)} was stretched to {_by(picture.size)} pixels")
    mask = framed(mask, picture.size, "stretch")
    size = drawn_size(picture.size, request.width, request.height, side)
    if request.width or request.height:
        whole, mode = size, request.resize_mode
    else:
        factor = min(1.0, math.sqrt(MAX_KEPT / (picture.width * picture.height)))
        whole, mode = (round(picture.width * factor), round(picture.height * factor)), "stretch"
        if factor < 1:
            say(
                f"image_url: the picture of {_by(picture.size)} pixels was made smaller, {_by(whole)}; "
                "width and height choose another size"
            )
    mask = _binary(framed(mask, whole, mode), DRAWN_IF_SCALED)
    if not mask.getbbox():
        raise InvalidInput(
            f"mask_url: nothing in the mask is white (its lightest pixel is {lightest} of 255)",
            "White is what is drawn anew; leave out mask_url to draw all of the picture.",
        )
    return Masked(framed(picture, whole, mode), mask, size, request.mask_blur)


def _binary(mask: Image.Image, least: int) -> Image.Image:
    return mask.point(lambda grey: 255 if grey >= least else 0)


def _same_aspect(first: tuple[int, int], second: tuple[int, int]) -> bool:
    return math.isclose(first[0] * second[1], second[0] * first[1], rel_tol=0.02)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
