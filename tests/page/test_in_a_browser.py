"""Every tab in a real browser, over the emulator with real workers on the demo model."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, Page, expect

from tests.adapters import as_bytes, kohya, write
from tests.page.browser import needs_browser, opened
from tests.page.conftest import KEY, Site, pixels_of
from tests.server import LoopbackServer
from tests.waiting import PATIENCE, until

pytestmark = [needs_browser, pytest.mark.slow]

expect.set_options(timeout=PATIENCE * 1000)

STEPS = 4


def prepare(tab: Page, **fields: Any) -> None:
    """Fills fields of the Image tab."""
    for name, value in {"num_inference_steps": STEPS, "seed": 7, **fields}.items():
        box = tab.locator(f"#panel-image #{name}")
        if name in ("scheduler", "lora_mode", "output_format"):
            tab.evaluate(
                "document.querySelectorAll('details').forEach((one) => { one.open = true })"
            )
            box.select_option(str(value))
        else:
            box.fill(str(value))


def pick(tab: Page, name: str, scale: float | None = None) -> None:
    tab.locator(f"#panel-image .card[data-name='{name}.safetensors']").click()
    if scale is not None:
        tab.locator(f".entry[data-lora='{name}']").get_by_label("scale", exact=True).fill(
            str(scale)
        )


def request_of(tab: Page) -> dict[str, Any]:
    """What the page would send, as its JSON says."""
    tab.get_by_label("Language").select_option("JSON", force=True)
    shown: dict[str, Any] = json.loads(tab.locator("#code").text_content() or "")["input"]
    return shown


def drawn(tab: Page) -> str:
    """Draws; the picture's data URI."""
    before = tab.locator("#result img").count() and tab.locator("#result img").get_attribute("src")
    tab.click("#draw")
    tab.wait_for_selector("[data-job]", state="attached")
    tab.wait_for_selector("[data-job]", state="detached")
    expect(tab.locator("#result .error")).to_have_count(0)
    shown = tab.locator("#result img").first.get_attribute("src")
    assert shown
    assert shown.startswith("data:image/")
    assert before is not None
    return shown


def drop(tab: Page, file: Path) -> None:
    """Drops a file on the page, and waits until it was read."""
    body = base64.b64encode(file.read_bytes()).decode()
    tab.evaluate(
        """([body, name]) => {
          const bytes = Uint8Array.from(atob(body), (one) => one.charCodeAt(0));
          const data = new DataTransfer();
          data.items.add(new File([bytes], name, { type: "image/png" }));
          const how = { dataTransfer: data, bubbles: true, cancelable: true };
          for (const kind of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(kind, how));
        }""",
        [body, file.name],
    )
    expect(tab.get_by_text("The picture's settings are here.")).to_be_visible()


def saved(data_uri: str, path: Path) -> Path:
    path.write_bytes(base64.b64decode(data_uri.split(",")[1]))
    return path


def with_text(path: Path, text: str) -> Path:
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (64, 64)).save(path, "PNG", pnginfo=info)
    return path


def test_a_picked_lora_at_a_moved_weight_draws_what_the_same_job_draws(
    tab: Page, site: Site
) -> None:
    prepare(tab, lora_mode="merged")
    pick(tab, "demo-stripes")
    slider = tab.locator(".entry[data-lora='demo-stripes']").get_by_label("scale, slider")
    slider.focus()
    for _ in range(4):
        tab.keyboard.press("ArrowLeft")
    sent = request_of(tab)
    assert sent["loras"] == [{"path": "demo-stripes", "scale": 0.8}]
    assert pixels_of(drawn(tab)) == site.pixels(sent)
    expect(tab.locator("#result .bar")).to_have_count(1)
    expect(tab.locator("#result table")).to_contain_text("applied")
    expect(tab.locator("#panel-image .gallery img")).to_have_count(1)


def test_what_is_copied_draws_the_same_pixels(tab: Page, site: Site, tmp_path: Path) -> None:
    prepare(tab, lora_mode="merged", prompt='a "red" circle\non $HOME, it\'s `blue` \\ ü')
    pick(tab, "demo-night", 0.7)
    wanted = pixels_of(drawn(tab))
    environment = {
        **os.environ,
        "RUNPOD_API_KEY": "any",
        "RUNPOD_ENDPOINT_URL": f"{site.platform.base}/local",
    }
    programs = {"Python": ([sys.executable, "-"], "picture-1.png")}
    if shutil.which("curl") and shutil.which("jq"):
        programs["curl"] = (["bash", "-eo", "pipefail", "-s"], "picture.png")
    for language, (program, name) in programs.items():
        tab.get_by_label("Language").select_option(language, force=True)
        code = tab.locator("#code").text_content() or ""
        assert KEY not in code
        done = subprocess.run(
            program,
            input=code,
            text=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr + code
        with Image.open(tmp_path / name) as picture:
            assert picture.convert("RGB").tobytes() == wanted


def test_a_dropped_picture_of_ours_restores_request_and_pixels(
    tab: Page, site: Site, tmp_path: Path
) -> None:
    prepare(tab, lora_mode="merged", seed=2**63 + 12345, guidance_scale=4.5, scheduler="UniPC")
    pick(tab, "demo-stripes", 0.6)
    pick(tab, "demo-outline", 0.4)
    picture = drawn(tab)
    assert f"seed {2**63 + 12345}" in (tab.locator("#drawn").text_content() or "")
    file = saved(picture, tmp_path / "ours.png")
    prepare(tab, prompt="something else", seed=1)
    for _ in range(2):
        tab.locator(".entry button[aria-label^=Remove]").first.click()
    drop(tab, file)
    sent = request_of(tab)
    assert [one["path"] for one in sent["loras"]] == ["demo-stripes", "demo-outline"]
    assert (sent["seed"], sent["guidance_scale"], sent["scheduler"]) == (
        2**63 + 12345,
        4.5,
        "UniPC",
    )
    assert pixels_of(drawn(tab)) == pixels_of(picture)


def hashes(site: Site, name: str) -> dict[str, str]:
    given = {"action": "library.hashes", "name": name}
    done = site.platform.end(site.platform.run(given))
    found: dict[str, str] = done["output"]
    return found


def test_a_hash_without_the_header_agrees_too(tab: Page, site: Site, tmp_path: Path) -> None:
    own = hashes(site, "demo-night")
    for digits in (own["sha256"][:12], own["autov3"], own["autov2"], own["model_hash"]):
        text = (
            f'a cat <lora:demo-night:0.5>\nSteps: 4, Seed: 1, Lora hashes: "demo-night: {digits}"'
        )
        drop(tab, with_text(tmp_path / "a.png", text))
        expect(tab.locator(".entry.off")).to_have_count(0)
        assert request_of(tab)["loras"] == [{"path": "demo-night", "scale": 0.5}]
    expect(tab.locator("#draw")).to_be_enabled()


@pytest.mark.parametrize(
    ("name", "digits", "said"),
    [
        ("demo-night", "e3b0c44298fc", "says nothing"),
        ("demo-night", "e3b0c44298", "says nothing"),
        ("demo-night", "0123456789ab", "it is another one"),
        ("demo-night", "", "no hash"),
        ("demo-night", "zzzz", "says nothing"),
        ("demo-night", "e", "says nothing"),
        ("my-favourite", "e3b0c44298fc", "not in this library"),
        ("my-favourite", "0123456789ab", "not in this library"),
    ],
)
def test_a_lora_whose_name_and_hash_do_not_agree_is_shown_and_never_replaced(
    tab: Page, site: Site, tmp_path: Path, name: str, digits: str, said: str
) -> None:
    pair = f', Lora hashes: "{name}: {digits}"' if digits else ""
    drop(tab, with_text(tmp_path / "a.png", f"a cat <lora:{name}:0.5>\nSteps: 4, Seed: 1{pair}"))
    expect(tab.locator(".entry.off")).to_contain_text(said)
    expect(tab.locator("#draw")).to_be_disabled()
    assert [one["path"] for one in request_of(tab)["loras"]] == [name]


def test_another_file_with_the_hash_of_a_missing_one_is_only_offered(
    tab: Page, site: Site, tmp_path: Path
) -> None:
    digits = hashes(site, "demo-night")["sha256"][:12]
    tab.evaluate(
        "import('/static/api.js').then((api) => api.act('library.activate', { name: 'demo-night' }))"
    )
    text = (
        f'a <lora:renamed:1>\nSteps: 4, Seed: 1, Lora hashes: "renamed: {digits}, x: 0123456789ab"'
    )
    drop(tab, with_text(tmp_path / "a.png", text))
    expect(tab.locator("#draw")).to_be_disabled()
    expect(tab.get_by_text("hashes of x, which its prompt does not use")).to_be_visible()
    tab.get_by_role("button", name="Use demo-night, whose hash is the same").click()
    expect(tab.locator("#draw")).to_be_enabled()
    assert request_of(tab)["loras"] == [{"path": "demo-night", "scale": 1}]


def test_a_grid_of_16_cells_has_16_right_pictures_and_a_sheet(
    tab: Page, site: Site, tmp_path: Path
) -> None:
    prepare(tab, lora_mode="merged")
    base = request_of(tab)
    tab.click("#tab-compare")
    names = ["demo-night", "demo-outline", "demo-spiral", "demo-stripes"]
    scales = [0.25, 0.5, 0.75, 1]
    tab.fill("#values-across", "\n".join(names))
    tab.fill("#values-down", ", ".join(map(str, scales)))
    tab.click("#compare")
    expect(tab.locator("#grid img")).to_have_count(16)
    expect(tab.locator("#compared")).to_contain_text("16 of 16")
    for row, scale in enumerate(scales, 1):
        for column, name in enumerate(names, 1):
            cell = tab.locator(f"#grid tbody tr:nth-child({row}) td:nth-of-type({column}) img")
            alone = {**base, "loras": [{"path": name, "scale": scale}]}
            found = pixels_of(cell.get_attribute("src") or "")
            assert found == site.pixels(alone), (name, scale)
    with tab.expect_download() as waited:
        tab.click("#sheet")
    waited.value.save_as(tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as sheet:
        assert (sheet.width > 4 * 64, sheet.height > 4 * 64) == (True, True)


def test_a_reload_in_the_middle_of_a_job_finds_it_again(tab: Page) -> None:
    prepare(tab, num_inference_steps=150)
    tab.click("#draw")
    job = tab.locator("[data-job]").get_attribute("data-job")
    expect(tab.locator("[data-job]")).to_contain_text("step")
    tab.reload()
    tab.wait_for_selector("body[data-ready]")
    assert tab.locator("[data-job]").get_attribute("data-job") == job
    tab.wait_for_selector("[data-job]", state="detached")
    expect(tab.locator("#result img")).to_have_count(1)
    assert tab.locator("#num_inference_steps").input_value() == "150"


def test_two_tabs_do_not_disturb_each_other(tab: Page, site: Site) -> None:
    faults: list[str] = []
    other = opened(tab.context, site.url, faults)
    prepare(tab, seed=1, lora_mode="merged")
    prepare(other, seed=2, lora_mode="merged", prompt="a small green star")
    requests = [request_of(one) for one in (tab, other)]
    for one in (tab, other):
        one.click("#draw")
    for one, sent in zip((tab, other), requests, strict=True):
        one.wait_for_selector("#result img")
        shown = one.locator("#result img").first.get_attribute("src") or ""
        assert pixels_of(shown) == site.pixels(sent)
        assert one.locator("#seed").input_value() == str(sent["seed"])
    assert faults == []


def test_a_worker_that_dies_shows_and_the_page_goes_on(tab: Page, site: Site) -> None:
    prepare(tab, num_inference_steps=200)
    tab.click("#draw")
    job = tab.locator("[data-job]").get_attribute("data-job") or ""
    expect(tab.locator("[data-job]")).to_contain_text("step")
    seen = {site.platform.status(job)["workerId"]}
    os.kill(site.platform.pids()[seen.pop()], signal.SIGKILL)
    expect(tab.locator("[data-job]")).to_contain_text("lost")
    tab.wait_for_selector("[data-job]", state="detached")
    expect(tab.locator("#result img")).to_have_count(1)
    site.platform.wait_for_workers(2)


def test_a_job_is_cancelled(tab: Page) -> None:
    prepare(tab, num_inference_steps=1000)
    tab.click("#draw")
    expect(tab.locator("[data-job]")).to_contain_text("step")
    tab.get_by_role("button", name="Cancel").click()
    expect(tab.locator("#result .error")).to_contain_text("cancelled")


def test_an_adapter_is_uploaded_scanned_activated_noted_shown_and_deleted(
    tab: Page, site: Site, tmp_path: Path
) -> None:
    file, own = site.loras / "fresh.safetensors", tmp_path / "fresh.safetensors"
    shutil.copy(site.loras / "demo-stripes.safetensors", own)
    tab.click("#tab-library")
    tab.locator("#upload").set_input_files(own)
    expect(tab.get_by_text("fresh.safetensors is here.")).to_be_visible()
    assert file.read_bytes() == own.read_bytes()
    tab.click("#scan")
    card = tab.locator("#panel-library .card[data-name='fresh.safetensors']")
    card.click()
    page = tab.locator("#adapter")
    expect(page.locator("svg rect")).not_to_have_count(0)
    page.locator("#activate").click()
    expect(page.locator("table").first).to_contain_text("active")
    expect(page.locator("table").first).to_contain_text(hashes(site, "fresh")["autov3"])
    page.get_by_text("Note", exact=True).click()
    page.get_by_label("default scale").fill("0.35")
    page.get_by_label("sets of words, one a line").fill("stripes, bold\nstripes, thin")
    page.get_by_role("button", name="Keep the note").click()
    expect(card).to_contain_text("at 0.35")
    page.get_by_role("button", name="Use it").click()
    tab.click("#tab-image")
    assert request_of(tab)["loras"] == [{"path": "fresh", "scale": 0.35}]
    tab.get_by_role("button", name="stripes, thin", exact=True).click()
    assert request_of(tab)["prompt"].endswith(", stripes, thin")
    prepare(tab)
    drawn(tab)
    tab.get_by_role("button", name="Thumbnail of fresh").click()
    until((site.loras / "fresh.safetensors.preview.webp").exists)
    tab.click("#tab-library")
    expect(card.locator("img")).to_have_attribute("src", re.compile("^data:image/webp"))
    card.click()
    page.get_by_role("button", name="Delete").click()
    assert file.exists()
    page.get_by_role("button", name="Delete the file for ever?").click()
    expect(card).to_have_count(0)
    assert [path.name for path in site.loras.iterdir() if path.name.startswith("fresh")] == []


def test_a_fetch_shows_how_far_it_is(tab: Page, site: Site, server: LoopbackServer) -> None:
    gate, body = threading.Event(), as_bytes(kohya(seed=91))
    url = server.serve("/slowly.safetensors", body, gate=gate, gate_after=len(body) // 2)
    tab.click("#tab-library")
    tab.fill("#source", url)
    tab.get_by_role("button", name="Fetch", exact=True).click()
    line = tab.locator("#panel-library p.line", has=tab.locator("progress"))
    expect(line).to_contain_text("downloading 1 LoRA")
    assert 0 < line.locator("progress").evaluate("one => one.value") <= 0.5
    gate.set()
    expect(tab.get_by_text("slowly")).to_contain_text(["is here (downloaded, lora"])
    assert body in [path.read_bytes() for path in site.loras.glob("slowly*.safetensors")]


def test_live_says_what_it_needs_where_a_queue_is_asked(tab: Page) -> None:
    tab.click("#tab-live")
    expect(tab.locator("#no-live")).to_contain_text("WORKER_SERVE=http")
    expect(tab.locator("#live-start")).to_have_count(0)


def test_a_preset_is_kept_chosen_and_deleted(tab: Page) -> None:
    pick(tab, "demo-outline", 0.5)
    tab.click("#tab-library")
    tab.fill("#preset-name", "lines")
    tab.get_by_role("button", name="as a preset").click()
    expect(tab.locator("#panel-library .entry")).to_contain_text("demo-outline 0.5")
    tab.click("#tab-image")
    tab.locator("#lora_selection").select_option("lines")
    assert request_of(tab)["lora_selection"] == "lines"
    tab.click("#tab-library")
    tab.locator("#panel-library .entry button").click()
    tab.get_by_role("button", name="Delete the preset?").click()
    expect(tab.locator("#panel-library .entry")).to_have_count(0)


def test_a_mask_that_is_painted_is_drawn_in(tab: Page, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (10, 200, 30)).save(tmp_path / "start.png")
    prepare(tab)
    tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    tab.get_by_label("picture to start from").set_input_files(tmp_path / "start.png")
    spot = tab.locator(".paint canvas")
    expect(spot).to_have_attribute("width", "64")
    box = spot.bounding_box()
    assert box
    tab.mouse.move(box["x"] + 8, box["y"] + 8)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 20, box["y"] + 8, steps=4)
    tab.mouse.up()
    pixels = pixels_of(drawn(tab))
    assert pixels[-3:] == bytes((10, 200, 30))  # what was not painted stays bit for bit
    assert pixels[(8 * 64 + 12) * 3 :][:3] != bytes((10, 200, 30))


def test_words_are_counted_and_weighed(tab: Page) -> None:
    tab.fill("#prompt", "a red circle")
    expect(tab.get_by_text("1 of 75")).to_be_visible()
    tab.evaluate("document.getElementById('prompt').setSelectionRange(2, 5)")
    tab.locator("#prompt").press("Control+ArrowUp")
    assert tab.locator("#prompt").input_value() == "a (red:1.1) circle"
    tab.locator("#prompt").press("Control+ArrowUp")
    assert tab.locator("#prompt").input_value() == "a (red:1.2) circle"
    for _ in range(2):
        tab.locator("#prompt").press("Control+ArrowDown")
    assert tab.locator("#prompt").input_value() == "a red circle"


def test_the_worker_tab_shows_queue_memory_and_the_last_jobs(tab: Page) -> None:
    prepare(tab)
    drawn(tab)
    tab.click("#tab-worker")
    expect(tab.locator("#queue")).to_contain_text("inProgress")
    expect(tab.locator("#health")).to_contain_text("demo")
    expect(tab.locator("#panel-worker .entry .bar")).to_have_count(1)


def test_the_tabs_are_walked_by_keys(tab: Page) -> None:
    tab.locator("#tab-image").focus()
    for name in ("compare", "live", "library", "worker", "image"):
        tab.keyboard.press("ArrowRight")
        expect(tab.locator(f"#tab-{name}")).to_be_focused()
        expect(tab.locator(f"#panel-{name}")).to_be_visible()
    unnamed = tab.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")].filter((one) =>
          !(one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim()
            || one.placeholder)).length"""
    )
    assert unnamed == 0


def test_it_fits_a_phone(site: Site, browser: Browser) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    tab = opened(context, site.url, [])
    for name in ("image", "compare", "live", "library", "worker"):
        tab.click(f"#tab-{name}")
        wide = tab.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360, name
    context.close()


HOSTILE = (
    *("<script>window.hacked = 1</script>", "<img src=x onerror='window.hacked=1'>"),
    *("javascript:window.hacked=1", "</span><svg onload=window.hacked=1>", "${window.hacked=1}"),
    *("{{constructor.constructor('window.hacked=1')()}}", "'-window.hacked=1-'"),
    *(
        '"><iframe srcdoc="<script>parent.hacked=1</script>">',
        "\u202eevil",
        "<style>*{display:none}</style>",
    ),
    *("<base href='https://evil.example/'>", "<form action=https://evil.example><input name=q>"),
    *("<link rel=stylesheet href=https://evil.example/x>", "<a href='javascript:hacked=1'>x</a>"),
    *(
        "<math><mtext><script>window.hacked=1</script>",
        "&lt;script&gt;window.hacked=1&lt;/script&gt;",
    ),
    *(
        "<object data='data:text/html,<script>parent.hacked=1</script>'>",
        "__proto__",
        "constructor",
    ),
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
)


def test_twenty_hostile_metadata_files_run_nothing(tab: Page, site: Site, tmp_path: Path) -> None:
    assert len(HOSTILE) == 20
    keys = ("ss_output_name", "modelspec.title", "modelspec.trigger_phrase", "modelspec.author")
    folder = site.loras / "hostile"
    folder.mkdir()
    for number, text in enumerate(HOSTILE):
        tags = {"ss_tag_frequency": json.dumps({f"10_{text}": {text: 5}}), "ss_base_model": text}
        told = dict.fromkeys((*keys, "modelspec.description", "ss_sd_model_name"), text) | tags
        write(folder / f"<b onclick=hacked=1>{number}.safetensors", kohya(), told)
        (folder / f"<b onclick=hacked=1>{number}.preview.png").write_text(text)
    tab.click("#tab-library")
    tab.click("#scan")
    expect(tab.locator("#panel-library .card[data-name^=hostile]")).to_have_count(20)
    for number in range(20):
        tab.locator("#panel-library .card[data-name^=hostile]").nth(number).click()
        expect(tab.locator("#adapter")).to_contain_text("Hashes")
        tab.keyboard.press("Escape")
    tab.click("#tab-image")
    for number, text in enumerate(HOSTILE):
        drop(
            tab,
            with_text(
                tmp_path / f"{number}.png", f"{text} <lora:{text}:1>\nSteps: 4, Seed: 1, {text}: 1"
            ),
        )
    assert tab.evaluate("window.hacked === undefined")
    assert (
        tab.locator("iframe, object, base, main style, main link, main script, main form").count()
        == 0
    )
    shutil.rmtree(folder)


def test_the_key_is_nowhere_in_the_browser(site: Site, browser: Browser) -> None:
    bodies: list[str] = []
    context = browser.new_context()
    faults: list[str] = []
    tab = opened(context, site.url, faults)
    tab.on("response", lambda answer: bodies.append(str(answer.headers)))
    prepare(tab)
    drawn(tab)
    for name in ("compare", "library", "worker"):
        tab.click(f"#tab-{name}")
    kept = tab.evaluate(
        "JSON.stringify([{ ...sessionStorage }, { ...localStorage }, document.cookie])"
    )
    paths = ("/", "/api/about", "/api/health", "/static/app.js", "/static/code.js")
    bodies += [
        tab.content(),
        kept,
        site.platform.log(),
        *(site.page.get(one).text for one in paths),
    ]
    assert not [one for one in bodies if KEY in one]
    assert site.platform.log()
    context.close()
    assert faults == []


def test_an_answer_is_streamed_with_its_figures_and_two_stand_side_by_side(
    text_tab: Page, text_site: Site
) -> None:
    text_tab.fill("#question", "What colour is a fox?")
    text_tab.fill("#temperature", "0")
    text_tab.fill("#max_tokens", "40")
    text_tab.locator("#beside").check()
    text_tab.locator("#adapter-2").select_option("pirate")
    text_tab.click("#answer")
    expect(text_tab.locator("#told-1")).to_contain_text("tokens/s")
    expect(text_tab.locator("#told-2")).to_contain_text("first token")
    shown = [text_tab.locator(f"#answer-{number}").text_content() for number in (1, 2)]
    for text, loras in zip(shown, ([], ["pirate"]), strict=True):
        asked = {
            "messages": [{"role": "user", "content": "What colour is a fox?"}],
            "sampling_params": {"temperature": 0, "max_tokens": 40},
            "loras": loras,
        }
        done = text_site.platform.end(text_site.platform.run(asked))
        assert done["output"][0]["choices"][0]["message"]["content"] == text
    assert shown[0] != shown[1]
    text_tab.click("#tab-worker")
    expect(text_tab.locator("#health")).to_contain_text("tokens_per_second")
