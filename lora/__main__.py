"""The command line: `python -m lora COMMAND ...`. See docs/tools.md.

Exit codes: 0; 2 for input that does not do, with one line `error: CODE: sentence. hint` for each fault;
130 when interrupted; 1, with a traceback, for what nobody foresaw.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout

from lora.commands import cache, combine, convert, extract, generate, inspect, merge, resize
from lora.commands.shared import Command, add_json
from lora.errors import CodedError, ToolError
from lora.tools.adapters.metadata import clean

COMMANDS: Mapping[str, Command] = {
    "inspect": inspect,
    "extract": extract,
    "merge": merge,
    "combine": combine,
    "resize": resize,
    "convert": convert,
    "generate": generate,
    "cache": cache,
}

MAX_ERROR = 4000


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the command line says; the exit code."""
    options = _parser().parse_args(arguments)
    command = COMMANDS[options.command]
    try:
        with redirect_stdout(sys.stderr):  # whatever a library prints: stdout is the result's
            result = command.run(options)
    except CodedError as error:
        _tell(str(error))
        return 2
    except OSError as error:
        # The name is the user's own: this is their machine, and not an answer of the worker.
        _tell(str(ToolError(f"{error.filename or 'a file'}: {error.strerror or error}")))
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    _write(json.dumps(result, indent=1) if options.json else command.show(result))
    faults = result.get("errors") or ()
    for fault in faults:
        _tell(str(fault))
    return 2 if faults else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora", description="Tools for LoRAs and the models that they change."
    )
    parser.set_defaults(json=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.SUMMARY, description=command.SUMMARY)
        command.add_arguments(one)
        add_json(one)
    return parser


def _tell(words: str) -> None:
    sys.stderr.write(f"error: {clean(words, MAX_ERROR)}\n")


def _write(text: str) -> None:
    """To stdout, in what its encoding has; a reader that has seen enough may go."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n" if text else "")
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush once more at its end, and fail loudly.
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115, PTH123 - it lives to the end


if __name__ == "__main__":
    sys.exit(main())
