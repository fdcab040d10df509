"""Drawing within a mask: what is drawn anew, and how it comes back into the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline

PATCH = 8
"""Pixels along a side that one pixel of the latents stands for."""


@dataclass(frozen=True)
class Masked:
    """A picture of which the white part of a mask is drawn anew."""

    whole: Image.Image
    """The picture in RGB, at the size of the answer."""
    mask: Image.Image
    """Mode L, of the same size: 255 is drawn anew, 0 stays."""
    size: tuple[int, int]
    """Width and height at which it is drawn, multiples of 8."""
    blur: float = 0.0
    """How far drawn and kept pixels mix at the mask's edge: the blur's standard deviation in pixels."""

    @property
    def picture(self) -> Image.Image:
        """The picture at the size at which it is drawn."""
        return _resized(self.whole, self.size)

    @property
    def patches(self) -> Image.Image:
        """The mask at the size at which it is drawn, grown to whole pixels of the latents.

        diffusers takes one pixel of each 8 x 8, and would miss what is thinner.
        """
        width, height = self.size
        mask = _resized(self.mask, self.size, Image.Resampling.BOX)  # thin lines stay above 0
        blocks = np.asarray(mask).reshape(height // PATCH, PATCH, width // PATCH, PATCH)
        grown = (blocks.max(axis=(1, 3)) > 0).astype(np.uint8) * 255
        return Image.fromarray(grown.repeat(PATCH, axis=0).repeat(PATCH, axis=1))

    def with_drawn(self, drawn: Sequence[Image.Image]) -> list[Image.Image]:
        """The picture with what was drawn in its mask; where the blurred mask is 0, bit for bit as it was."""
        mask = self.mask.filter(ImageFilter.GaussianBlur(self.blur)) if self.blur else self.mask
        return [Image.composite(_resized(one, self.whole.size), self.whole, mask) for one in drawn]


def whole_mask(picture: Image.Image) -> Masked:
    """All of a picture is drawn anew."""
    return Masked(picture, Image.new("L", picture.size, 255), picture.size)


def inpaint_pipeline(base: StableDiffusionXLPipeline) -> StableDiffusionXLInpaintPipeline:
    """diffusers' inpainting with the base model's own networks, of 4 or 9 input channels."""
    from diffusers import StableDiffusionXLInpaintPipeline

    made = StableDiffusionXLInpaintPipeline(
        **base.components,
        force_zeros_for_empty_prompt=base.config.force_zeros_for_empty_prompt,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def inpaint_options(masked: Masked, strength: float) -> dict[str, Any]:
    """What the pipeline's call takes of a masked picture."""
    width, height = masked.size
    return {
        "image": masked.picture,
        "mask_image": masked.patches,
        "width": width,
        "height": height,
        "strength": strength,
    }


def _resized(
    picture: Image.Image,
    size: tuple[int, int],
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, resampling)
