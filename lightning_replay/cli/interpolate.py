"""The command that sweeps the weights between the model before a fit and the finetuned one."""

from collections.abc import Sequence
from pathlib import Path

from lightning_replay.cli.parsing import command_parser, settings_of, take_arguments
from lightning_replay.interpolation.sweep import interpolate

__all__ = ["SHOWN", "run"]

SHOWN = (
    *("help", "config", "print_config", "finetuned", "base", "new", "prior", "weights", "save", "save_weight"),
    *("max_forgetting", "seed", "sequence_length", "device", "picture"),
)
"""Settings in the brief help."""


def run(arguments: Sequence[str], full_help: bool = False) -> None:
    """Run the command; arguments and settings as for ``interpolate``, and a file for the picture."""
    name, *given = arguments
    parser = command_parser(
        name,
        () if full_help else SHOWN,
        "lightning-replay interpolate --finetuned last.ckpt --new TextDataModule --new.data new.txt "
        "--new.tokenizer gpt2 --max_forgetting 0.1 --save chosen",
        "Measure the models between the one before a fit and the finetuned one, and save one of them.",
        usage="lightning-replay interpolate --finetuned FILE --new DATA [--SETTING VALUE ...]",
        parser_mode="omegaconf+",
    )
    take_arguments(parser, interpolate)
    parser.add_argument("--picture", type=Path | None, default=None, help="A file for the picture.")
    settings = settings_of(parser, given)
    picture = settings.pop("picture")
    found = interpolate(**settings)
    print(found.table())
    if picture is not None:
        found.plot(picture)
