"""Each job alone on a fresh worker: `python -m tests.reference FOLDER < jobs.json` prints name -> images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from handler import Worker
from settings import Settings


def main() -> None:
    folder = Path(sys.argv[1])
    answers = {}
    for name, values in json.load(sys.stdin).items():
        settings = Settings(
            model="demo", device="cpu", lora_cache_dir=folder, lora_allow_private_urls=True
        )
        answer = Worker(settings)({"id": name, "input": values})
        answers[name] = answer.get("images") or answer["error"]
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
