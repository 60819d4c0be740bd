"""The `lightning-replay` command."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_replay.__about__ import __version__
from lightning_replay.cli.fit import COMMANDS, run
from lightning_replay.cli.generate import add_command, run_command
from lightning_replay.report.run_logs import NothingToReportError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, those of the process by default."""
    parser = argparse.ArgumentParser(
        prog="lightning-replay", description="Finetune language models in PyTorch Lightning without forgetting."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="learn a sequence of small tasks, without and with replay (about two minutes on a laptop)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--output", type=Path, default=Path("lightning-replay-demo"), help="folder for the results")
    demo.add_argument("--seed", type=int, default=0, help="seed of weights, problems and samples")
    report = commands.add_parser(
        "report",
        help="write a page of what runs have logged: forgetting, new task, time, samples",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder with CSV or TensorBoard logs in it")
    report.add_argument("--output", type=Path, default=Path("lightning-replay-report"), help="folder for the page")
    report.add_argument("--new-loss", metavar="KEY", help="key of the new task's loss; val/loss, else train/loss")
    add_command(commands)
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    # What follows one of LightningCLI's commands is for it to read.
    options, _ = parser.parse_known_args(arguments)
    if options.command not in COMMANDS:
        options = parser.parse_args(arguments)

    try:
        if options.command in COMMANDS:
            run(arguments)
        elif options.command == "demo":
            from lightning_replay.demo.run import demo as run_demo

            run_demo(options.output, options.seed)
        elif options.command == "generate":
            run_command(options)
        else:
            from lightning_replay.report.page import report as write_report

            page, *pictures = write_report(options.runs, options.output, options.new_loss)
            print(f"Wrote {page} and {len(pictures)} pictures beside it.")
    except (ModuleNotFoundError, NothingToReportError, MisconfigurationException, ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
