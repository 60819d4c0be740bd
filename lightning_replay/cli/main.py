"""The `lightning-replay` command."""

import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_replay.__about__ import __version__
from lightning_replay.cli import fit
from lightning_replay.report.run_logs import NothingToReportError
from lightning_replay.sampling.generate import generate_rows

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, those of the process by default."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] and given[0] in fit.COMMANDS:
            fit.run(given)
            return
        parser = _parser()
        config = parser.parse_args(given)
        command = config.pop("command")
        settings = parser.instantiate_classes(config)[command]
        settings.pop("config", None)
        _RUN[command](**settings)
    except (ModuleNotFoundError, NothingToReportError, MisconfigurationException, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from error


def _demo(output: Path, seed: int) -> None:
    from lightning_replay.demo.run import NotLearnedError, demo

    try:
        demo(output, seed)
    except NotLearnedError as error:
        raise SystemExit(str(error)) from error


def _report(runs: list[Path], output: Path, new_loss: str | None) -> None:
    from lightning_replay.report.page import report

    page, *pictures = report(runs, output, new_loss)
    print(f"Wrote {page} and {len(pictures)} pictures beside it.")


def _generate(output: Path, **settings: Any) -> None:
    done = generate_rows(output=output, **settings)
    speed = f" in {done.seconds:,.1f} s ({done.new_rows / done.seconds:,.1f} rows/s)" if done.new_rows else ""
    print(f"{output} holds {done.rows:,} rows, {done.new_rows:,} of them made now{speed}.")


_RUN: dict[str, Callable[..., None]] = {"demo": _demo, "report": _report, "generate": _generate}


class _Help(DefaultHelpFormatter):
    """Keeps the command in an example whole, so that it can be copied."""

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(
            " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )


def _parser() -> ArgumentParser:
    """The parser of all commands; LightningCLI parses the options of those that train and measure."""
    parser = ArgumentParser(
        prog="lightning-replay",
        version=__version__,
        formatter_class=_Help,
        description="Finetune language models in PyTorch Lightning without forgetting. "
        "Example: lightning-replay demo --output demo",
    )
    commands = parser.add_subcommands(dest="command")

    demo = ArgumentParser(
        formatter_class=_Help,
        description="Learn a sequence of small tasks, without and with replay. "
        "Example: lightning-replay demo --output demo",
    )
    demo.add_argument("--output", type=Path, default=Path("lightning-replay-demo"), help="Folder for the results.")
    demo.add_argument("--seed", type=int, default=0, help="Seed of weights, problems and samples.")
    commands.add_subcommand("demo", demo, help="Learn a sequence of small tasks, without and with replay.")

    report = ArgumentParser(
        formatter_class=_Help,
        description="Write a page of the logs of runs: forgetting, new task, time, samples. "
        "Example: lightning-replay report runs",
    )
    report.add_argument(
        "runs", type=Path, nargs="+", help="Folder with logs: CSV, TensorBoard, Weights & Biases, MLflow files."
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
        formatter_class=_Help,
        description="Write replay rows to a folder of Parquet shards, for ReplayDataModule(buffer=FOLDER). If it is "
        "interrupted, run it again: it continues where it stopped. "
        "Example: lightning-replay generate --model gpt2 --rows 10000 --sequence_length 128 --output rows",
    )
    generate.add_argument("--config", action="config", help="A YAML file with the settings.")
    generate.add_function_arguments(generate_rows, as_group=False)
    commands.add_subcommand("generate", generate, help="Write replay rows that a model generates to a folder.")

    for name, what in fit.COMMANDS.items():
        commands.add_subcommand(name, ArgumentParser(), help=what)
    return parser
