"""Finetuning from a config file: LightningCLI around `CausalLM` and `ReplayDataModule`."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_replay.data.replay import ReplayDataModule
from lightning_replay.models.causal_lm import CausalLM

__all__ = ["COMMANDS", "run"]

COMMANDS = {
    "fit": "Finetune a model with replay, as a config file describes.",
    "validate": "Measure a model on the held-out rows of the data.",
    "test": "Measure a model on the test rows.",
    "predict": "Compute the loss of each row, for callbacks that write predictions.",
}
_EXAMPLE = "Example: lightning-replay {name} --config examples/configs/text.yaml --model.model DIR_OR_HUB_NAME"


def run(arguments: Sequence[str]) -> None:
    """Run one of the ``COMMANDS``.

    Args:
        arguments: The command and its options, as in ``["fit", "--config", "run.yaml"]``.
    """
    # `${model.model}` refers to the config that it is in, although this is one subcommand's part of all settings.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    _CommandLine(
        CausalLM,
        ReplayDataModule,
        parser_kwargs={
            "parser_mode": "omegaconf+",
            "prog": "lightning-replay",
            **{name: {"description": f"{what} {_EXAMPLE.format(name=name)}"} for name, what in COMMANDS.items()},
        },
        seed_everything_default=0,
        auto_configure_optimizers=False,  # CausalLM has its own
        args=list(arguments),
    )


class _CommandLine(LightningCLI):
    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**{"parser_mode": "omegaconf+"} | kwargs)
