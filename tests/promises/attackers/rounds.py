"""The rounds of an attacker: how many there are, what is at random in each, and what came of them."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator

SECONDS = float(os.environ.get("ATTACK_SECONDS", "0"))
"""How long each attacker goes on, at most; 0: it does a few rounds and no more."""

SEED = int(os.environ.get("ATTACK_SEED", "19"))


class Rounds:
    """Hands out the chance of each round: `for chance in rounds(few, many)`."""

    def __init__(self) -> None:
        self.done = 0
        self.seen = Counter[str]()
        """What the attacker counts."""

    def __call__(self, few: int, many: int, share: float = 1.0) -> Iterator[random.Random]:
        """`few` rounds here; on demand up to `many`, and no fewer than `few` however long they take.

        `share`: of ATTACK_SECONDS, for one that needs more than the others.
        """
        ends = time.monotonic() + share * SECONDS
        while self.done < few or (self.done < many and time.monotonic() < ends):
            self.done += 1
            print(f"ATTACK_SEED={SEED}, round {self.done}")  # a failure shows it
            yield random.Random(f"{SEED} {self.done}")


def garbled(chance: random.Random, data: bytes) -> bytes:
    """The data with a few bytes changed, cut out, repeated or put in."""
    whole = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(len(whole) + 1)
        length = chance.choice((1, 1, 2, 8, 200))
        piece = bytes(chance.choice((0, 255, 128, chance.randrange(256))) for _ in range(length))
        whole[place : place + chance.choice((0, length))] = chance.choice(
            (piece, bytes(whole[place : place + length]) * 2, b"")
        )
    return bytes(whole)
