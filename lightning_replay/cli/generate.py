"""The command that generates replay rows ahead of training."""

import sys
from collections.abc import Sequence

from lightning_replay.cli.parsing import command_parser, settings_of, take_arguments
from lightning_replay.sampling.generate import generate_rows

__all__ = ["SHOWN", "run"]

SHOWN = (
    *("help", "config", "print_config", "model", "rows", "output", "sequence_length", "reference_top_k", "seed"),
    *("dtype", "device", "engine", "batch_size"),
    *("sampling.prompts", "sampling.length", "sampling.temperature", "sampling.top_k", "sampling.top_p"),
    "sampling.filters",
)
"""Settings in the brief help."""


def run(arguments: Sequence[str], full_help: bool = False) -> None:
    """Run the command; arguments and settings as for ``generate_rows``."""
    name, *given = arguments
    parser = command_parser(
        name,
        () if full_help else SHOWN,
        "lightning-replay generate --model gpt2 --rows 10000 --sequence_length 128 --output rows",
        "Write replay rows to a folder of Parquet shards, for ReplayDataModule(buffer=FOLDER). If it is interrupted, "
        "run it again: it continues where it stopped.",
        usage="lightning-replay generate --model NAME --rows N --output FOLDER [--SETTING VALUE ...]",
    )
    take_arguments(parser, generate_rows)
    settings = settings_of(parser, given)
    try:
        done = generate_rows(**settings)
    except KeyboardInterrupt:
        print(
            f"Interrupted: {settings['output']} keeps the files that are finished, of {settings['shard_rows']:,} "
            "rows each. Run the same command again to continue.",
            file=sys.stderr,
        )
        raise
    speed = f" in {done.seconds:,.1f} s ({done.new_rows / done.seconds:,.1f} rows/s)" if done.new_rows else ""
    print(f"{settings['output']} holds {done.rows:,} rows, {done.new_rows:,} of them made now{speed}.")
