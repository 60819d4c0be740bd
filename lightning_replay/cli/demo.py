"""The command that runs the demo."""

from collections.abc import Sequence
from pathlib import Path

from lightning_replay.cli.parsing import command_parser, settings_of

__all__ = ["SHOWN", "run"]

SHOWN = ("help", "output", "seed")
"""Settings in the brief help."""


def run(arguments: Sequence[str], full_help: bool = False) -> None:
    """Run the command; arguments and settings as for ``lightning_replay.demo.run.demo``."""
    name, *given = arguments
    parser = command_parser(name, () if full_help else SHOWN, "lightning-replay demo --output demo")
    parser.add_argument("--output", type=Path, default=Path("lightning-replay-demo"), help="Folder for the results.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, problems and samples.")
    settings = settings_of(parser, given)
    from lightning_replay.demo.run import demo  # its packages are an extra, and its help needs none of them

    demo(**settings)
