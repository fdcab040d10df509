"""The import graph is the table in docs/architecture.md, and what should import without torch does."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text()
PARTS = (
    "handler",
    "download_weights",
    "worker",
    "pipelines",
    "schemas",
    "settings",
    "lora",
    "emulator",
)


def allowed() -> dict[str, set[str]]:
    rows = re.findall(r"^\| (`[\w.]+`) \| ((?:`[\w.]+`(?:, )?)*) ?\|$", TEXT, re.MULTILINE)
    return {name.strip("`"): set(re.findall(r"`([\w.]+)`", uses)) for name, uses in rows}


def modules() -> dict[str, Path]:
    files = [ROOT / f"{part}.py" for part in PARTS if (ROOT / f"{part}.py").exists()]
    for part in PARTS:
        files += (ROOT / part).rglob("*.py") if (ROOT / part).is_dir() else []
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def imports(file: Path) -> set[str]:
    """Every module of ours that the file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in (*PARTS, "demo", "tests", "benchmarks")}


def row_of(name: str, names: set[str]) -> str:
    """The row that a module belongs to: its own, or its package's."""
    parts = name.split(".")
    return next(row for i in range(len(parts), 0, -1) if (row := ".".join(parts[:i])) in names)


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_what_the_table_allows(name: str) -> None:
    table = allowed()
    if name == "lora":
        assert imports(modules()[name]) == set()
        return
    row = row_of(name, set(table))
    for used in imports(modules()[name]):
        inside = used == row or used.startswith(f"{row}.")
        granted = any(used == grant or used.startswith(f"{grant}.") for grant in table[row])
        assert inside or granted, f"{name} imports {used}"


def test_every_row_of_the_table_is_a_module() -> None:
    assert set(allowed()) <= set(modules())


def test_the_table_has_no_circle() -> None:
    table, done = allowed(), set[str]()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, (*above, name)
        for used in table.get(name, set()) if name not in done else set():
            visit(used, (*above, name))
        done.add(name)

    for name in table:
        visit(name, ())


def torch_free() -> list[str]:
    block = re.search(r"Without torch: ((?:.|\n)*?)\n\n", TEXT)
    assert block
    return re.findall(r"`([\w.]+)`", block.group(1))


def test_the_modules_without_torch_import_without_it() -> None:
    names = torch_free()
    assert len(names) > 5
    code = f"import sys\nsys.modules['torch'] = None\nimport {', '.join(names)}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_images_weights_layer_copies_all_that_download_weights_imports(tmp_path: Path) -> None:
    before_weights = (ROOT / "Dockerfile").read_text().split("python download_weights.py")[0]
    for line in re.findall(r"^COPY (.+)$", before_weights.replace("\\\n", ""), re.MULTILINE):
        *files, target = line.split()
        for file in files:
            (tmp_path / target).mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / target)
    code = "import download_weights; print(download_weights.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
