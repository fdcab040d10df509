"""A fresh clone, in which a reader types what a page prints: a terminal, a second one, and Python."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from tests.conftest import ROOT
from tests.emulator.running import marked
from tests.printed.blocks import Wrong
from tests.printed.world import World
from tests.waiting import PATIENCE, until

PORT = 8000
"""Where the emulator and the SDK's server listen, as the pages say; a free port takes its place."""
SERVES = re.compile(r"-m (emulator|page)\b|--rp_serve_api\b|\bWORKER_SERVE=http\b")
COLUMNS = 100
PROGRAMS = ("curl", "jq", "node")
"""What the pages need beside Debian's base."""

BEGIN = '[ ! -e "$PRINTED_STATE" ] || . "$PRINTED_STATE"\nset -eo pipefail\n'
KEEP = """
set +e
{ declare -p | grep -v '^declare -[a-zA-Z]*r'; printf 'cd %q\\n' "$PWD"; } >"$PRINTED_STATE"
"""
"""The end of a script: the next one goes on with its variables, in its folder."""

SESSION = """
import contextlib, io, json, os, sys, traceback
names, answers = {"__name__": "__main__"}, sys.stdout
sys.path.insert(0, os.getcwd())
for line in sys.stdin:
    given, printed, well = json.loads(line), io.StringIO(), True
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            exec(compile(given["code"], given["place"], "exec"), names)
        except BaseException:
            traceback.print_exc()
            well = False
    print(json.dumps([well, printed.getvalue()]), file=answers, flush=True)
"""
"""A Python that runs block after block, in one namespace."""


class Clone:
    """A copy of the tracked files with the environment that `make demo` sets up, an empty home and cache.

    Close it: its servers end.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self._folder, self._world = folder, world
        self._mark = f"PRINTED_MARK={uuid.uuid4()}"
        self._server: subprocess.Popen[bytes] | None = None
        self._python: subprocess.Popen[str] | None = None
        self._port = _free_port()

    @cached_property
    def root(self) -> Path:
        root = self._folder / "worker-lora"
        listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
        for name in listed.split("\0"):
            if name and (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        (root / ".venv").mkdir()
        for part in Path(sys.prefix).iterdir():
            (root / ".venv" / part.name).symlink_to(part)
        return root

    def shell(self, text: str) -> tuple[int, str]:
        """Runs commands in the terminal; the exit code, and what they printed."""
        stand_ins = self.stand_ins(text)
        done = subprocess.run(
            _script(replaced(text, stand_ins), KEEP),
            cwd=self.root,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
            text=True,
            errors="replace",
            check=False,
        )
        return done.returncode, restored(done.stdout, stand_ins)

    def node(self, text: str) -> tuple[int, str]:
        """Runs a JavaScript module; the exit code, and what it printed."""
        script = self._folder / "script.mjs"
        script.write_text(replaced(text, self.stand_ins(text)))
        code, printed = self.shell(f"node {script}")
        return code, restored(printed, self.stand_ins(text))

    def python(self, text: str, place: str) -> tuple[bool, str]:
        """Runs a block in the Python session; whether it went well, and what it printed."""
        stand_ins = self.stand_ins(text)
        session = self._python or self._new_session()
        assert session.stdin and session.stdout
        session.stdin.write(json.dumps({"code": replaced(text, stand_ins), "place": place}) + "\n")
        session.stdin.flush()
        answer = session.stdout.readline()
        well, printed = json.loads(answer) if answer else (False, "Python ended")
        return bool(well), restored(printed, stand_ins)

    def serve(self, text: str) -> None:
        """Starts what serves, in another terminal, until the next one or the clone's end. Raises: Wrong."""
        self._stop_server()
        text = re.sub(r"-m (emulator|page)\b", rf"\g<0> --port {self._port}", text)
        text = re.sub(r"--rp_serve_api\b", rf"\g<0> --rp_api_port {self._port}", text)
        text = re.sub(r"^WORKER_SERVE=http\b", rf"PORT={self._port} \g<0>", text)
        log = self._folder / "server.log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                _script(text),
                cwd=self.root,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._server = server
        until(lambda: server.poll() is not None or _listens(self._port), log.read_text)
        if server.poll() is not None:
            raise Wrong(f"exit code {server.returncode}:\n{log.read_text()}")

    def stand_ins(self, text: str) -> dict[str, str]:
        """What a block's text names -> what stands in for it here."""
        here = {f"{host}:{PORT}": f"{host}:{self._port}" for host in ("localhost", "127.0.0.1")}
        return {**here, **self._world.stand_ins(text)}

    def close(self) -> None:
        self._stop_server()
        if self._python:
            self._python.kill()
            self._python.communicate()
        for left in marked(self._mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)

    @cached_property
    def _environment(self) -> dict[str, str]:
        home, temporary = self._folder / "home", self._folder / "tmp"
        home.mkdir()
        temporary.mkdir()
        programs = {str(Path(found).parent) for name in PROGRAMS if (found := shutil.which(name))}
        mark, value = self._mark.split("=")
        return {
            **self._world.environment(self._folder / "cache"),
            "PATH": ":".join(["/usr/local/bin", "/usr/bin", "/bin", *sorted(programs)]),
            "HOME": str(home),
            "TMPDIR": str(temporary),
            "LANG": "C.UTF-8",
            "COLUMNS": str(COLUMNS),
            "PRINTED_STATE": str(self._folder / "state"),
            mark: value,
        }

    def _new_session(self) -> subprocess.Popen[str]:
        self._python = subprocess.Popen(
            _script(f"exec .venv/bin/python -c '{SESSION}'"),
            cwd=self.root,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self._python

    def _stop_server(self) -> None:
        if self._server:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGTERM)
            self._server.wait(PATIENCE)
            self._server = None


def replaced(text: str, names: Mapping[str, str]) -> str:
    """The text with stand-ins for what it names."""
    for name, other in names.items():
        text = text.replace(name, other)
    return text


def restored(text: str, names: Mapping[str, str]) -> str:
    """The text with the names for which something stood in."""
    return replaced(text, {stand_in: name for name, stand_in in names.items()})


def _script(text: str, end: str = "") -> list[str]:
    return ["bash", "-c", f"{BEGIN}{text}\n{end}"]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
