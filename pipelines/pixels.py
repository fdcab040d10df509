"""Pillow's modes -> RGB for pictures and grey for masks, by what their numbers mean."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms, ImageOps

WHITE, BLACK = 255, 0

SIXTEEN_BITS = 65_535

BROKEN = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(SyntaxError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow's readers raise for a picture that is not whole, or means nothing."""


def shows_through(picture: Image.Image) -> bool:
    """Whether a pixel of the picture is not opaque. Raises: as `as_rgb`."""
    return _may_show_through(picture) and _with_alpha(picture).getchannel("A").getextrema() != (
        255,
        255,
    )


def _may_show_through(picture: Image.Image) -> bool:
    return picture.mode == "La" or picture.has_transparency_data


def _with_alpha(picture: Image.Image) -> Image.Image:
    return picture.convert("LA" if picture.mode == "La" else "RGBA").convert("RGBA")


def as_rgb(picture: Image.Image, *, behind: int = WHITE) -> Image.Image:
    """The picture upright, in sRGB's colours, 8 bits each.

    What is transparent shows `behind`, a grey. More than 8 bits are scaled, not cut: see `_eight_bits`. A
    colour profile is applied, unless it is broken or sRGB's own.

    Raises: OSError, ValueError, SyntaxError if the picture is not whole (Pillow raises SyntaxError for broken
    chunks of PNG and for broken EXIF).
    """
    profile = picture.info.get("icc_profile")
    picture = _upright(picture)
    if picture.mode.startswith(("I", "F")):
        picture = _eight_bits(picture)
    if _may_show_through(picture):
        whole = _with_alpha(picture)
        under = Image.new("RGBA", whole.size, (behind, behind, behind, 255))
        picture = Image.alpha_composite(under, whole).convert("RGB")
    return _in_srgb(picture, profile).convert("RGB")


def _upright(picture: Image.Image) -> Image.Image:
    """The picture as its EXIF says it is to be held; as it is, if what that says cannot be read."""
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except BROKEN:
        return picture


def as_mask(picture: Image.Image) -> Image.Image:
    """The picture upright, as 8 bits of grey (mode L); what is transparent is black. Raises: as `as_rgb`."""
    return as_rgb(picture, behind=BLACK).convert("L")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, as 8 bits.

    White is the largest number of the type in 16 bits. Wider types do not say what white is: it is the least
    of 1 (floats), 255 (floats), 65535 and the picture's own largest number that no pixel exceeds.
    """
    values = np.nan_to_num(np.asarray(picture).astype(np.float32), posinf=0).clip(min=0)
    peak = float(values.max(initial=0))
    scales = {"F": (1.0, 255.0, SIXTEEN_BITS), "I": (SIXTEEN_BITS,)}.get(picture.mode, ())
    white = next((scale for scale in scales if peak <= scale), max(peak, SIXTEEN_BITS))
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile or picture.mode not in ("RGB", "L", "CMYK", "LAB"):
        return picture
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(own):
            return picture
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, own, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return picture  # a broken profile, or one for another mode
    return converted or picture
