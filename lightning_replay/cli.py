"""The `lightning-replay` command."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning_replay

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, those of the process by default."""
    parser = argparse.ArgumentParser(prog="lightning-replay", description=lightning_replay.__doc__)
    parser.add_argument("--version", action="version", version=lightning_replay.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="learn a sequence of small tasks, without and with replay (about two minutes on a laptop)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--output", type=Path, default=Path("lightning-replay-demo"), help="folder for the results")
    demo.add_argument("--seed", type=int, default=0, help="seed of weights, problems and samples")
    options = parser.parse_args(arguments)

    try:
        from lightning_replay.demo import demo as run_demo
    except ModuleNotFoundError as error:
        parser.exit(1, f"{error}\n")
    run_demo(options.output, options.seed)
