"""Logging from hooks in which `self.log` is unavailable: values, samples as text, hyper-parameters."""

from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any

import fsspec
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

__all__ = [
    "decoded",
    "filter_name",
    "known_ids",
    "log_hparams",
    "log_samples",
    "log_values",
    "log_verdict",
    "next_step",
    "plain",
    "publish",
    "undecodable_share",
]

_SAMPLES, _VERDICT = "replay/samples", "replay/verdict"
_DECODING_ERRORS = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What tokenizers raise for ids that they don't have. Those in Rust may also panic; see ``_is_decoding_error``."""


def next_step(trainer: pl.Trainer) -> int:
    """The step at which Lightning logs next: the number of batches that have ended in an optimizer step.

    With one optimizer that is ``trainer.global_step``, which adds up the steps of several optimizers. Lightning's own
    callbacks read the same attribute.
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
    """Write values to every logger at a step, and to ``trainer.callback_metrics``."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
    publish(trainer, values)


def publish(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Write values to ``trainer.callback_metrics``, so that callbacks such as ``EarlyStopping`` can monitor them."""
    trainer.callback_metrics.update({key: torch.tensor(value, dtype=torch.float32) for key, value in values.items()})


def log_samples(trainer: pl.Trainer, texts: Sequence[str], step: int) -> None:
    """Write samples to loggers that store text: TensorBoard, Weights & Biases as a table, MLflow as a file."""
    for logger in trainer.loggers if texts else ():
        _log_texts(logger, _SAMPLES, texts, step)


def log_verdict(trainer: pl.Trainer, sentence: str, step: int) -> None:
    """Write the end of a run with a budget to the same loggers, and to a file beside the CSV file of ``CSVLogger``."""
    for logger in trainer.loggers:
        _log_texts(logger, _VERDICT, [sentence], step)
        if isinstance(logger, CSVLogger) and trainer.is_global_zero:
            with fsspec.open(f"{logger.log_dir}/{_VERDICT.replace('/', '_')}.txt", "w", encoding="utf-8") as file:
                file.write(f"{sentence}\n")


def _log_texts(logger: Logger, key: str, texts: Sequence[str], step: int) -> None:
    fenced = "\n\n".join(f"```\n{text}\n```" for text in texts)
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(key, fenced, step)
    elif isinstance(logger, WandbLogger):
        logger.log_text(key, columns=[key.rpartition("/")[2]], data=[[text] for text in texts], step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, fenced, f"{key}/step-{step:08d}.md")


def decoded(sample: Sequence[int], tokenizer: Any, known: Collection[int] | None = None) -> str:
    """A sample as text; as its token ids if there is no tokenizer or it can't decode them.

    A model may have more ids than its tokenizer, since vocabularies are padded. Such ids never end a run.

    Args:
        sample: Token ids.
        tokenizer: Has a ``decode`` that takes a list of ids, or a tensor of them as LitGPT's does. None for none.
        known: The ids that the tokenizer has, as ``known_ids`` returns them; None if they are not known.

    Example:
        >>> class Letters:
        ...     def decode(self, ids):
        ...         return "".join("abc"[id] for id in ids)
        >>> decoded([0, 1], Letters()), decoded([0, 7], Letters())
        ('ab', '[0, 7]')
    """
    ids = str(list(sample))
    if tokenizer is None or (known is not None and any(token not in known for token in sample)):
        return ids
    try:
        try:
            return str(tokenizer.decode(list(sample)))
        except AttributeError:
            return str(tokenizer.decode(torch.tensor(sample, dtype=torch.int64)))
    except BaseException as error:
        if not _is_decoding_error(error):
            raise
        return ids


def known_ids(tokenizer: Any) -> Collection[int] | None:
    """The token ids that a tokenizer has; None if it can't be found out.

    Args:
        tokenizer: One with ``get_vocab()``, as those of Hugging Face, or with its size as ``vocab_size`` (LitGPT,
            SentencePiece) or ``n_vocab`` (tiktoken).
    """
    try:
        if hasattr(tokenizer, "get_vocab"):
            return frozenset(tokenizer.get_vocab().values())
        size = getattr(tokenizer, "vocab_size", getattr(tokenizer, "n_vocab", None))
        size = size() if callable(size) else size
        return None if size is None else range(size)
    except BaseException as error:
        if not _is_decoding_error(error):
            raise
        return None


def undecodable_share(tokens: Tensor, lengths: Tensor, known: Collection[int]) -> float:
    """The share of samples with a token id that the tokenizer doesn't have.

    Args:
        tokens: Token ids, shape ``(samples, length)``.
        lengths: Tokens in each sample, without padding, shape ``(samples,)``.
        known: The ids that the tokenizer has.

    Example:
        >>> undecodable_share(torch.tensor([[1, 2], [1, 9], [1, 9]]), torch.tensor([2, 2, 1]), known=range(3))
        0.3333333333333333
    """
    ids = torch.unique(tokens)
    unknown = torch.tensor([token for token in ids.tolist() if token not in known], dtype=tokens.dtype)
    real = torch.arange(tokens.shape[1], dtype=torch.int64) < lengths.unsqueeze(1)
    return float((torch.isin(tokens, unknown) & real).any(1).double().mean())


def _is_decoding_error(error: BaseException) -> bool:
    """Whether a tokenizer raised an error for ids that it doesn't have. A panic in Rust is no ``Exception``."""
    return isinstance(error, _DECODING_ERRORS) or type(error).__module__ == "pyo3_runtime"


def plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as hyper-parameters: numbers and strings unchanged, dataclasses as mappings, other objects by name.

    Example:
        >>> plain({"coefficient": 10.0, "dtype": torch.bfloat16, "filters": [len], "prompts": [[1, 2], [3]]})
        {'coefficient': 10.0, 'dtype': 'torch.bfloat16', 'filters': 'len', 'prompts': 'list of 2'}
    """
    return {name: _plain(value) for name, value in arguments.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Real):  # NumPy's too, which a checkpoint must not hold
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
    """The name under which a filter's count is logged: that of its function or class, in snake case."""
    name = getattr(filter_, "__name__", type(filter_).__name__)
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).strip("_<>")
