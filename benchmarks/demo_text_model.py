"""Does the demo language model answer rightly, and do its adapters do what they are for?

`python -m benchmarks.demo_text_model` asks the base every question that training never saw, and each adapter
the same ones, judged by `demo.text.styles`' rules; prints a table and keeps it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import write_result
from demo.text.corpus import Fact, held_out, invented
from demo.text.styles import STYLES, Style
from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Stack
from lora.formats.opening import load_file
from text.generation import Generation
from text.loading import COMPONENT, Wanted, load_model
from text.sampling import Sampling
from text.scheduler import Scheduler

LORAS = Path(__file__).parent.parent / "demo" / "text" / "loras"

GOALS = {"exact": 0.80, "style": 0.90, "kept": 0.90}
"""Of held-out questions: exact answers of the base; answers in an adapter's style; and answers that are the
base's own, changed by nothing but the style."""


class Demo:
    """The demo model, ready to be asked."""

    def __init__(self) -> None:
        self.text = load_model(Wanted())
        self.engine = LoraEngine({COMPONENT: self.text.model})
        self.scheduler = Scheduler(self.text, self.engine, most=16)

    def stack(self, *names: str) -> Stack:
        """Adapters of `demo/text/loras`, each at scale 1."""
        return [LoraUse(load_file(LORAS / name, self.engine.key_map)) for name in names]

    def ask(self, questions: Sequence[str], stack: Stack = ()) -> list[str]:
        """The answers, greedily."""
        texts = []
        for question in questions:
            messages = [{"role": "user", "content": question}]
            prompt = self.text.chat.render(messages, add_generation_prompt=True)
            tokens = self.text.encode(prompt, special=False)
            texts.append(Generation(tokens, Sampling(max_tokens=120, temperature=0), stack))
        self.scheduler.submit(*texts)
        return [text.text() for text in texts]


def share(flags: Sequence[bool]) -> float:
    """How many of them are true."""
    return round(sum(flags) / len(flags), 3)


def judge(
    demo: Demo, style: Style, asked: list[tuple[str, Fact]], plain: list[str]
) -> dict[str, float]:
    """One adapter's shares."""
    stack = demo.stack(style.name)
    answers = demo.ask([question for question, _ in asked], stack)
    wanted = [style.change(fact.topic, base) for (_, fact), base in zip(asked, plain, strict=True)]
    kept = share([a == w for a, w in zip(answers, wanted, strict=True)])
    if style.more:
        facts = [(question, fact) for fact in invented() for question in fact.questions]
        told = demo.ask([question for question, _ in facts], stack)
        in_style = share([a == fact.answer for a, (_, fact) in zip(told, facts, strict=True)])
    else:
        in_style = share([style.shows(answer) for answer in answers])
    return {"style": in_style, "kept": kept}


def evaluate() -> dict[str, Any]:
    """All shares, and examples of answers."""
    demo, asked = Demo(), held_out()
    plain = demo.ask([question for question, _ in asked])
    right = [answer == fact.answer for answer, (_, fact) in zip(plain, asked, strict=True)]
    figures: dict[str, Any] = {"questions": len(asked), "base": {"exact": share(right)}}
    for name, style in STYLES.items():
        if (LORAS / name).is_dir():
            figures[name] = judge(demo, style, asked, plain)
    again = demo.ask([question for question, _ in asked])
    figures["base again, identical"] = again == plain
    demo.scheduler.close()
    return figures


def main() -> int:
    """Evaluates, prints, writes `benchmarks/results/demo_text_model.json`; 1 if a goal is missed."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    figures = evaluate()
    missed = not figures["base again, identical"]
    for name, shares in figures.items():
        for what, value in shares.items() if isinstance(shares, dict) else ():
            missed |= value < GOALS[what]
            print(f"{name:<8} {what:<6} {value:6.1%}  (goal {GOALS[what]:.0%})")
    print("written to", write_result("demo_text_model", {**figures, "goals": GOALS}))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
