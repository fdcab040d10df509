"""`make demo-text`: JSON jobs through the real handler, on the embedded language model.

Prints a sheet of answers: the base, each adapter, two stacked, and the base again.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import torch

from text_settings import TextSettings
from worker.text.worker import TextWorker

COLUMNS: tuple[tuple[str, list[Any]], ...] = (
    ("no LoRA", []),
    ("pirate", ["pirate"]),
    ("emoji", ["emoji"]),
    ("json", [{"path": "json", "scale": 1.0}]),
    ("facts", ["facts"]),
    ("pirate + emoji", ["pirate", "emoji"]),
    ("no LoRA again", []),
)
QUESTIONS = (
    "What colour is a fox?",
    "What is 4 plus 5?",
    "Tell me a story about a cat and a dog.",
    "What colour is a zorb?",
)
WIDTH = 88


async def run(worker: TextWorker) -> list[dict[str, Any]]:
    """All jobs at once, as a platform sends them: they share the model's batch."""

    async def one(number: int, question: str, loras: list[Any]) -> dict[str, Any]:
        values = {
            "messages": [{"role": "user", "content": question}],
            "sampling_params": {"temperature": 0, "max_tokens": 120},
            "loras": loras,
        }
        job = {"id": f"demo-{number}", "input": values}
        (answer,) = [piece async for piece in worker.handle(job)]
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return dict(answer)

    jobs = [(question, loras) for question in QUESTIONS for _, loras in COLUMNS]
    return await asyncio.gather(*(one(n, *job) for n, job in enumerate(jobs)))


def show(answers: list[dict[str, Any]]) -> bool:
    """Prints the sheet; whether the base said the same before and after."""
    same = True
    for row, question in enumerate(QUESTIONS):
        own = answers[row * len(COLUMNS) : (row + 1) * len(COLUMNS)]
        texts = [answer["choices"][0]["message"]["content"] for answer in own]
        same &= texts[0] == texts[-1]
        print(f"\n{question}")
        for (title, _), text in zip(COLUMNS, texts, strict=True):
            lines = textwrap.wrap(text, WIDTH - 18) or [""]
            print(f"  {title:<16}{lines[0]}")
            for line in lines[1:]:
                print(f"  {'':<16}{line}")
    return same


def main() -> int:
    """Runs the jobs; 1 if the base's answers after the adapters differ from those before."""
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        worker = TextWorker(TextSettings(lora_cache_dir=Path(folder))).setup()
        begun = time.perf_counter()
        answers = asyncio.run(run(worker))
        spent = time.perf_counter() - begun
        worker.close()
    same = show(answers)
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    print(f"\n{len(answers)} jobs, {tokens} tokens in {spent:.1f} s, all in one batch.")
    print("The base's answers before and after are", "identical." if same else "DIFFERENT.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
