"""The page's server lets only the page ask, and keeps the key to itself."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from page.backend import AddressInvalid, Endpoint, JobUnknown, checked_id
from page.server import MAX_JOB
from tests.emulator.running import Web, web
from tests.page.serving import Served, served
from tests.server import LoopbackServer
from tests.waiting import until

KEY = "rpa_this-key-is-nobodys-business"


@pytest.fixture
def emulated(tmp_path: Path) -> Iterator[Web]:
    with web(tmp_path, api_key=KEY) as running:
        yield running


@pytest.fixture
def page(emulated: Web) -> Iterator[Served]:
    with served(lambda: Endpoint(f"{emulated.base}/local", KEY)) as running:
        yield running


def test_a_job_goes_to_the_endpoint_and_its_answer_comes_back(page: Served, emulated: Web) -> None:
    job = page.post("/api/run", {"input": {"prompt": "x"}, "policy": {"ttl": 60_000}}).json()
    assert page.get(f"/api/status/{job['id']}").json()["status"] == "IN_QUEUE"
    assert page.get("/api/health").json()["jobs"]["inQueue"] == 1
    taken = emulated.take()
    assert (taken["input"], taken["policy"]) == ({"prompt": "x"}, {"ttl": 60_000})
    emulated.finish(job["id"], {"output": {"seed": 1}})
    done = until(lambda: page.get(f"/api/status/{job['id']}").json())
    assert (done["status"], done["output"]) == ("COMPLETED", {"seed": 1})
    other = page.post("/api/run", {"input": {"prompt": "y"}}).json()
    assert page.post(f"/api/cancel/{other['id']}", {}).json()["status"] == "CANCELLED"


def test_a_job_of_several_megabytes_goes_through(page: Served, emulated: Web) -> None:
    page.post("/api/run", {"input": {"image_url": "x" * 5_000_000}})
    assert len(emulated.take()["input"]["image_url"]) == 5_000_000


def test_what_the_browser_adds_to_a_job_is_not_passed_on(page: Served, emulated: Web) -> None:
    page.post("/api/run", {"input": {}, "webhook": "http://evil.example", "s3Config": {}})
    assert set(emulated.take()) == {"id", "input"}


def test_a_seed_of_64_bits_comes_and_goes_without_being_rounded(
    page: Served, emulated: Web
) -> None:
    seed = 2**64 - 1
    job = page.post("/api/run", {"input": {"prompt": "x", "seed": str(seed)}}).json()["id"]
    assert emulated.take()["input"]["seed"] == seed
    emulated.finish(job, {"output": {"seed": seed, "seeds": [seed, 2**53 - 1]}})
    done = until(lambda: page.get(f"/api/status/{job}").json())
    assert done["output"] == {"seed": str(seed), "seeds": [str(seed), 2**53 - 1]}


FOREIGN: tuple[dict[str, str], ...] = (
    {"Host": "evil.example"},
    {"Host": "127.0.0.1"},
    {"Host": "127.0.0.1.evil.example:{port}"},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "https://127.0.0.1:{port}"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": ""},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
)


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nobody_else_can_ask(
    page: Served, emulated: Web, headers: dict[str, str], method: str
) -> None:
    sent = {name: text.format(port=page.port) for name, text in headers.items()}
    for path in ("/", "/api/about", "/api/health", "/api/run", "/static/app.js"):
        answer = page.ask(method, path, json={"input": {}}, headers=sent)
        assert (answer.status_code, answer.json()["error"][:12]) == (403, "NOT_THE_PAGE")
    assert [*emulated.queue] == []


def test_a_link_from_another_site_opens_the_page_and_no_frame_does(page: Served) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    for dest, status in (("document", 200), ("iframe", 403), ("script", 403)):
        answer = page.ask("GET", "/", headers={**link, "Sec-Fetch-Dest": dest})
        assert answer.status_code == status
    form = {**link, "Sec-Fetch-Dest": "document", "Origin": "http://evil.example"}
    assert page.ask("POST", "/api/run", json={"input": {}}, headers=form).status_code == 403


def test_a_change_without_an_origin_is_refused(page: Served) -> None:
    answer = requests.post(page.url + "/api/run", json={"input": {}}, timeout=60)
    assert answer.status_code == 403


def test_a_document_may_run_no_script_of_its_own_and_ask_no_other_host(page: Served) -> None:
    for path in ("/", "/static/app.js", "/api/about", "/nothing"):
        policy = page.get(path).headers["Content-Security-Policy"]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert "unsafe" not in policy
        assert "http" not in policy
        assert "*" not in policy
        assert page.get(path).headers["X-Content-Type-Options"] == "nosniff"


def test_the_key_is_in_no_answer(page: Served, emulated: Web) -> None:
    emulated_key = KEY
    job = page.post("/api/run", {"input": {"prompt": "x"}}).json()["id"]
    paths = ["/", "/api/about", "/api/health", f"/api/status/{job}", "/api/status/none", "/nothing"]
    answers = [page.get(path) for path in paths] + [page.post("/api/run", {"input": None})]
    for answer in answers:
        assert emulated_key not in answer.text + str(answer.headers)


@pytest.mark.parametrize("status", [200, 400, 500])
def test_an_endpoint_that_repeats_the_key_is_not_repeated(
    server: LoopbackServer, status: int
) -> None:
    server.serve_json("/v2/x/health", {"error": f"bad token {KEY}"})
    server.replies["/v2/x/health"].status = status
    with served(lambda: Endpoint(server.url("/v2/x"), KEY)) as page:
        answer = page.get("/api/health")
        assert KEY not in answer.text
        assert "bad token [key]" in answer.json()["error"]


def test_a_redirect_does_not_take_the_key_elsewhere(server: LoopbackServer) -> None:
    server.serve("/v2/x/health", to=server.serve_json("/other", {"stolen": 1}))
    with served(lambda: Endpoint(server.url("/v2/x"), KEY)) as page:
        assert page.get("/api/health").json()["error"].startswith("ENDPOINT_UNREACHABLE")
    assert server.hits["/other"] == 0


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, 401), (403, 401), (404, 404), (413, 413), (429, 429), (500, 502)],
)
def test_a_refusal_of_the_endpoint_is_told(server: LoopbackServer, status: int, code: int) -> None:
    server.serve_json("/v2/x/health", {"error": "why"})
    server.replies["/v2/x/health"].status = status
    with served(lambda: Endpoint(server.url("/v2/x"), KEY)) as page:
        assert page.get("/api/health").status_code == code


def test_an_endpoint_that_is_not_there_is_told() -> None:
    with served(lambda: Endpoint("http://127.0.0.1:9/v2/x", KEY)) as page:
        answer = page.get("/api/health")
        assert answer.status_code == 502
        assert "127.0.0.1:9 cannot be reached" in answer.json()["error"]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/v2/x",
        "ftp://example.com",
        "https://user:pass@example.com/v2/x",
        "https://example.com/v2/x?key=1",
        "example.com",
        "",
    ],
)
def test_an_address_that_would_give_the_key_away_is_refused(url: str) -> None:
    with pytest.raises(AddressInvalid) as caught:
        Endpoint(url, KEY)
    assert KEY not in str(caught.value)


def test_an_address_without_a_key_may_be_plain() -> None:
    assert Endpoint("http://example.com/v2/x/").url == "http://example.com/v2/x"


@pytest.mark.parametrize("job_id", ["", "..", "a/b", "a?b", "a%2Fb", "a b", "-", "x" * 200])
def test_an_id_leads_to_no_other_address(job_id: str) -> None:
    with pytest.raises(JobUnknown):
        checked_id(job_id)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"input": 1}', b"[" * 100_000, b"\xff"])
def test_a_body_that_is_no_job_is_refused(page: Served, body: bytes) -> None:
    answer = page.ask("POST", "/api/run", data=body)
    assert (answer.status_code, answer.json()["error"][:13]) == (400, "INVALID_INPUT")


def test_a_body_that_is_too_large_is_refused(page: Served) -> None:
    answer = page.ask("POST", "/api/run", data=b" " * (MAX_JOB + 1))
    assert answer.status_code == 400


def png(text: str | None, key: str = "parameters") -> bytes:
    info = PngInfo()
    if text is not None:
        info.add_text(key, text)
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def read(page: Served, body: bytes) -> requests.Response:
    return page.ask("POST", "/api/read", data=body)


def test_a_picture_tells_the_request_and_the_hashes_it_was_drawn_with(page: Served) -> None:
    text = 'a cat <lora:x:0.5>\nSteps: 5, Seed: 3, Lora hashes: "x: E3B0C44298FC, y z: 0123"'
    found: dict[str, Any] = read(page, png(text)).json()
    assert found["input"]["loras"] == [{"path": "x", "scale": 0.5}]
    assert found["hashes"] == {"x": "e3b0c44298fc", "y z": "0123"}


@pytest.mark.parametrize("hashes", ['"', '"x"', "x", ":", '"a: b: c"', '{"x": 1}', '"\\ud800: 1"'])
def test_hashes_of_any_form_are_read_or_passed_over(page: Served, hashes: str) -> None:
    answer = read(page, png(f"a cat\nSteps: 5, Lora hashes: {hashes}"))
    assert answer.status_code == 200
    assert isinstance(answer.json()["hashes"], dict)


@pytest.mark.parametrize("body", [b"", b"GIF89a", b"<svg/>", png(None), png("x", "other")])
def test_a_picture_without_parameters_is_told(page: Served, body: bytes) -> None:
    answer = read(page, body)
    assert (answer.status_code, answer.json()["error"][:13]) == (400, "INVALID_INPUT")


def test_the_static_files_are_small_and_name_no_other_host() -> None:
    folder = Path(__file__).parents[2] / "page" / "static"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 200_000
    for path in files:
        text = path.read_text()
        assert "innerHTML" not in text
        assert "insertAdjacentHTML" not in text
        assert "document.write" not in text
        assert "eval(" not in text
        if path.suffix == ".html":
            assert "style=" not in text
            assert " on" + "click" not in text
