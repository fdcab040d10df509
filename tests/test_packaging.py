"""What is installed: the requirements name all that we import, and the wheel is the library alone."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

from tests.conftest import ROOT
from worker.actions import version as worker_version

OURS = {
    "lora",
    "live",
    "worker",
    "pipelines",
    "text",
    "emulator",
    "page",
    "demo",
    "tests",
    "benchmarks",
    "docs",
}
OURS |= {file.stem for file in ROOT.glob("*.py")}
FOR_DEVELOPERS = ("tests", "demo", "benchmarks", "docs")
DISTRIBUTIONS = packages_distributions()


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[ <>=!~;]", name)[0]).lower()


def third_parties(*folders: str) -> dict[str, set[str]]:
    """Distribution -> the files that import it."""
    found: dict[str, set[str]] = {}
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    for file in files or sorted(ROOT.glob("*.py")):
        for package in imports(file):
            if package not in OURS | sys.stdlib_module_names:
                for distribution in DISTRIBUTIONS.get(package, [package]):
                    found.setdefault(plain(distribution), set()).add(str(file.relative_to(ROOT)))
    return found


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def required(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    pins = [line.split("==") for line in lines if line and line[0] not in "#-"]
    assert all(len(pin) == 2 for pin in pins), "every requirement is pinned"
    return {plain(name): pinned for name, pinned in pins}


def test_every_package_that_the_product_imports_is_required() -> None:
    product = {
        **third_parties(),
        **third_parties("lora", "live", "worker", "pipelines", "text", "emulator", "page"),
    }
    missing = {
        name: files for name, files in product.items() if name not in required("requirements.txt")
    }
    assert missing == {}


def test_every_package_that_only_developers_import_is_required_for_them() -> None:
    everything = required("requirements.txt") | required("requirements-dev.txt")
    theirs = third_parties(*FOR_DEVELOPERS)
    assert {name: files for name, files in theirs.items() if name not in everything} == {}


def test_the_demo_needs_nothing_of_the_developers() -> None:
    used = {name for name in imports(ROOT / "demo" / "__main__.py") if name not in OURS}
    names = {plain(one) for name in used for one in DISTRIBUTIONS.get(name, [])}
    assert names <= required("requirements.txt").keys()


def test_the_pinned_versions_are_those_that_are_installed() -> None:
    pins = required("requirements.txt") | required("requirements-dev.txt")
    installed = {name: version(name).split("+")[0] for name in pins}
    assert installed == pins


# --- the wheel -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the whole tree, so that what must stay out could get in."""
    source, folder = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    unused = shutil.ignore_patterns(
        ".*", "__pycache__", "*.safetensors", "out", "build", "*.egg-info"
    )
    shutil.copytree(ROOT, source, ignore=unused)
    pip("wheel", str(source), "--no-build-isolation", "--wheel-dir", str(folder))
    (built,) = folder.glob("*.whl")
    return built


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", str(wheel), "--target", str(target))
    return target


def lora(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command, from another folder, with nothing of ours on the path but what is installed."""
    return subprocess.run(
        [sys.executable, installed / "bin" / "lora", *arguments],
        cwd=installed / "bin",
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    metadata = f"worker_lora-{worker_version()}.dist-info"
    assert {name.split("/")[0] for name in names} == {"lora", metadata}
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "lora").rglob("*.py")}
    assert {name for name in names if name.startswith("lora/")} == modules


def test_the_wheel_depends_on_what_the_library_imports_and_on_no_more() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {plain(one) for one in project["dependencies"]} == third_parties("lora").keys()


def test_the_installed_command_inspects_a_file(installed: Path) -> None:
    done = lora(installed, "inspect", str(ROOT / "demo" / "loras" / "demo-night.safetensors"))
    assert done.returncode == 0, done.stderr
    assert "demo-night" in done.stdout


def test_the_installed_command_cannot_draw_and_says_so_in_one_sentence(installed: Path) -> None:
    done = lora(installed, "generate", "--prompt", "a fox", "--out", str(installed / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: TOOL_ERROR: ")
    assert done.stderr.count("\n") == 1
