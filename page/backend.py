"""Who answers the page's jobs: `Backend`, and the endpoint of RunPod's API that is reached over HTTP."""

from __future__ import annotations

import io
import ipaddress
import json
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

import aiohttp

from live.wire import Receive, Send
from lora.errors import CodedError

Json = dict[str, Any]

RUNPOD = "https://api.runpod.ai/v2"

SECONDS = aiohttp.ClientTimeout(total=120, connect=15)

LEAST_SECRET = 12
"""Characters of a key from which on it is taken out of answers: a shorter one may be a part of any text."""

JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
"""What an id of a job looks like: nothing in it leads to another address of the API."""


class PageError(CodedError):
    """A failure between the page and what answers its jobs; `status` is the HTTP status for the browser."""

    status = 502


class EndpointUnreachable(PageError):
    """The endpoint cannot be reached, or what answers there is no endpoint."""

    code = "ENDPOINT_UNREACHABLE"


class EndpointRefused(PageError):
    """The endpoint answered with an error."""

    code = "ENDPOINT_REFUSED"

    def __init__(self, sentence: str, hint: str = "", status: int = 502) -> None:
        super().__init__(sentence, hint)
        self.status = status


class AddressInvalid(PageError):
    """The address of an endpoint cannot be used."""

    code = "ADDRESS_INVALID"
    status = 400


class JobUnknown(PageError):
    """There is no job of this id, or not any more."""

    code = "JOB_UNKNOWN"
    status = 404


class Backend(Protocol):
    """Queues jobs and tells how they stand, in the words of RunPod's API. Each call raises: PageError."""

    async def run(self, job: Json) -> Json:
        """Queues a job; its `id` and `status`."""
        ...

    async def status(self, job_id: str) -> Json:
        """How a job stands: `status`, and `output` or `error`."""
        ...

    async def stream(self, job_id: str) -> Json:
        """What a job yielded since the last call, as `stream`; each piece comes once."""
        ...

    async def cancel(self, job_id: str) -> Json:
        """Ends a job."""
        ...

    async def health(self) -> Json:
        """Counts of `jobs` and `workers`."""
        ...

    def about(self) -> Json:
        """What the page shows of it: `kind`, `name`, and the `url` that clients would call; no secret."""
        ...

    async def close(self) -> None:
        """Lets go of connections and threads."""
        ...


@runtime_checkable
class HasLive(Protocol):
    """A backend whose worker draws live frames."""

    async def live(self, receive: Receive, send: Send) -> None:
        """Serves one session, until it is over. Raises: PageError if none can begin; Closed."""
        ...


class Endpoint:
    """An endpoint of RunPod's API, or the emulator. The key is sent there and shown to nobody."""

    def __init__(self, url: str, key: str = "") -> None:
        """`url`: its address, up to and with its id. Raises: AddressInvalid."""
        self.url = checked_url(url, key)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._key = key
        self._session: aiohttp.ClientSession | None = None

    async def run(self, job: Json) -> Json:
        """Queues a job; its `id` and `status`."""
        return await self._ask("POST", "run", job)

    async def status(self, job_id: str) -> Json:
        """How a job stands: `status`, and `output` or `error`."""
        return await self._ask("GET", f"status/{checked_id(job_id)}")

    async def stream(self, job_id: str) -> Json:
        """What a job yielded since the last call, as `stream`; each piece comes once."""
        return await self._ask("GET", f"stream/{checked_id(job_id)}")

    async def cancel(self, job_id: str) -> Json:
        """Ends a job."""
        return await self._ask("POST", f"cancel/{checked_id(job_id)}")

    async def health(self) -> Json:
        """Counts of `jobs` and `workers`."""
        return await self._ask("GET", "health")

    def about(self) -> Json:
        """What the page shows of it."""
        return {"kind": "endpoint", "name": urlsplit(self.url).netloc, "url": self.url}

    async def close(self) -> None:
        """Closes its connections."""
        if self._session:
            await self._session.close()

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Json:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=SECONDS, headers=self._headers)
        try:
            # A redirect would take the key elsewhere.
            async with self._session.request(
                method, f"{self.url}/{path}", allow_redirects=False, **as_json(body)
            ) as answer:
                if answer.status == 200:
                    found = _object(without_key(await answer.read(), self._key))
                    if found is not None:
                        return found
                raise await error_of(answer, self._key)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EndpointUnreachable(
                f"{urlsplit(self.url).netloc} cannot be reached ({type(error).__name__})",
                "Is the address right, and does the endpoint run?",
            ) from error


def as_json(body: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a request with this body: a stream, since a large body would hold up the event loop."""
    if body is None:
        return {}
    data = io.BytesIO(json.dumps(body).encode())
    return {"data": data, "headers": {"Content-Type": "application/json"}}


async def error_of(answer: aiohttp.ClientResponse, key: str) -> PageError:
    """What an endpoint's refusal means."""
    found = _object(without_key(await answer.read(), key))
    if answer.status == 404 and "status/" in str(answer.url):
        return JobUnknown("the endpoint knows no such job", "Answers are kept for half an hour.")
    if answer.status in (401, 403):
        hint = "Set RUNPOD_API_KEY where the page is started."
        return EndpointRefused("the endpoint refuses the key", hint, 401)
    if 300 <= answer.status < 400 or found is None:
        return EndpointUnreachable(
            f"what answers there is no endpoint (HTTP {answer.status})",
            "The address ends in the endpoint's id: https://api.runpod.ai/v2/ID.",
        )
    error = found.get("error") or found
    if isinstance(error, dict) and "message" in error:
        error = f"{error.get('code')}: {error['message']}"
    status = answer.status if 400 <= answer.status < 500 else 502
    return EndpointRefused(f"it answered HTTP {answer.status}: {str(error)[:500]}", "", status)


def without_key(body: bytes, key: str) -> bytes:
    """A body in which the key does not stand, even if who answers repeats it."""
    return body.replace(key.encode(), b"[key]") if len(key) >= LEAST_SECRET else body


def _object(body: bytes) -> Json | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def checked_url(url: str, key: str = "") -> str:
    """The address without its last slash.

    Raises: AddressInvalid if it is no http(s) address of its own, or a key would go over the network
    without TLS.
    """
    url = url.rstrip("/")
    parts = urlsplit(url)
    sound = parts.scheme in ("http", "https") and parts.hostname
    if not sound or "@" in parts.netloc or parts.query or parts.fragment:
        raise AddressInvalid(
            "the address is no plain http(s) URL", "https://api.runpod.ai/v2/ID, without a key."
        )
    if key and parts.scheme == "http" and not _is_here(parts.hostname or ""):
        raise AddressInvalid(
            "the key would go over the network unencrypted", "Use https, or unset RUNPOD_API_KEY."
        )
    return url


def checked_id(job_id: str) -> str:
    """The id. Raises: JobUnknown if no job can have it."""
    if not JOB_ID.fullmatch(job_id):
        raise JobUnknown("this is no id of a job")
    return job_id


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
