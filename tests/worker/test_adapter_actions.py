"""Notes, thumbnails, hashes and descriptions of adapters."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from handler import Worker
from lora.errors import LoraNotFound
from lora.fetch.sources import Reference
from lora.formats.header import read_header
from tests.adapters import kohya, write
from tests.worker.test_library_actions import actions, ask, root
from validation import InvalidInput
from worker.actions import Actions
from worker.pictures.thumbnails import SIDE

__all__ = ["actions", "root"]


def picture(colour: str = "red", size: tuple[int, int] = (600, 300), text: str = "") -> bytes:
    stream, info = io.BytesIO(), PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", size, colour).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def opened(data_uri: str) -> Image.Image:
    head, _, body = data_uri.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def listed(actions: Actions, name: str = "a.safetensors") -> dict[str, Any]:
    return next(one for one in ask(actions, "library.list")["loras"] if one["name"] == name)


def test_a_note_is_kept_listed_searched_and_removed(actions: Actions, root: Path) -> None:
    write(root / "a.safetensors", kohya())
    assert listed(actions)["note"] is None
    note = {"scale": 0.8, "words": ["wtrclr, soft", "wtrclr, bold"], "text": "Ada's favourite"}
    answer = ask(actions, "library.note", name="a", **note)
    assert (answer["name"], answer["note"]) == ("a.safetensors", note)
    assert listed(actions)["note"] == note
    assert ask(actions, "library.list", text="FAVOURITE")["total"] == 1
    write(root / "a.safetensors", kohya(rank=8))
    ask(actions, "library.activate", name="a")
    assert listed(actions)["note"] == note
    assert ask(actions, "library.note", name="a", words=[" "])["note"] is None
    assert not (root / "a.safetensors.note.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", '{"scale": "x"}', '{"words": [1]}', '{"words": 5}', '{"text": []}'),
        *('{"scale": NaN}', "[" * 100_000, '{"scale": true}'),
    ],
)
def test_a_note_that_means_nothing_counts_as_none(actions: Actions, root: Path, text: str) -> None:
    write(root / "a.safetensors", kohya())
    (root / "a.safetensors.note.json").write_text(text)
    assert listed(actions)["note"] is None


@pytest.mark.parametrize(
    "values",
    [{"scale": 11}, {"words": "x"}, {"words": ["x" * 1001]}, {"text": 5}, {"text": "x" * 10_001}],
)
def test_a_note_of_another_shape_is_refused(
    actions: Actions, root: Path, values: dict[str, Any]
) -> None:
    write(root / "a.safetensors", kohya())
    with pytest.raises(InvalidInput):
        ask(actions, "library.note", name="a", **values)


def test_a_thumbnail_is_made_of_a_picture_and_shown_without_its_text(
    actions: Actions, root: Path
) -> None:
    write(root / "a.safetensors", kohya())
    assert listed(actions)["thumbnail"] is None
    secret = "a prompt that is nobody's business"
    answer = ask(actions, "library.thumbnail", name="a", picture=uri(picture(text=secret)))
    assert opened(answer["picture"]).size == (SIDE, SIDE // 2)
    assert secret.encode() not in (root / "a.safetensors.preview.webp").read_bytes()
    first = listed(actions)["thumbnail"]
    assert first == answer["thumbnail"]
    shown = ask(actions, "library.thumbnails", names=["a.safetensors", "gone"])["thumbnails"]
    assert [*shown] == ["a.safetensors"]
    red, green, blue = opened(shown["a.safetensors"]).convert("RGB").getpixel((5, 5))  # type: ignore[misc]
    assert (red > 240, green < 15, blue < 15) == (True, True, True)
    ask(actions, "library.thumbnail", name="a", picture=uri(picture("blue")))
    assert listed(actions)["thumbnail"] != first
    assert ask(actions, "library.thumbnail", name="a")["thumbnail"] is None
    assert listed(actions)["thumbnail"] is None


@pytest.mark.parametrize("ending", [".preview.png", ".png", ".preview.jpeg", ".jpg", ".webp"])
def test_previews_of_other_programs_are_shown(actions: Actions, root: Path, ending: str) -> None:
    (root / "sub").mkdir()
    write(root / "sub" / "a.safetensors", kohya())
    Image.new("RGB", (40, 40), "lime").save(root / "sub" / f"a{ending}", "PNG")
    assert listed(actions, "sub/a.safetensors")["thumbnail"]
    shown = ask(actions, "library.thumbnails", names=["sub/a"])["thumbnails"]
    assert opened(shown["sub/a"]).size == (40, 40)
    ask(actions, "library.thumbnail", name="sub/a", picture=uri(picture()))
    shown = ask(actions, "library.thumbnails", names=["sub/a"])["thumbnails"]
    assert opened(shown["sub/a"]).size == (SIDE, SIDE // 2)
    ask(actions, "library.delete", name="sub/a")
    assert [path.name for path in (root / "sub").iterdir()] == [f"a{ending}"]


@pytest.mark.parametrize(
    "data", [b"", b"<svg onload='alert(1)'/>", b"<html>", b"\x89PNG\r\n\x1a\n", b"x" * 100]
)
def test_a_preview_that_is_no_picture_is_not_shown(
    actions: Actions, root: Path, data: bytes
) -> None:
    write(root / "a.safetensors", kohya())
    (root / "a.preview.png").write_bytes(data)
    assert ask(actions, "library.thumbnails", names=["a"]) == {"thumbnails": {}}


def test_a_link_that_leads_out_is_no_preview(actions: Actions, root: Path, tmp_path: Path) -> None:
    write(root / "a.safetensors", kohya())
    (tmp_path / "secret.png").write_bytes(picture())
    (root / "a.png").symlink_to(tmp_path / "secret.png")
    assert listed(actions)["thumbnail"] is None
    assert ask(actions, "library.thumbnails", names=["a"]) == {"thumbnails": {}}


def test_what_is_no_picture_makes_no_thumbnail(actions: Actions, root: Path) -> None:
    write(root / "a.safetensors", kohya())
    with pytest.raises(InvalidInput) as caught:
        ask(actions, "library.thumbnail", name="a", picture=uri(b"nothing"))
    assert caught.value.sentence.startswith("picture: ")
    with pytest.raises(LoraNotFound):
        ask(actions, "library.thumbnail", name="b", picture=uri(picture()))


def test_the_hashes_are_those_of_the_file_and_of_its_tensors(actions: Actions, root: Path) -> None:
    path = write(root / "a.safetensors", kohya())
    data = path.read_bytes()
    start = min(info.start for info in read_header(path).tensors.values())
    whole, bare = (hashlib.sha256(part).hexdigest() for part in (data, data[start:]))
    assert (listed(actions)["sha256"], listed(actions)["autov3"]) == (None, None)
    found = ask(actions, "library.hashes", name="a")
    assert (found["sha256"], found["autov3"]) == (whole, bare[:12])
    ask(actions, "library.activate", name="a")
    assert (listed(actions)["sha256"], listed(actions)["autov3"]) == (whole, bare[:12])


def test_a_list_has_the_sha256_as_soon_as_a_job_used_the_file(actions: Actions, root: Path) -> None:
    path = write(root / "a.safetensors", kohya())
    ask(actions, "library.scan")
    assert listed(actions)["sha256"] is None
    actions.parts.library.load(Reference("a"))
    assert listed(actions)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    write(path, kohya(rank=8))
    assert listed(actions)["sha256"] is None


def test_a_description_has_training_words_and_norms_and_no_path(
    actions: Actions, root: Path, tmp_path: Path
) -> None:
    write(root / "a.safetensors", kohya(), {"ss_output_name": "<script>alert(1)</script>"})
    found = ask(actions, "library.describe", name="a")
    assert found["file"] == "a"
    assert found["training"]["output name"] == "<script>alert(1)</script>"
    assert all(norm["norm"] > 0 for norm in found["norms"])
    assert str(tmp_path) not in json.dumps(found)


def test_a_prompt_is_measured_as_the_model_reads_it(demo_worker: Worker) -> None:
    def measured(prompt: str) -> dict[str, Any]:
        given = {"action": "prompts.measure", "prompt": prompt}
        answer: dict[str, Any] = demo_worker({"input": given})
        return answer

    one = measured("a red circle")
    assert (one["tokens"] >= 3, one["chunks"]) == (True, 1)
    assert measured("a red circle <lora:demo-stripes:0.5>")["tokens"] == one["tokens"]
    assert measured("a red circle, " * 60)["chunks"] > 1
    assert measured("") == {"tokens": 0, "chunks": 1, "warnings": []}


def test_a_file_is_uploaded_in_pieces(actions: Actions, root: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "mine.safetensors", kohya()).read_bytes()
    about = {"name": "b.safetensors", "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    for start, done in ((0, False), (5000, True)):
        piece = base64.b64encode(data[start : len(data) if start else 5000]).decode()
        answer = ask(actions, "library.upload", **about, start=start, data=piece)
        assert answer["done"] is done
    assert listed(actions, "b.safetensors")["sha256"] == about["sha256"]


@pytest.mark.parametrize("values", [{}, {"data": "x"}, {"data": "eA==", "sha256": "0"}])
def test_an_upload_that_says_too_little_is_refused(
    actions: Actions, values: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput):
        ask(actions, "library.upload", name="b.safetensors", **values)
