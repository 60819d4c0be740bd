"""Which model is the reference π, and how it is taken from the model that trains."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.adapters import DisabledAdapter, adapter_is_idle
from lightning_replay.references.models import FrozenCopy, MovingAverage, ReferenceModel
from lightning_replay.references.sharded import ShardedCopy
from lightning_replay.utilities.distributed import is_sharded
from lightning_replay.utilities.validation import is_number, is_whole

__all__ = ["EMA", "Adapter", "Auto", "Cached", "Copy", "Reference", "ReferenceName", "reference_of"]

ReferenceName = Literal["auto", "copy", "adapter", "cached", "ema"]

Since = Literal["fit", "first"]

Save = Literal["inside", "beside"]


class Reference(ABC):
    """Which model is the reference π. A subclass with ``take`` is a reference of one's own.

    Example:
        >>> from lightning_replay.references.models import LiveModel
        >>> class Teacher(Reference):
        ...     def __init__(self, module):
        ...         self.module = module
        ...
        ...     def take(self, model, trainer):
        ...         return LiveModel(model.on(self.module.to(model.device)))
    """

    since: Since = "fit"
    """``"fit"``: each ``trainer.fit`` takes π again, as the paper does for each task of a sequence. ``"first"``: keep π
    of the first fit."""

    switches_adapter_off: ClassVar[bool] = False
    """Whether a fresh adapter that is switched off may be π, so that a checkpoint needs to hold nothing of it."""

    @abstractmethod
    def take(self, model: LanguageModel, trainer: pl.Trainer) -> ReferenceModel:
        """Make π.

        After a resume this is called again, with the model as the checkpoint left it. A reference made of the model's
        own weights therefore returns a ``SavedReference``, which then gets back the weights that it had.

        Args:
            model: The model, before this fit trains it.
            trainer: The Trainer of the fit.
        """

    @property
    def is_model_at_fit_start(self) -> bool:
        """Whether π gives exactly the logits that the model gave when the fit began, on every input."""
        return False

    @property
    def saves_beside(self) -> bool:
        """Whether the weights, which never change, are saved once beside the checkpoints instead of inside each."""
        return False


@dataclass(frozen=True, kw_only=True)
class _Since(Reference):
    """Lets ``since`` be set. The base is no dataclass, so that a config can name its subclasses."""

    since: Since = "fit"

    def __post_init__(self) -> None:
        if self.since not in get_args(Since):
            raise ValueError(f"`since` of {type(self).__name__} is 'fit' or 'first'; got {self.since!r}.")


@dataclass(frozen=True, kw_only=True)
class Copy(_Since):
    """A frozen copy of the weights at fit start: exact, for the memory of a second model.

    Args:
        dtype: The type of the copy's weights, such as ``"bfloat16"``; by default the model's. Differences that a
            smaller type rounds away are not protected.
        device: The device of the copy; by default the model's.
        save: ``"inside"``: in each checkpoint, which is larger by the model's weights and complete by itself.
            ``"beside"``: once in each folder of checkpoints, as ``reference-<hash>.safetensors``, which the
            checkpoints name; move the folder as a whole. A missing or altered file is refused.
        since: As for every ``Reference``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> Copy(dtype="bfloat16", save="beside").is_model_at_fit_start, Copy().is_model_at_fit_start
        (False, True)
    """

    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None
    save: Save = "inside"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        _floating(self.dtype, type(self).__name__)
        if self.save not in get_args(Save):
            raise ValueError(f"`save` of {type(self).__name__} is 'inside' or 'beside'; got {self.save!r}.")

    @override
    def take(self, model: LanguageModel, trainer: pl.Trainer) -> ReferenceModel:
        """Copy the model; of sharded weights, each process copies its part.

        Raises:
            MisconfigurationException: If the weights are sharded and the copy is to have another type or device, or if
                the copy would compute with the weights of the model that trains.
        """
        dtype = _floating(self.dtype, type(self).__name__)
        if not is_sharded(trainer):
            return FrozenCopy(model, dtype, self.device)
        if dtype is not None or self.device is not None:
            raise MisconfigurationException(
                f"{self} was given for a model whose weights are sharded. Each process then keeps its part of the "
                "copy, on the device and in the type of the model's part. Leave out `dtype` and `device`."
            )
        return ShardedCopy(model)

    @property
    @override
    def is_model_at_fit_start(self) -> bool:
        return self.since == "fit" and self.dtype is None

    @property
    @override
    def saves_beside(self) -> bool:
        return self.save == "beside"


@dataclass(frozen=True, kw_only=True)
class Auto(Copy):
    """A fresh PEFT adapter switched off, which is exact and takes no memory; for every other model a ``Copy``."""

    switches_adapter_off: ClassVar[bool] = True

    @override
    def take(self, model: LanguageModel, trainer: pl.Trainer) -> ReferenceModel:
        return DisabledAdapter(model) if adapter_is_idle(model) else super().take(model, trainer)


@dataclass(frozen=True, kw_only=True)
class Adapter(_Since):
    """A fresh PEFT adapter switched off: exactly the base model, for no memory."""

    switches_adapter_off: ClassVar[bool] = True

    @override
    def take(self, model: LanguageModel, trainer: pl.Trainer) -> ReferenceModel:
        """Switch the adapter off while π is asked.

        Raises:
            MisconfigurationException: If there is no adapter to switch off.
        """
        if not adapter_is_idle(model):
            raise MisconfigurationException(
                f"`reference='adapter'` switches a fresh PEFT adapter off, but {type(model.module).__name__} has none, "
                "or its adapter already contributes, or weights under it train as well. Use `reference='copy'`."
            )
        return DisabledAdapter(model)

    @property
    @override
    def is_model_at_fit_start(self) -> bool:
        return self.since == "fit"


@dataclass(frozen=True, kw_only=True)
class Cached(_Since):
    """Log-probabilities kept beside the rows: no second model and no reference forward while training.

    Exact for the ``top_k`` likeliest tokens of a position, with one figure for all others together. Without a fresh
    adapter to switch off, all rows are sampled before the first step and never replaced.

    Args:
        top_k: The number of log-probabilities kept for each position, at 6 bytes each.
        since: As for every ``Reference``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    top_k: int = 64

    switches_adapter_off: ClassVar[bool] = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.top_k, 1):
            raise ValueError(f"`top_k` of Cached is a number of tokens, at least 1; got {self.top_k!r}.")

    @override
    def take(self, model: LanguageModel, trainer: pl.Trainer) -> ReferenceModel:
        """The whole π, for what the cached log-probabilities can't tell: an adapter switched off, or a copy."""
        return Auto().take(model, trainer)


@dataclass(frozen=True, kw_only=True)
class EMA(_Since):
    """An exponential moving average of the weights: it protects against sudden change, not against slow change.

    It changes with each step, so it is saved inside each checkpoint.

    Args:
        decay: The share of the average that each optimizer step keeps.
        dtype: The type of the average, such as ``"float32"``; by default the model's. 16 bits round small updates away.
        device: The device of the average; by default the model's.
        since: As for every ``Reference``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    decay: float = 0.999
    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        _floating(self.dtype, "EMA")
        if not is_number(self.decay) or not 0 <= self.decay < 1:
            raise ValueError(
                f"`decay` of EMA is the share that the average keeps, from 0 to below 1; got {self.decay!r}."
            )

    @override
    def take(self, model: LanguageModel, trainer: pl.Trainer) -> ReferenceModel:
        """Begin the average with a copy of the model.

        Raises:
            MisconfigurationException: If the weights are sharded, or if the copy would compute with the weights of the
                model that trains.
        """
        if is_sharded(trainer):
            raise MisconfigurationException(
                "`reference='ema'` averages whole weights, but this strategy shards them. Use `reference='copy'`, of "
                "which each process keeps its part."
            )
        return MovingAverage(model, self.decay, _floating(self.dtype, "EMA"), self.device)


def reference_of(reference: ReferenceName | Reference) -> Reference:
    """The reference that a name stands for, with its defaults; a ``Reference`` as it is.

    Raises:
        ValueError: If there is none of that name.
        TypeError: If it is neither a name nor a ``Reference``.

    Example:
        >>> reference_of("ema")
        EMA(since='fit', decay=0.999, dtype=None, device=None)
    """
    if isinstance(reference, Reference):
        return reference
    kinds: dict[str, type[Reference]] = {"auto": Auto, "copy": Copy, "adapter": Adapter, "cached": Cached, "ema": EMA}
    names = ", ".join(map(repr, kinds))
    if not isinstance(reference, str):
        raise TypeError(f"`reference` is one of {names} or a Reference, such as Copy(); got {reference!r}.")
    if reference not in kinds:
        raise ValueError(f"`reference` is one of {names} or a Reference, such as Copy(); got {reference!r}.")
    return kinds[reference]()


def _floating(given: str | torch.dtype | None, owner: str) -> torch.dtype | None:
    """The type of torch that is meant."""
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` of {owner} is a floating-point type of torch, such as 'bfloat16'; got {given!r}.")
    return dtype
