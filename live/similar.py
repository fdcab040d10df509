"""Skips frames that are like the one before, as StreamDiffusion does (arXiv 2312.12491, section 3.5)."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Numbers = NDArray[np.float32]

SIDE = 64
"""Frames are compared at this size."""

MOST = 10
"""So many frames are skipped in a row at most."""


class Similar:
    """Says which frames may be skipped: more often, the more a frame is like the last one that was drawn.

    From the cosine c of both pictures and the threshold t, the probability is (c - t) / (1 - t).
    """

    def __init__(self, threshold: float | None, seed: int = 0) -> None:
        self._threshold = threshold
        self._chance = random.Random(seed)
        self._last: Numbers | None = None
        self._skipped = 0

    def skips(self, picture: Image.Image) -> bool:
        """Whether this frame is skipped. If not, the next ones are compared with it."""
        if self._threshold is None or self._threshold >= 1:
            return False
        small = _numbers(picture)
        if self._last is not None and self._skipped < MOST:
            likeness = (_cosine(small, self._last) - self._threshold) / (1 - self._threshold)
            if self._chance.random() < likeness:
                self._skipped += 1
                return True
        self._last, self._skipped = small, 0
        return False

    def forget(self) -> None:
        """The next frame is drawn, whatever it shows."""
        self._last = None


def _numbers(picture: Image.Image) -> Numbers:
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float32).ravel() / 127.5 - 1


def _cosine(first: Numbers, second: Numbers) -> float:
    lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / lengths if lengths else 1.0
