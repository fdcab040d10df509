"""`python -m demo.documents`: draws the pictures of README and docs/pictures.md with the embedded model.

One with a weighted word and a LoRA's tag; then a picture, a mask, and the picture with its masked part drawn
anew: all by jobs through the handler.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tqdm import tqdm

from demo.pictures import SIDE
from handler import Worker
from settings import Settings

DOCS = Path(__file__).resolve().parent.parent / "docs"
SHOWN = 192
"""Width and height of the pictures in the document, in pixels."""

DRAWN: dict[str, Any] = {"scheduler": "K_EULER", "num_inference_steps": 20, "guidance_scale": 3.0}
PICTURE = {**DRAWN, "prompt": "a big red circle on a blue background", "seed": 1}
WEIGHTED = {
    **DRAWN,
    "prompt": "a big red circle on a (blue:1.3) background <lora:demo-stripes>",
    "seed": 1,
}
INPAINTED = {**DRAWN, "prompt": "a big yellow star on a blue background", "seed": 3}


def make_mask() -> Image.Image:
    """A white square over the middle, where the circle is; black around it."""
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle((6, 6, SIDE - 7, SIDE - 7), fill="white")
    return mask


def data_uri(picture: Image.Image) -> str:
    """The picture as PNG in a data URI, as a client sends it."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw(worker: Worker, values: dict[str, Any]) -> Image.Image:
    """The picture of a job. Raises: RuntimeError with the answer's error."""
    answer = worker({"id": "inpainting", "input": values})
    if "error" in answer:
        raise RuntimeError(answer["error"])
    data = base64.b64decode(answer["image_url"].partition(",")[2])
    return Image.open(io.BytesIO(data)).convert("RGB")


def main() -> None:
    """Writes docs/weighted.png, and docs/inpainting-picture.png, -mask.png and -result.png."""
    worker, mask = Worker(Settings(model="demo", device="cpu")), make_mask()
    with tqdm(total=3, unit="picture") as bar:
        weighted = draw(worker, WEIGHTED)
        bar.update()
        picture = draw(worker, PICTURE)
        bar.update()
        masked = {"image_url": data_uri(picture), "mask_url": data_uri(mask)}
        result = draw(worker, {**INPAINTED, **masked})
        bar.update()
    inpainting = {
        "inpainting-picture": picture,
        "inpainting-mask": mask,
        "inpainting-result": result,
    }
    for name, made in {"weighted": weighted, **inpainting}.items():
        shown = made.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)
        shown.save(DOCS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
