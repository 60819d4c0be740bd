"""The `lightning-replay` command."""

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_replay.__about__ import __version__
from lightning_replay.cli import fit
from lightning_replay.cli.help import FULL, Help, brief
from lightning_replay.interpolation.sweep import interpolate
from lightning_replay.sampling.generate import generate_rows

__all__ = ["main"]

DEBUG = "--debug"
"""The option that shows the traceback of an error."""


_TOLD = (ImportError, MisconfigurationException, OSError, ValueError)
"""Errors that say what to do instead."""
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
    except (*_TOLD, RuntimeError, TypeError) as error:
        if debug:
            raise
        print(_reason(str(error)) or type(error).__name__, file=sys.stderr)
        if not isinstance(error, _TOLD):  # it may be no mistake of the user's
            print(f"{type(error).__name__}; run the command with {DEBUG} for its traceback.", file=sys.stderr)
        raise SystemExit(1) from error


def _run(given: Sequence[str], full_help: bool) -> None:
    if given and given[0] in fit.COMMANDS:
        fit.run(given, full_help)
        return
    parser = _parser(full_help)
    config = parser.parse_args(given)
    command = config.pop("command")
    settings = parser.instantiate_classes(config)[command]
    settings.pop("config", None)
    _RUN[command](**settings)


def _demo(output: Path, seed: int) -> None:
    from lightning_replay.demo.run import demo

    demo(output, seed)


def _report(runs: list[Path], output: Path, new_loss: str | None) -> None:
    from lightning_replay.report.page import report

    page, *pictures = report(runs, output, new_loss)
    print(f"Wrote {page} and {len(pictures)} pictures beside it.")


def _generate(output: Path, **settings: Any) -> None:
    done = generate_rows(output=output, **settings)
    speed = f" in {done.seconds:,.1f} s ({done.new_rows / done.seconds:,.1f} rows/s)" if done.new_rows else ""
    print(f"{output} holds {done.rows:,} rows, {done.new_rows:,} of them made now{speed}.")


def _interpolate(picture: Path | None, **settings: Any) -> None:
    found = interpolate(**settings)
    print(found.table())
    if picture is not None:
        found.plot(picture)


_RUN: dict[str, Callable[..., None]] = {
    "demo": _demo,
    "report": _report,
    "generate": _generate,
    "interpolate": _interpolate,
}


def _reason(message: str) -> str:
    """What an object's own code said, where the parser lists all types that a setting might have had instead."""
    if not message.startswith("Does not validate against any of the Union"):
        return message
    said = [line.strip().removeprefix("- ") for line in message.splitlines() if line.lstrip().startswith("- ")]
    told = [line for line in said if not line.startswith(_OF_THE_PARSER)]
    return "\n".join(dict.fromkeys(told)) or message


_OF_THE_PARSER = (
    "Does not validate",
    "Expected a",
    "Not a valid subclass",
    "Import path",
    "a class path",
    "a dict with",
)
"""How the parser's own lines begin."""
_SHOWN = (
    *("help", "output", "seed", "runs", "new_loss"),
    *("config", "print_config", "model", "rows", "sequence_length", "reference_top_k"),
    *("dtype", "device", "engine", "batch_size"),
    *("sampling.prompts", "sampling.length", "sampling.temperature", "sampling.top_k", "sampling.top_p"),
    *("sampling.filters", "finetuned", "base", "new", "prior", "weights", "save", "save_weight", "max_forgetting"),
    "picture",
)
"""Settings in the brief help."""


def _parser(full_help: bool) -> ArgumentParser:
    """The parser of all commands; LightningCLI parses the options of those that train and measure."""
    parser = ArgumentParser(
        prog="lightning-replay",
        version=__version__,
        formatter_class=Help,
        description="Finetune language models in PyTorch Lightning without forgetting.\n"
        "Example: lightning-replay demo --output demo",
        epilog=f"{DEBUG} before or after a command shows the full traceback of an error.",
    )
    commands = parser.add_subcommands(dest="command")

    demo = ArgumentParser(
        description="Learn a sequence of small tasks, without and with replay.\n"
        "Example: lightning-replay demo --output demo",
    )
    demo.add_argument("--output", type=Path, default=Path("lightning-replay-demo"), help="Folder for the results.")
    demo.add_argument("--seed", type=int, default=0, help="Seed of weights, problems and samples.")
    commands.add_subcommand("demo", demo, help="Learn a sequence of small tasks, without and with replay.")

    report = ArgumentParser(
        description="Write a page of the logs of runs: forgetting, new task, time, samples.\n"
        "Example: lightning-replay report runs",
    )
    report.add_argument(
        "runs", type=Path, nargs="+", help="Folder with logs of CSVLogger, TensorBoard, Weights & Biases or MLflow."
    )
    report.add_argument("--output", type=Path, default=Path("lightning-replay-report"), help="Folder for the page.")
    report.add_argument(
        "--new_loss",
        type=str | None,
        default=None,
        help="Key of the new task's loss; by default val/loss, else train/loss.",
    )
    commands.add_subcommand("report", report, help="Write a page of the logs of runs.")

    generate = ArgumentParser(
        usage="lightning-replay generate --model NAME --rows N --output FOLDER [--SETTING VALUE ...]",
        epilog="All settings: lightning-replay generate --help=full",
        description="Write replay rows to a folder of Parquet shards, for ReplayDataModule(buffer=FOLDER). If it is "
        "interrupted, run it again: it continues where it stopped.\n"
        "Example: lightning-replay generate --model gpt2 --rows 10000 --sequence_length 128 --output rows",
    )
    _take_arguments(generate, generate_rows)
    commands.add_subcommand("generate", generate, help="Write replay rows that a model generates to a folder.")

    interpolation = ArgumentParser(
        parser_mode="omegaconf+",
        usage="lightning-replay interpolate --finetuned FILE --new DATA [--SETTING VALUE ...]",
        epilog="All settings: lightning-replay interpolate --help=full",
        description="Measure the models between the one before a fit and the finetuned one, and save one of them.\n"
        "Example: lightning-replay interpolate --finetuned last.ckpt --new TextDataModule --new.data new.txt "
        "--new.tokenizer gpt2 --max_forgetting 0.1 --save chosen",
    )
    _take_arguments(interpolation, interpolate)
    interpolation.add_argument("--picture", type=Path | None, default=None, help="A file for the picture.")
    commands.add_subcommand("interpolate", interpolation, help="Interpolate between a model before and after a fit.")

    for each in () if full_help else (demo, report, generate, interpolation):
        each.formatter_class = brief(_SHOWN)  # a subcommand takes over that of all

    for name, what in fit.COMMANDS.items():
        commands.add_subcommand(name, ArgumentParser(), help=what)
    return parser


def _take_arguments(parser: ArgumentParser, function: Callable[..., Any]) -> None:
    """Let a command have the arguments of a function, on the command line or in a file."""
    parser.add_argument("--config", action="config", help="A YAML file with the settings.")
    parser.add_function_arguments(function, as_group=False)
