"""The `lightning-replay` command."""

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from lightning_replay.__about__ import __version__
from lightning_replay.cli.commands import COMMANDS
from lightning_replay.cli.help import FULL, Help
from lightning_replay.cli.parsing import Parser, reason

__all__ = ["main"]

DEBUG = "--debug"
"""The option that shows the traceback of an error."""


_INTERRUPTED = 130
"""As shells have it for a process that SIGINT ended."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, those of the process by default.

    Exits with 0 after success, 1 if the command failed, 2 if an argument is wrong, and 130 if it was interrupted. What
    a user did is answered with a message alone; with ``--debug``, the full traceback is shown.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, full_help = DEBUG in given, FULL in given
    given = ["--help" if argument == FULL else argument for argument in given if argument != DEBUG]
    try:
        _run(given, full_help)
    except SystemExit as wrong_argument:
        if debug and wrong_argument.__context__ is not None:
            traceback.print_exception(wrong_argument.__context__)
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        raise SystemExit(_INTERRUPTED) from None
    except Exception as error:
        if debug or not isinstance(error, (*_told(), RuntimeError, TypeError)):
            raise
        print(reason(str(error)) or type(error).__name__, file=sys.stderr)
        if not isinstance(error, _told()):  # it may be no mistake of the user's
            print(f"{type(error).__name__}; run the command with {DEBUG} for its traceback.", file=sys.stderr)
        raise SystemExit(1) from error


def _told() -> tuple[type[Exception], ...]:
    """Errors that say what to do instead. Lightning's can be among them only if Lightning, which is slow, is loaded."""
    lightning: Any = sys.modules.get("lightning.fabric.utilities.exceptions")
    return (ImportError, OSError, ValueError, *([] if lightning is None else [lightning.MisconfigurationException]))


def _run(given: Sequence[str], full_help: bool) -> None:
    """Run a command, and import no other: what they need takes seconds to import."""
    if not given or given[0] not in COMMANDS:
        parser = _parser()
        parser.parse_args(given)  # shows the help or the version, or refuses
        parser.error("the first argument is a command")
    import_module(f"lightning_replay.cli.{COMMANDS[given[0]].module}").run(given, full_help)


def _parser() -> Parser:
    """The parser of what is no command: names and summaries alone, since each command has a parser of its own."""
    parser = Parser(
        prog="lightning-replay",
        usage="lightning-replay COMMAND [--SETTING VALUE ...]",
        version=__version__,
        formatter_class=Help,
        description="Finetune language models in PyTorch Lightning without forgetting.\n"
        "Example: lightning-replay demo --output demo",
        epilog=f"{DEBUG} before or after a command shows the full traceback of an error.",
    )
    commands = parser.add_subcommands(dest="command")
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, Parser(), help=command.summary)
    return parser
