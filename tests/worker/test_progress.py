from typing import Any

from lora.fetch.transfers import Transfer
from worker.progress import INTERVAL, Progress


def make() -> tuple[Progress, list[dict[str, Any]], list[float]]:
    sent: list[dict[str, Any]] = []
    now = [0.0]
    return Progress(sent.append, lambda: now[0]), sent, now


def test_steps_are_throttled_and_the_last_is_always_told() -> None:
    progress, sent, now = make()
    for step in range(1, 101):
        now[0] += INTERVAL / 10
        progress.step(step, 100)
    assert 10 <= len(sent) <= 12
    fractions = [update["fraction"] for update in sent]
    assert fractions == sorted(fractions)
    assert sent[-1] == {"phase": "generating", "fraction": 1.0, "text": "step 100/100"}


def test_a_new_phase_is_told_at_once() -> None:
    progress, sent, _ = make()
    progress.download(Transfer(2, 43, 100, 12e6))
    progress.download(Transfer(2, 44, 100, 12e6))
    progress.step(1, 9)
    assert [u["text"] for u in sent] == ["downloading 2 LoRAs 43%, 12 MB/s", "step 1/9"]


def test_a_download_of_unknown_size_tells_megabytes() -> None:
    progress, sent, _ = make()
    progress.download(Transfer(1, 12_000_000, None, 345_000))
    assert sent[0]["text"] == "downloading 1 LoRA 12 MB, 0.345 MB/s"
