"""The cache beside curl, and its look-ups: `make bench-cache` (or `python -m benchmarks.cache`).

A file of 500 MB from a server on this machine, by curl and by `VolumeCache.get` with its hash, its checks and
its fsync, in turn, for several rounds; what counts is the ratio of the medians. Then the time to find an
entry in a folder of 5,000. Writes `benchmarks/results/cache.json` and its part of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.report import fill_in, write_result
from lora.durable import sha256_of
from lora.fetch.rules import WebRules
from lora.fetch.sources import Reference, RemoteFile, parse
from lora.fetch.web import Web
from lora.volume.cache import VolumeCache
from lora.volume.records import Record, record_path, write
from lora.volume.shelf import file_name

log = logging.getLogger("cache")

SIZE = 500_000_000
ENTRIES = 5_000
LOOKUPS = 1_000

LEAST_RATIO = 0.8
MOST_MEMORY = 64e6
MOST_SECONDS = 0.002


Spawn = multiprocessing.get_context("spawn")


def write_adapter(path: Path, size: int) -> Path:
    """A .safetensors file whose one tensor has so many bytes; a block of random ones, time and again."""
    about = {"lora": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    header = json.dumps(about).encode()
    block = random.Random(0).randbytes(min(size, 1 << 20))
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, size, len(block)):
            stream.write(block[: size - start])
    return path


# --- from a server -----------------------------------------------------------------------------------


def _serve(path: Path, tell: Connection) -> None:
    """Answers every request with the file, which the kernel sends from the page cache (sendfile)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        tell.send(server.getsockname()[1])
        while True:
            connection, _ = server.accept()
            with connection, path.open("rb") as stream:
                while b"\r\n\r\n" not in connection.recv(1 << 16):
                    pass
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {path.stat().st_size}\r\n"
                connection.sendall(f"{head}Connection: close\r\n\r\n".encode())
                connection.sendfile(stream)


@contextmanager
def served(path: Path) -> Iterator[str]:
    """The URL of the file, from a process of its own while the block runs."""
    ours, theirs = Spawn.Pipe()
    server = Spawn.Process(target=_serve, args=(path, theirs), daemon=True)
    server.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/lora.safetensors"
    finally:
        server.kill()
        server.join()


def by_curl(url: str, folder: Path) -> dict[str, float]:
    """Seconds that curl says it took, its start excluded."""
    target = folder / "curl.safetensors"
    command = ["curl", "--silent", "--show-error", "--fail", "--write-out", "%{time_total}"]
    done = subprocess.run(
        [*command, "--output", str(target), url], capture_output=True, text=True, check=True
    )
    target.unlink()
    return {"seconds": float(done.stdout)}


def by_cache(url: str, folder: Path) -> dict[str, float]:
    """Seconds and peak of memory of `VolumeCache.get`, in a fresh process."""
    ours, theirs = Spawn.Pipe()
    worker = Spawn.Process(target=_get, args=(url, folder / "loras", theirs))
    worker.start()
    figures: dict[str, float] = ours.recv()
    worker.join()
    shutil.rmtree(folder / "loras")
    return figures


def _get(url: str, folder: Path, tell: Connection) -> None:
    cache = VolumeCache(folder, web=Web(WebRules(allow_private=True)))
    place = cache.resolve(Reference(url))
    memory = _memory("VmRSS")
    begun = time.perf_counter()
    entry = cache.get(place)
    seconds = time.perf_counter() - begun
    peak = _memory("VmHWM") - memory
    if sha256_of(entry.path) != entry.record.sha256:
        raise ValueError("the file is not what its record says")
    tell.send({"seconds": seconds, "memory": peak})


def _memory(name: str) -> int:
    """Bytes, now (VmRSS) or at the peak (VmHWM). Not getrusage: that remembers the process before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure_throughput(folder: Path, size: int, rounds: int) -> dict[str, Any]:
    """Both in turn, each first in every other round."""
    file = write_adapter(folder / "source.safetensors", size)
    file.read_bytes()  # into the page cache
    found: dict[str, list[dict[str, float]]] = {"curl": [], "ours": []}
    turn: list[tuple[str, Callable[[str, Path], dict[str, float]]]] = [
        ("curl", by_curl),
        ("ours", by_cache),
    ]
    with served(file) as url:
        by_curl(url, folder)  # warm up
        for number in range(rounds):
            for who, get in turn if number % 2 else turn[::-1]:
                os.sync()
                figures = get(url, folder)
                found[who].append(figures)
                log.info("round %d of %d: %s %s", number + 1, rounds, who, figures)
    file.unlink()
    seconds = {who: [one["seconds"] for one in took] for who, took in found.items()}
    median = {who: statistics.median(times) for who, times in seconds.items()}
    return {
        "file_mb": size / 1e6,
        "rounds": rounds,
        "mb_per_second": {who: round(size / 1e6 / time, 1) for who, time in median.items()},
        "ratio": round(median["curl"] / median["ours"], 3),
        "memory_mb": round(max(one["memory"] for one in found["ours"]) / 1e6, 1),
        "all_seconds": {who: [round(time, 4) for time in times] for who, times in seconds.items()},
    }


# --- in a full folder --------------------------------------------------------------------------------


def fill(root: Path, count: int) -> list[str]:
    """So many entries as the cache writes them; their URLs."""
    root.mkdir()
    urls = [f"https://example.com/{number}/style-{number}.safetensors" for number in range(count)]
    for url in urls:
        path = write_adapter(root / _file_name(url), 256)
        stat, now = path.stat(), time.time()
        record = Record(url, sha256_of(path), stat.st_size, stat.st_mtime_ns, now, now)
        write(root, record_path(path), record)
    return urls


def _file_name(url: str) -> str:
    remote = parse(Reference(url))
    if not isinstance(remote, RemoteFile):
        raise TypeError(url)
    return file_name(remote)


def measure_lookups(folder: Path, entries: int) -> dict[str, dict[str, float]]:
    """How a request names an entry -> milliseconds until its path and record are known."""
    root = folder / "full"
    urls = fill(root, entries)
    cache = VolumeCache(root)
    names: dict[str, Callable[[str], str]] = {
        "its URL": str,
        "its name": _file_name,
        "its name without extension": lambda url: _file_name(url).removesuffix(".safetensors"),
    }
    found = {}
    for by, name in names.items():
        times = []
        for url in random.Random(0).sample(urls, min(LOOKUPS, entries)):
            reference = Reference(name(url))
            begun = time.perf_counter()
            entry = cache.get(cache.resolve(reference))
            times.append(time.perf_counter() - begun)
            if entry.record.source != url:
                raise ValueError(f"{reference} is not {entry.name}")
        found[by] = {
            "median_ms": round(statistics.median(times) * 1e3, 3),
            "of_100_the_99th_ms": round(statistics.quantiles(times, n=100)[98] * 1e3, 3),
            "worst_ms": round(max(times) * 1e3, 3),
        }
        log.info("by %s: %s", by, found[by])
    return found


# --- results -----------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, each figure with its target and whether it was reached."""
    figures, machine = result["figures"], result["machine"]
    got, speed = figures["throughput"], figures["throughput"]["mb_per_second"]

    def verdict(reached: bool) -> str:
        return "reached" if reached else "missed"

    memory = got["memory_mb"]
    rows = [
        ("curl, no check at all", f"{speed['curl']:.0f} MB/s", "", ""),
        ("ours, with hash, checks and fsync", f"{speed['ours']:.0f} MB/s", "", ""),
        (
            "ours of curl's",
            f"{got['ratio']:.2f}",
            f"at least {LEAST_RATIO}",
            verdict(got["ratio"] >= LEAST_RATIO),
        ),
        (
            "memory above the start, at the peak",
            f"{memory:.0f} MB",
            f"less than {MOST_MEMORY / 1e6:.0f} MB",
            verdict(memory * 1e6 < MOST_MEMORY),
        ),
    ]
    for by, one in figures["lookups"].items():
        late, most = one["of_100_the_99th_ms"], MOST_SECONDS * 1e3
        rows.append(
            (
                f"an entry found by {by}: median, 99 of 100, worst",
                f"{one['median_ms']:.2f}, {late:.2f}, {one['worst_ms']:.2f} ms",
                f"99 of 100 in less than {most:g} ms",
                verdict(late < most),
            )
        )
    return "\n".join(
        [
            f"{result['date']}, {machine['cpu']}, {machine['cores']} cores, "
            f"Python {machine['python']}; {got['file_mb']:.0f} MB, medians of {got['rounds']} rounds; "
            f"{figures['entries']:,} entries.",
            "",
            "| | measured | target | |",
            "| --- | --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )


def write_page(path: Path) -> None:
    """Puts the table of a result file into docs/benchmarks.md."""
    fill_in("benchmarks.md", "cache", table(json.loads(path.read_text())))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes the results."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a miniature, to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("build/bench-cache"))
    options = parser.parse_args(arguments)
    if not shutil.which("curl"):
        sys.exit("curl is what the cache is measured against, and it is not installed here")
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    size, entries = (5_000_000, 50) if options.tiny else (SIZE, ENTRIES)
    figures = {
        "throughput": measure_throughput(options.folder, size, options.rounds),
        "entries": entries,
        "lookups": measure_lookups(options.folder, entries),
    }
    shutil.rmtree(options.folder)
    path = write_result("cache_tiny" if options.tiny else "cache", figures)
    log.info("written to %s", path)
    if not options.tiny:
        write_page(path)


if __name__ == "__main__":
    main()
