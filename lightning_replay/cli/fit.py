"""Finetuning from a config file: LightningCLI around `CausalLM` and `ReplayDataModule`."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_replay.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_replay.callbacks.self_generated_replay import SelfGeneratedReplay
from lightning_replay.cli.commands import COMMANDS
from lightning_replay.cli.ending import ending
from lightning_replay.cli.help import Help, brief
from lightning_replay.cli.parsing import Parser
from lightning_replay.data.chat import ChatDataModule
from lightning_replay.data.replay import ReplayDataModule
from lightning_replay.data.text import TextDataModule
from lightning_replay.models.causal_lm import CausalLM

__all__ = ["KNOWN", "SHOWN", "run"]

KNOWN = (SelfGeneratedReplay, ForgettingMonitor, TextDataModule, ChatDataModule)
"""Classes whose name suffices in ``--data.data.help=NAME`` and the like: those that have been imported."""
_EXAMPLE = "Example: lightning-replay {name} --config examples/configs/text.yaml --model.model DIR_OR_HUB_NAME"
_MORE = (
    "All settings: lightning-replay {name} --help=full\n"
    "Those of a callback, a datamodule or a loss: --trainer.callbacks.help=SelfGeneratedReplay, "
    "--data.data.help=TextDataModule, --trainer.callbacks.loss.help=KL and so on."
)
SHOWN = (
    *("help", "config", "print_config", "ckpt_path"),
    *("trainer.max_epochs", "trainer.max_steps", "trainer.devices", "trainer.callbacks", "trainer.logger"),
    *("model.model", "model.learning_rate", "model.adapter", "model.save_to"),
    *("data.data", "data.replay_fraction", "data.buffer", "data.prior"),
)
"""Settings in the brief help."""


def run(arguments: Sequence[str], full_help: bool = False) -> None:
    """Run a command that trains or measures.

    Args:
        arguments: The command and its options, as in ``["fit", "--config", "run.yaml"]``.
        full_help: Whether ``--help`` lists all settings.
    """
    # `${model.model}` refers to the config that it is in, although this is one subcommand's part of all settings.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    name, formatter = arguments[0], Help if full_help else brief(SHOWN)
    _CommandLine(
        name,
        model_class=CausalLM,
        datamodule_class=ReplayDataModule,
        parser_class=_Parser,
        parser_kwargs={
            "parser_mode": "omegaconf+",
            "prog": "lightning-replay",
            "formatter_class": formatter,  # newer releases of jsonargparse give it to commands
            name: {
                "usage": f"lightning-replay {name} [--config FILE] [--SETTING VALUE ...]",
                "description": f"{COMMANDS[name].summary}\n{_EXAMPLE.format(name=name)}",
                "epilog": _MORE.format(name=name),
                "formatter_class": formatter,
            },
        },
        seed_everything_default=0,
        auto_configure_optimizers=False,  # CausalLM has its own
        args=list(arguments),
    )


class _Parser(Parser, LightningArgumentParser):
    pass


class _CommandLine(LightningCLI):
    def __init__(self, name: str, **settings: Any) -> None:
        self._name = name
        super().__init__(**settings)

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static there
        """The one that is run alone: the parser of each takes a while to make."""
        return {self._name: LightningCLI.subcommands()[self._name]}

    def after_fit(self) -> None:
        """Called by LightningCLI."""
        if self.trainer.is_global_zero:
            print(ending(self.trainer, self.model))

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**{"parser_mode": "omegaconf+"} | kwargs)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # without a warning that the process has arguments, too
