"""Which pipelines draw a request."""

from __future__ import annotations

from enum import Enum

from schemas import ImageRequest
from validation import InvalidInput


class Route(Enum):
    """Which pipelines draw a request."""

    BASE = "base"
    REFINED = "base, then refiner as image to image (as worker-sdxl)"
    ENSEMBLE = "base, then refiner, one denoising split in two"
    REFINER_IMAGE = "refiner alone, on the given picture (as worker-sdxl)"
    BASE_IMAGE = "base alone, on the given picture"
    INPAINT = "base alone, within the mask of the given picture"

    @property
    def runs(self) -> int:
        """How many pipelines draw, one after the other."""
        return 2 if self in (Route.REFINED, Route.ENSEMBLE) else 1


def choose_route(request: ImageRequest, *, has_refiner: bool) -> tuple[Route, list[str]]:
    """The route of a request, and what the answer must warn of.

    Raises: InvalidInput where `strength` leaves image to image without a step.
    """
    warnings: list[str] = []
    if request.mask_url:
        route = Route.INPAINT
        if has_refiner and request.refiner_mode != "none":
            warnings.append("mask_url: the base model draws within it, without the refiner")
    elif request.image_url and has_refiner and not request.loras and request.refiner_mode != "none":
        route = Route.REFINER_IMAGE
    elif request.image_url:
        route = Route.BASE_IMAGE
        if request.loras:
            warnings.append(
                "image_url with loras: the base model draws it, since SDXL LoRAs do not fit the refiner"
            )
    elif has_refiner and request.refiner_mode != "none":
        route = Route.ENSEMBLE if request.refiner_mode == "ensemble" else Route.REFINED
    else:
        route = Route.BASE
        if request.high_noise_frac is not None and not has_refiner:
            warnings.append("high_noise_frac does nothing: this worker has no refiner")
    if not has_refiner and request.refiner_mode == "ensemble":
        warnings.append("refiner_mode ensemble does nothing: this worker has no refiner")
    _check_steps(request, route)
    return route, warnings


def _check_steps(request: ImageRequest, route: Route) -> None:
    """diffusers does int(steps * strength) steps of image to image, and fails on none; an ensemble
    that is not split does all steps in the base.
    """
    if route is Route.ENSEMBLE and request.high_noise_frac in (0, 1):
        raise InvalidInput.of(
            ["high_noise_frac: with refiner_mode ensemble it must be over 0 and below 1"]
        )
    by_route = {
        Route.REFINED: ("refiner_inference_steps", request.refiner_inference_steps),
        Route.REFINER_IMAGE: ("refiner_inference_steps", request.refiner_inference_steps),
        Route.BASE_IMAGE: ("num_inference_steps", request.num_inference_steps),
        Route.INPAINT: ("num_inference_steps", request.num_inference_steps),
    }
    name, steps = by_route.get(route, ("", 1))
    if name and int(steps * request.strength) < 1:
        raise InvalidInput.of(
            [f"strength: {request.strength} of {steps} {name} is less than one step"]
        )
