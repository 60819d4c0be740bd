"""Finetuning from a config file: LightningCLI around `CausalLM` and `ReplayDataModule`."""

import argparse
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_replay.data.replay import ReplayDataModule
from lightning_replay.models.causal_lm import CausalLM

__all__ = ["COMMANDS", "run"]

COMMANDS = {
    "fit": "finetune a model with replay, as a config file says",
    "validate": "measure a model on what the data holds out",
    "test": "measure a model on the test rows",
    "predict": "the loss of each row, for callbacks that write predictions",
}
_HELP = {
    "config": "A YAML file with the settings; later ones win.",
    "print_config": "Print all settings, as a file that gives this run.",
    "seed_everything": "The global seed.",
    "ckpt_path": "A checkpoint: to go on from, or whose weights to measure.",
    "weights_only": "Whether a checkpoint may hold nothing but tensors and plain containers.",
    "verbose": "Whether to print what was measured (default: true).",
    "return_predictions": "Whether to keep all predictions in memory.",
}
_PARTS = {
    "model": "the model and its optimizer",
    "data": "the new task's data and the mixing",
    "trainer": "the Trainer, callbacks and loggers",
}
_EPILOG = """\
What can be set is told by --model.help, --data.help and --trainer.help, and for
a class that a config names with class_path, by its name:

  --data.data.help TextDataModule     --trainer.callbacks.help ForgettingMonitor
  --data.data.help ChatDataModule     --trainer.callbacks.help SelfGeneratedReplay

Each setting of the file can be set here as well: --model.learning_rate 1e-4.
${model.model} in a file is what is set there. examples/configs/ has files to
begin with.
"""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one of the ``COMMANDS``, with the arguments of the process by default.

    Args:
        arguments: The command and its options, as in ``["fit", "--config", "run.yaml"]``.

    Raises:
        ModuleNotFoundError: If the extra ``cli`` is not installed.
    """
    try:
        import jsonargparse
        import omegaconf  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Config files are read with {error.name}, which is not installed: pip install 'lightning-replay[cli]'"
        ) from error
    # `${model.model}` in a config means that config, though a command's settings are a part of the whole.
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    _CommandLine(
        CausalLM,
        ReplayDataModule,
        parser_class=_Parser,
        parser_kwargs={"parser_mode": "omegaconf+", "prog": "lightning-replay"},
        seed_everything_default=0,
        auto_configure_optimizers=False,  # CausalLM has its own
        args=None if arguments is None else list(arguments),
    )


class _CommandLine(LightningCLI):
    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**{"parser_mode": "omegaconf+"} | kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for part, what in _PARTS.items():
            parser.add_argument(f"--{part}.help", action=_PartHelp, help=f"Show the settings of {what}.")

    @override
    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        for name, parser in self._subcommand_parsers.items():
            assert isinstance(parser, _Parser)
            parser.is_command = True
            parser.usage = f"lightning-replay {name} --config FILE [--SETTING VALUE ...]"
            parser.description = f"{COMMANDS[name].capitalize()}."
            for action in parser._actions:
                action.help = _HELP.get(action.dest, action.help)
            parser._action_groups[-1].title = "run"


class _PartHelp(argparse._HelpAction):
    """Shows the settings of one part."""

    @override
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.part = self.option_strings[0].removeprefix("--").removesuffix(".help")
        super().__call__(parser, namespace, values, option_string)


class _Parser(LightningArgumentParser):
    """Its help is about one part at a time: a Trainer alone has some 40 settings."""

    is_command = False
    """Others are made for the help of a class."""
    part: str | None = None

    @override
    def format_help(self, *args: Any) -> str:
        if not self.is_command:
            return super().format_help(*args)
        groups = self._action_groups
        self._action_groups = [group for group in groups if self._part_of(group) == self.part]
        try:
            return super().format_help(*args) + ("" if self.part else f"\n{_EPILOG}")
        finally:
            self._action_groups = groups

    def _part_of(self, group: Any) -> str | None:
        """The part whose settings are in a group; None for those of the command itself."""
        if group is self._optionals:
            return None
        parts = {action.dest.partition(".")[0] for action in group._group_actions}
        return next((part for part in _PARTS if part in parts), None)
