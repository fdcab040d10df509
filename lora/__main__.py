"""The command line: `lora COMMAND ...`, or `python -m lora COMMAND ...`. See docs/tools.md.

Exit codes: 0; 2 for input that cannot be used, with a line `error: CODE: sentence. hint` for each fault; 130
for an interrupt; 1, with a traceback, for an error in the program.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import cast

from lora.commands import cache, combine, convert, extract, inspect, merge, resize
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
    "cache": cache,
}

OF_WORKER: Mapping[str, tuple[str, str]] = {
    "generate": ("worker.generate", "draw pictures with LoRAs into a folder, as the worker does"),
    "parameters": (
        "worker.pictures.read_parameters",
        "tell the request that a picture was drawn with",
    ),
}
"""The commands that belong to the worker and not to the library: each one's module and summary."""

PROGRAM = "python -m lora"

MAX_ERROR = 4000


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the command line says. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # diffusers imports it, and it advises
    try:
        named = [name for name in arguments[:1] if name in OF_WORKER]
        commands = {**COMMANDS, **{name: _of_worker(name) for name in named}}
        options = _parser(commands).parse_args(arguments)
        command = commands[options.command]
        with redirect_stdout(sys.stderr):  # whatever a library prints: stdout is the result's
            result = command.run(options)
    except CodedError as error:
        _print_error(str(error))
        return 2
    except OSError as error:
        # The name may be shown: this is the user's machine, and not an answer of the worker.
        _print_error(str(ToolError(f"{error.filename or 'a file'}: {error.strerror or error}")))
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    _write(json.dumps(result, indent=1) if options.json else command.show(result))
    faults = result.get("errors") or ()
    for fault in faults:
        _print_error(str(fault))
    return 2 if faults else 0


def _of_worker(name: str) -> Command:
    """The worker's module. Raises: ToolError where its code is not."""
    module, _ = OF_WORKER[name]
    try:
        return cast(Command, import_module(module))
    except ModuleNotFoundError as error:
        if error.name not in ("worker", module):
            raise
        hint = f"Call `python -m lora {name}` in the worker's own folder."
        raise ToolError(f"`{name}` works with the worker, whose code is not here", hint) from error


def _parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Tools for LoRAs and the models that they change.",
        epilog=f"`{PROGRAM} COMMAND --help` tells more of a command.",
    )
    parser.set_defaults(json=False)
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        summary = OF_WORKER[name][1] if name in OF_WORKER else command.SUMMARY
        subparser = parsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {PROGRAM} {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        add_json(subparser)
    for name in (name for name in OF_WORKER if name not in commands):
        parsers.add_parser(name, help=OF_WORKER[name][1])
    return parser


def _print_error(sentence: str) -> None:
    sys.stderr.write(f"error: {clean(sentence, MAX_ERROR)}\n")


def _write(text: str) -> None:
    """Writes to stdout, in its encoding; the reader may close it early."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n" if text else "")
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush once more at its end, and fail loudly.
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115, PTH123 - it lives to the end


if __name__ == "__main__":
    sys.exit(main())
