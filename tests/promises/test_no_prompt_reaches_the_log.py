"""Nothing that a request says reaches a log, whoever logs, at whatever level."""

from __future__ import annotations

import base64
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from diffusers.utils import logging as of_diffusers
from PIL import Image
from transformers.utils import logging as of_transformers

from handler import Worker
from lora.fetch.web import quiet_libraries
from tests.conftest import ROOT

CANARY = "canary"
TAG = "<lora:demo-stripes:0.5>"


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Every logger at DEBUG; those of transformers and diffusers do not reach the root by themselves."""
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    known = (*loggers, *logging.root.manager.loggerDict.values())
    levels = {one: one.level for one in known if isinstance(one, logging.Logger)}
    quiet_libraries()
    caplog.set_level(logging.DEBUG)
    for library, logger in zip((of_transformers, of_diffusers), loggers, strict=True):
        library.set_verbosity_debug()
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)
    for logger, level in levels.items():
        logger.setLevel(level)


def told(length: int, sign: str = "{} ") -> str:
    """A text of that many characters, all over canaries."""
    return (sign.format(CANARY) * (length // 7 + 1))[:length]


def picture() -> str:
    """A JPEG whose EXIF speaks, too."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x010E] = exif[0x013B] = CANARY
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0canary"
    Image.new("RGB", (64, 64), (9, 99, 200)).save(buffer, "JPEG", exif=exif)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


DRAWN: dict[str, dict[str, Any]] = {
    **{f"{length} characters": {"prompt": told(length)} for length in (1, 2, 75, 300, 1500)},
    "both": {"prompt": told(700), "negative_prompt": told(900)},
    "weights": {"prompt": told(500, "({0}:1.2) [{0}] BREAK "), "negative_prompt": f"[{told(90)}"},
    "one word": {"prompt": CANARY * 60},
    "a tag": {"prompt": f"{told(600)}{TAG}", "negative_prompt": f"{told(9)}{TAG}"},
    "jpeg": {"prompt": told(20), "output_format": "jpeg"},
    "webp": {"prompt": told(1600), "output_format": "webp"},
    "a picture": {"prompt": told(900), "image_url": picture(), "strength": 1},
    "a picture alone": {"image_url": picture(), "strength": 1},
}

REFUSED: dict[str, dict[str, Any]] = {
    **{f"{length} characters": {"prompt": told(length)} for length in (10_001, 20_000)},
    "chunks": {"prompt": told(9_999, "{}1234")},
    "negative": {"prompt": "a", "negative_prompt": told(20_000)},
    "weight": {"prompt": f"({CANARY}:1000)"},
    "tag": {"prompt": f"a <lora:{CANARY}:x>"},
    "tag's name": {"prompt": f"a <lora:{CANARY}:1>"},
    "lora": {"prompt": "a", "loras": [CANARY]},
    "lora's field": {"prompt": "a", "loras": [{"path": CANARY, CANARY: CANARY}]},
    "hash": {"prompt": "a", "loras": [{"path": "demo-stripes", "sha256": CANARY}]},
    "revision": {"prompt": "a", "loras": [{"path": "demo-stripes", "revision": CANARY}]},
    "preset": {"prompt": "a", "lora_selection": CANARY},
    "field": {"prompt": "a", CANARY: CANARY},
    "action": {"action": CANARY},
    "action's field": {"action": "loras.inspect", "path": CANARY},
    **{
        name: {"prompt": "a", name: CANARY}
        for name in ("scheduler", "refiner_mode", "lora_mode", "output_format", "output_fallback")
    },
    **{name: {"prompt": "a", name: CANARY} for name in ("image_url", "seed", "loras", "clip_skip")},
}


def assert_silent(heard: pytest.LogCaptureFixture, name: str, printed: str) -> None:
    lines = [record.getMessage() for record in heard.records] + printed.splitlines()
    assert [line for line in lines if CANARY in line.lower()] == [], name


def test_no_text_of_a_request_is_logged(
    demo_worker: Worker, heard: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, values in DRAWN.items():
        answer = demo_worker({"id": "j", "input": {"num_inference_steps": 1, "seed": 1, **values}})
        assert "error" not in answer, (name, answer)
        assert_silent(heard, name, "".join(capfd.readouterr()))
    for name, values in REFUSED.items():
        answer = demo_worker({"id": "j", "input": values})
        assert "error" in answer, name
        assert_silent(heard, name, "".join(capfd.readouterr()))
    assert any("job failed: INVALID_INPUT" in record.getMessage() for record in heard.records)


def test_what_the_libraries_say_would_be_heard(
    demo_worker: Worker, heard: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("diffusers.pipelines").setLevel(logging.DEBUG)  # `pipelines` keeps it quiet
    demo_worker.parts.pipeline._base.encode_prompt(told(800), device="cpu")
    told_of = {record.name.partition(".")[0] for record in heard.records}
    assert {"transformers", "diffusers"} <= told_of
    with pytest.raises(AssertionError):
        assert_silent(heard, "", "")


@pytest.mark.parametrize(
    ("own", "level"), [({}, "INFO"), ({"RUNPOD_DEBUG_LEVEL": "DEBUG"}, "DEBUG")]
)
def test_the_sdk_logs_answers_only_where_its_operator_wants_it(
    own: dict[str, str], level: str
) -> None:
    code = (
        "import contextlib, handler\n"
        "with contextlib.suppress(SystemExit):\n"
        "    handler.main()\n"
        "from runpod.serverless.modules.rp_logger import RunPodLogger\n"
        "print(RunPodLogger().level)"
    )
    left_out = ("RUNPOD_DEBUG_LEVEL", "RUNPOD_LOG_LEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, **own, "WORKER_MODEL": "nobody/nothing"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [level], done.stderr[-500:]
