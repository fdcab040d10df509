"""The import graph is the table in docs/architecture.md, and what should import without torch does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text()
PARTS = (
    "handler",
    "download_weights",
    "worker",
    "live",
    "pipelines",
    "schemas",
    "entries",
    "settings",
    "text",
    "text_settings",
    "validation",
    "lora",
    "emulator",
    "page",
)


GROUND = {"lora.errors", "lora.durable", "lora.lru"}

DOORS = {"lora": {"lora"}, "lora.__main__": {"lora"}}
"""What stands above the packages of `lora`: the door for programs, and the command line."""


def allowed() -> dict[str, set[str]]:
    rows = re.findall(r"^\| (`[\w.]+`) \| ((?:`[\w.]+`(?:, )?)*) ?\|$", TEXT, re.MULTILINE)
    return {name.strip("`"): set(re.findall(r"`([\w.]+)`", uses)) for name, uses in rows}


@cache
def modules() -> dict[str, Path]:
    files = [ROOT / f"{part}.py" for part in PARTS if (ROOT / f"{part}.py").exists()]
    for part in PARTS:
        files += (ROOT / part).rglob("*.py") if (ROOT / part).is_dir() else []
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def imports(name: str, *, when_run: bool = False) -> set[str]:
    """Every module of ours that a module imports, wherever in it the import stands.

    `when_run` leaves out what only type checkers import.
    """
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(modules()[name].read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and when_run:
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & set(modules())) or {node.module}
    return {used for used in found if used.split(".")[0] in (*PARTS, "demo", "tests", "benchmarks")}


def package_of(name: str) -> str:
    """`lora.formats` for `lora.formats.names.keys`, `worker` for `worker.stop`."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "lora" else parts[0]


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_package_imports_only_what_the_table_allows(name: str) -> None:
    package = package_of(name)
    grants = DOORS.get(name) or allowed().get(package, set())
    for used in imports(name) - GROUND:
        granted = any(used == grant or used.startswith(f"{grant}.") for grant in grants)
        assert granted or (package_of(used) == package and name not in GROUND), (
            f"{name} imports {used}"
        )


def test_the_table_has_a_row_for_every_package_and_no_other() -> None:
    packages = {package_of(name) for name in modules()} - GROUND - {"lora", "lora.__main__"}
    assert set(allowed()) == packages


def test_six_packages_of_the_library_are_tied_by_nine_arrows() -> None:
    six = {name: uses for name, uses in allowed().items() if uses and name.startswith("lora.")}
    del six["lora.commands"]
    assert len({*six, *(used for uses in six.values() for used in uses)}) == 6
    assert sum(map(len, six.values())) == 9


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, (*above, name)
        for used in graph.get(name, set()) if name not in done else set():
            visit(used, (*above, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_modules_import_each_other_in_no_circle() -> None:
    assert_no_circle({name: imports(name, when_run=True) - {name} for name in modules()})


@pytest.mark.parametrize("package", sorted({package_of(name) for name in modules()} - GROUND))
def test_no_import_runs_back_up_inside_a_package(package: str) -> None:
    """Where folders lie in a package, they and the modules beside them import each other one way only."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[: package.count(".") + 2])

    graph: dict[str, set[str]] = {}
    for name in modules():
        if package_of(name) == package and name != package:
            used = {room(one) for one in imports(name) if package_of(one) == package}
            graph.setdefault(room(name), set()).update(used - {room(name), package})
    assert_no_circle(graph)


def torch_free() -> list[str]:
    block = re.search(r"Without torch: ((?:.|\n)*?)\n\n", TEXT)
    assert block
    with_it = set(re.findall(r"\(but `([\w.]+)`\)", block.group(1)))
    names: set[str] = set()
    for name in re.findall(r"`([\w.]+\*?)`", block.group(1)):
        package = name.removesuffix("*")
        names |= {
            one for one in modules() if one == name or (package != name and one.startswith(package))
        }
    return sorted(names - with_it)


def test_the_modules_without_torch_import_without_it() -> None:
    names = torch_free()
    assert len(names) > 30
    code = f"import sys\nsys.modules['torch'] = None\nimport {', '.join(names)}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
