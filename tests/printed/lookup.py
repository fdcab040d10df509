"""Commands that are looked up, not run: the programs, flags, files and variables that a page names."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path

from runpod import serverless

from docs.generate import leaves
from lora.__main__ import COMMANDS as LORA_COMMANDS
from lora.__main__ import OF_WORKER, _of_worker, _parser
from lora.errors import CodedError
from settings import Settings
from tests.conftest import ROOT
from tests.printed.blocks import Wrong
from text_settings import TextSettings

FOREIGN_PROGRAMS = {"cd", "curl", "export", "git", "node", "pip", "pre-commit"}
FOREIGN_FLAGS = {"--build-arg", "--help", "--platform", "--secret"}
"""Of Docker, which is not everywhere, and of every program."""
FOREIGN_VARIABLES = {"HF_HOME"}
PLACEHOLDERS = {"lora shuffle F"}
"""What a recipe calls a tool that the reader is about to write."""

SDK = Path(str(serverless.__file__))
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_VARIABLE = re.compile(r"\b(?:LORA|WORKER|HF|CIVITAI|BUCKET)_[A-Z][A-Z_]*[A-Z]\b")


def look_up_block(text: str, *, run: bool) -> None:
    """Looks up every command of a shell block; if it is `run`, other programs may be there. Raises: Wrong."""
    for words in map(_without_assignments, _commands(text)):
        if words and not look_up(words) and not run:
            raise Wrong(f"{words[0]} is no program that is known here")


def look_up_span(code: str) -> None:
    """Looks up a piece of code within a sentence, if it is a command, a flag or a variable. Raises: Wrong."""
    if re.match("--[a-z]", code):
        _known_flag(re.split(r"[ =|]", code)[0])
        return
    try:
        words = _without_assignments(shlex.split(code))
    except ValueError:  # a quote of something else
        return
    if len(words) > 1 and _program(words) in _CHECKS and code not in PLACEHOLDERS:
        look_up(words)


def look_up_variables(text: str) -> None:
    """Looks up every name of a variable of ours. Raises: Wrong if it is no setting."""
    known = {
        setting.metadata["env"] for kind in (Settings, TextSettings) for setting in fields(kind)
    } | FOREIGN_VARIABLES
    known |= {leaf.code for leaf in leaves(CodedError)} | _docker_arguments()
    for name in _VARIABLE.findall(text):
        if name not in known:
            raise Wrong(f"{name} is neither a setting nor an error's code")


def look_up(words: list[str]) -> bool:
    """Looks up one command; whether its program is known. Raises: Wrong."""
    check = _CHECKS.get(_program(words))
    if check:
        check(words[1:])
    return bool(check) or words[0] in FOREIGN_PROGRAMS


def _commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell block, as words."""
    text = re.sub(r"(^|\s)#.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t\r", "", True
    words: list[str] = []
    for token in lexer:
        if token and (token == "&&" or set(token) <= set(";|\n")):
            yield words
            words = []
        else:
            words.append(token)
    yield words


def _without_assignments(words: list[str]) -> list[str]:
    first = next((n for n, word in enumerate(words) if not _ASSIGNMENT.match(word)), len(words))
    return words[first:]


def _program(words: list[str]) -> str:
    return re.sub(r"^python3?(\.\d+)?$", "python", Path(words[0]).name)


def _known_flag(flag: str) -> None:
    if flag in _options(_lora_parser()):
        return
    sources = [*ROOT.glob("*.py"), *(ROOT / "lora").rglob("*.py"), *(ROOT / "worker").rglob("*.py")]
    sources += [*(ROOT / "emulator").rglob("*.py"), *(ROOT / "page").rglob("*.py")]
    sources += [*(ROOT / "benchmarks").rglob("*.py"), SDK]
    _in_sources([flag], sources)


def _in_sources(flags: list[str], sources: list[Path]) -> None:
    known = FOREIGN_FLAGS.union(*(_flags_of(source) for source in sources))
    for flag in flags:
        if flag not in known:
            raise Wrong(f"no option {flag}")


@cache
def _flags_of(source: Path) -> set[str]:
    return set(re.findall(r"[\"'](--[a-z][a-z_-]*)[\"']", source.read_text()))


def _flags(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]


def _python(words: list[str]) -> None:
    if words[0] == "-m" and words[1] == "lora":
        _lora(words[2:])
    elif words[0] == "-m":
        _module(words[1], words[2:])
    elif words[0].endswith(".py"):
        _script(words[0], words[1:])


def _module(name: str, words: list[str]) -> None:
    if name in ("pip", "venv", "pytest"):
        return
    path = ROOT.joinpath(*name.split("."))
    sources = [path.with_suffix(".py"), *path.glob("*.py")]
    sources = [source for source in sources if source.is_file()]
    if not sources:
        raise Wrong(f"no module {name}")
    if "--" in words:  # what the emulator runs
        look_up(_without_assignments(words[words.index("--") + 1 :]))
        words = words[: words.index("--")]
    _in_sources(_flags(words), sources)


def _script(name: str, words: list[str]) -> None:
    if not (ROOT / name).is_file():
        raise Wrong(f"no file {name}")
    _in_sources(_flags(words), [ROOT / name, SDK])


@cache
def _lora_parser() -> argparse.ArgumentParser:
    return _parser({**LORA_COMMANDS, **{name: _of_worker(name) for name in OF_WORKER}})


def _lora(words: list[str]) -> None:
    if not words or words[0].isupper():
        return
    (commands,) = [
        action.choices
        for action in _lora_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    if words[0] not in commands:
        raise Wrong(f"no command `lora {words[0]}`")
    known = _options(commands[words[0]])
    for flag in _flags(words):
        if flag not in known:
            raise Wrong(f"`lora {words[0]}` has no option {flag}")


def _options(parser: argparse.ArgumentParser) -> set[str]:
    own = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            own |= {flag for below in action.choices.values() for flag in _options(below)}
    return own


def _make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        if "=" not in word and word not in targets:
            raise Wrong(f"no target `make {word}`")


def _docker_arguments() -> set[str]:
    return set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))


def _docker(words: list[str]) -> None:
    if words[0] != "build":
        return
    for option, value in pairwise(words):
        if option == "--build-arg" and value.partition("=")[0] not in _docker_arguments():
            raise Wrong(f"the Dockerfile has no argument {value}")
        if option in ("-f", "--file") and not (ROOT / value).is_file():
            raise Wrong(f"no file {value}")


_CHECKS: dict[str, Callable[[list[str]], None]] = {
    "docker": _docker,
    "lora": _lora,
    "make": _make,
    "python": _python,
}
