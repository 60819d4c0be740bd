"""The command that generates rows ahead of training."""

import argparse
from pathlib import Path
from typing import Any, get_args

from lightning_replay.sampling.generate import Engine, RowOptions, generate_rows

__all__ = ["add_command", "run_command"]

_ENGINE_OPTIONS = ("engine", "actors", "threads", "ray_address", "batch_size")


def add_command(commands: Any) -> None:
    """Add ``generate`` to the subcommands of an argument parser."""
    parser = commands.add_parser(
        "generate",
        help="write replay rows that a model generates to a folder, here or on a Ray cluster",
        usage="%(prog)s --model M --rows N --output DIR [options]",
        description="Write replay rows to a folder of Parquet shards, for ReplayDataModule(buffer=FOLDER). Run again "
        "after an interruption, it goes on where it stopped.",
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, max_help_position=30),
        argument_default=argparse.SUPPRESS,
    )

    def add(name: str, kind: type, **settings: Any) -> None:
        """An option with a short word for its value."""
        letter = {int: "N", float: "X"}.get(kind, name.split("-")[-1].upper())
        parser.add_argument(name, type=kind, metavar=letter, **settings)

    add("--model", str, required=True, help="hub name or local folder of the model")
    add("--rows", int, required=True, help="how many rows")
    add("--output", Path, required=True, help="folder, which all machines have to see")
    parser.add_argument("--engine", choices=get_args(Engine), default="local", help="this process, or Ray Data")
    add("--actors", int, default=2, help="Ray actors, each with a model")
    add("--threads", int, help="of each process; by default 1 for an actor")
    add("--ray-address", str, help="cluster; by default what Ray finds")
    add("--batch-size", int, help="samples at a time; by default what fits")
    add("--shard-rows", int, default=RowOptions.shard_rows, help="rows in a file")
    add("--sequence-length", int, default=RowOptions.sequence_length, help="tokens in a row")
    add("--sample-length", int, help="tokens of a sample; by default two rows")
    add("--prompts", str, help="'chat' or a file, a text on each line")
    add("--temperature", float, default=RowOptions.temperature, help="of sampling")
    add("--top-k", int, help="sample from the N likeliest tokens")
    add("--top-p", float, help="from the likeliest of this probability")
    add("--min-p", float, help="from those of this share of the likeliest")
    parser.add_argument("--stop-at-eos", action="store_true", help="let the end token end a sample")
    add("--seed", int, default=RowOptions.seed, help="of sampling")
    add("--reference-top-k", int, default=RowOptions.reference_top_k, help="log-probabilities kept of a token")
    add("--divergence-temperature", float, default=RowOptions.divergence_temperature, help="divides their logits")
    add("--dtype", str, default=RowOptions.dtype, help="to compute in")
    add("--device", str, default=RowOptions.device, help="of the model")
    parser.add_argument("--trust-remote-code", action="store_true", help="execute code that comes with the model")


def run_command(options: argparse.Namespace) -> None:
    """Generate what the arguments of the subcommand say, and print what was done."""
    given = {name: value for name, value in vars(options).items() if name != "command"}
    how = {name: given.pop(name) for name in ("output", *_ENGINE_OPTIONS) if name in given}
    if given.get("prompts", "chat") != "chat":
        given["prompts"] = [line for line in Path(given["prompts"]).read_text().splitlines() if line.strip()]
    done = generate_rows(RowOptions(**given), **how)
    speed = f" in {done.seconds:,.1f} s ({done.new_rows / done.seconds:,.1f} rows/s)" if done.new_rows else ""
    print(f"{how['output']} holds {done.rows:,} rows, {done.new_rows:,} of them made now{speed}.")
