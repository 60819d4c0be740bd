"""What the callbacks hand to the Trainer's loggers by themselves, because `self.log` has no time or place for it."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

__all__ = ["log_hparams", "log_samples", "log_values", "next_step", "plain", "publish"]

_SAMPLES = "replay/samples"


def next_step(trainer: pl.Trainer) -> int:
    """The step at which Lightning logs what comes next: the number of batches that have ended in an optimizer step.

    With one optimizer that is ``trainer.global_step``, which counts the steps of several optimizers one by one.
    Lightning's own callbacks read it there as well.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_hparams(trainer: pl.Trainer, hparams: Mapping[str, Any]) -> None:
    """Log hyper-parameters together with those of the module and the datamodule, as TensorBoard shows one record only.

    Args:
        trainer: The Trainer.
        hparams: By name.
    """
    users: dict[str, Any] = {}
    for holder in (trainer.datamodule, trainer.lightning_module):  # type: ignore[attr-defined]
        if getattr(holder, "_log_hyperparams", False):
            users |= dict(holder.hparams_initial)
    for logger in trainer.loggers:
        logger.log_hyperparams(users | dict(hparams))


def log_values(trainer: pl.Trainer, values: Mapping[str, float], step: int) -> None:
    """Write values to every logger at a step, and let callbacks such as ``EarlyStopping`` monitor them."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
    publish(trainer, values)


def publish(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Let callbacks such as ``EarlyStopping`` monitor values."""
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})


def log_samples(trainer: pl.Trainer, texts: Sequence[str], step: int) -> None:
    """Write samples to the loggers that take text: TensorBoard, Weights & Biases as a table, MLflow as a file."""
    fenced = "\n\n".join(f"```\n{text}\n```" for text in texts)
    for logger in trainer.loggers if texts else ():
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(_SAMPLES, fenced, step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(_SAMPLES, columns=["sample"], data=[[text] for text in texts], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, fenced, f"{_SAMPLES}/step-{step:08d}.md")


def plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as hyper-parameters: numbers and texts as they are, dataclasses as mappings, all else by its name.

    Example:
        >>> plain({"coefficient": 10.0, "dtype": torch.bfloat16, "filters": [len], "prompts": [[1, 2], [3]]})
        {'coefficient': 10.0, 'dtype': 'torch.bfloat16', 'filters': 'len', 'prompts': 'list of 2'}
    """
    return {name: _plain(value) for name, value in arguments.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Real):  # one of NumPy's, too, which a checkpoint must not hold
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__} | {
            field.name: _plain(getattr(value, field.name)) for field in fields(value)
        }
    if isinstance(value, (list, tuple)) and all(callable(part) for part in value):
        return ", ".join(map(filter_name, value))
    if callable(value):
        return filter_name(value)
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, Sized) else type(value).__name__


def filter_name(filter_: Any) -> str:
    """What a filter's count is logged under: the name of its function or class, in lower case with underscores."""
    name = getattr(filter_, "__name__", type(filter_).__name__)
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).strip("_<>")
