"""The emulator as one web application."""

from __future__ import annotations

import hmac
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from emulator.bodies import Json
from emulator.client_api import WEBHOOK_PAUSE, ClientApi
from emulator.job import Status
from emulator.jobs import JobQueue
from emulator.openai_api import OpenAiApi
from emulator.worker_api import WorkerApi
from emulator.workers import WorkerPool

PAGE = """<!doctype html><meta charset="utf-8"><title>emulator</title>
<style>body{font:16px system-ui;margin:2rem}td,th{padding:.2rem 1rem;text-align:left}</style>
<h1>RunPod on this machine</h1><p id="line"></p><table id="jobs"></table>
<script>
const show = async () => {
  const state = await (await fetch("state")).json();
  document.getElementById("line").textContent = Object.entries(state.counts)
    .map(([name, count]) => `${name}: ${count}`).join("   ");
  const table = document.getElementById("jobs");
  table.replaceChildren(...[["job", "status", "worker", "ms"], ...state.jobs].map(row => {
    const line = document.createElement("tr");
    line.append(...row.map(text => {
      const cell = document.createElement("td"); cell.textContent = text ?? ""; return cell;
    }));
    return line;
  }));
};
show(); setInterval(show, 1000);
</script>
"""


def new_app(
    queue: JobQueue,
    pool: WorkerPool,
    *,
    endpoint: str,
    worker_key: str,
    api_key: str | None = None,
    webhook_pause: float = WEBHOOK_PAUSE,
) -> FastAPI:
    """Both APIs for one endpoint. `api_key`: what clients must send as `Bearer`, or None."""
    app = FastAPI(title="RunPod on this machine", openapi_url=None)
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"]
    )
    app.add_exception_handler(AnyHTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(ClientDisconnect, _refused)

    prefix, bearer = f"/v2/{endpoint}", api_key and f"Bearer {api_key}"
    client_key, own_key = Depends(_Key(bearer)), Depends(_Key(worker_key))
    clients = ClientApi(queue, pool, webhook_pause=webhook_pause).router
    workers = WorkerApi(queue, pool).router
    app.include_router(_views(queue, pool, client_key))
    app.include_router(clients, prefix=prefix, dependencies=[client_key])
    openai = OpenAiApi(queue).router
    app.include_router(openai, prefix=f"{prefix}/openai", dependencies=[client_key])
    app.include_router(workers, prefix=prefix, dependencies=[own_key])
    return app


def _views(queue: JobQueue, pool: WorkerPool, client_key: Any) -> APIRouter:
    """The page, and the states that it and the tests look at."""
    views = APIRouter()

    @views.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE

    @views.get("/state")
    async def state() -> Json:
        """The counts and the last 50 jobs, as the page shows them."""
        jobs = sorted(queue, key=lambda job: job.created, reverse=True)[:50]
        return Json(
            {
                "counts": counts(queue, pool),
                "jobs": [[job.id, job.status, job.worker, job.execution_ms] for job in jobs],
            }
        )

    @views.get("/state/{job_id}", dependencies=[client_key])
    async def story(job_id: str) -> Json:
        """What a job's worker posted, and when."""
        job = queue.find(job_id)
        if job is None:
            raise HTTPException(404, "job not found")
        names = ("updates", "late", "answers", "created", "started", "ended", "let_go")
        return Json({name: getattr(job, name) for name in names})

    return views


class _Key:
    """Passes requests with this Authorization, and every request if it is None."""

    def __init__(self, wanted: str | None) -> None:
        self._wanted = wanted

    async def __call__(self, request: Request) -> None:
        sent = request.headers.get("Authorization", "").encode()
        if self._wanted and not hmac.compare_digest(sent, self._wanted.encode()):
            raise HTTPException(401, "unauthorized")


async def _refused(_: Request, error: Exception) -> Json:
    """The one form of all refusals. A client that hung up, such as a killed worker, does not read it."""
    if isinstance(error, AnyHTTPException):
        return Json({"error": error.detail}, error.status_code, headers=error.headers)
    return Json({"error": str(error)}, 400)


def counts(queue: JobQueue, pool: WorkerPool) -> dict[str, int]:
    """The status line's numbers."""
    return {
        "queue": queue.count(Status.IN_QUEUE),
        "running": queue.count(Status.IN_PROGRESS),
        "done": queue.count(Status.COMPLETED),
        "failed": queue.count(Status.FAILED) + queue.count(Status.TIMED_OUT),
        "cancelled": queue.count(Status.CANCELLED),
        "workers": len(pool.workers),
        "died": pool.deaths,
    }
