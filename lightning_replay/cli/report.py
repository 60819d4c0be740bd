"""The command that writes a page of the logs of runs."""

from collections.abc import Sequence
from pathlib import Path

from lightning_replay.cli.parsing import command_parser, settings_of

__all__ = ["SHOWN", "run"]

SHOWN = ("help", "runs", "output", "new_loss")
"""Settings in the brief help."""


def run(arguments: Sequence[str], full_help: bool = False) -> None:
    """Run the command; arguments and settings as for ``lightning_replay.report.page.report``."""
    name, *given = arguments
    parser = command_parser(name, () if full_help else SHOWN, "lightning-replay report runs")
    parser.add_argument(
        "runs", type=Path, nargs="+", help="Folder with logs of CSVLogger, TensorBoard, Weights & Biases or MLflow."
    )
    parser.add_argument("--output", type=Path, default=Path("lightning-replay-report"), help="Folder for the page.")
    parser.add_argument(
        "--new_loss",
        type=str | None,
        default=None,
        help="Key of the new task's loss; by default val/loss, else train/loss.",
    )
    settings = settings_of(parser, given)
    from lightning_replay.report.page import report  # its packages are an extra, and its help needs none of them

    replaced = (settings["output"] / "report.html").exists()
    page, *pictures = report(settings["runs"], settings["output"], settings["new_loss"])
    print(f"{'Replaced' if replaced else 'Wrote'} {page} and {len(pictures)} pictures beside it.")
