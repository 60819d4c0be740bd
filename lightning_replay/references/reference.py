"""Which model is the reference π, and how it is taken from the model that trains."""

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_replay.models.language_model import LanguageModel, find_tokenizer
from lightning_replay.references.adapters import DisabledAdapter, adapter_is_idle
from lightning_replay.references.models import FrozenCopy, MovingAverage, ReferenceModel
from lightning_replay.references.offloaded import OffloadedCopy
from lightning_replay.references.own import OwnModel, check_same_tokens, load_own
from lightning_replay.references.sharded import ShardedCopy
from lightning_replay.utilities.distributed import is_sharded
from lightning_replay.utilities.validation import is_number, is_whole

__all__ = ["EMA", "Adapter", "Auto", "Cached", "Copy", "Model", "Reference", "ReferenceName", "reference_of"]

ReferenceName = Literal["auto", "copy", "adapter", "cached", "ema"]

Since = Literal["fit", "first"]

Quantize = Literal["int8"]

Save = Literal["inside", "beside"]


class Reference(ABC):
    """Which model is the reference π. A subclass with ``take`` is a reference of one's own.

    Example:
        >>> class Small(Reference):
        ...     def take(self, model, trainer):
        ...         return Copy(dtype="bfloat16").take(model, trainer)
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
        quantize: ``"int8"`` keeps the weights of linear and embedding layers as 8-bit integers with a 32-bit scale a
            row, a quarter of the memory of 32 bits, with torchao (``pip install "lightning-replay[torchao]"``). The
            samples and the divergence are then those of the rounded model; the first ``replay/loss`` of a fit is its
            divergence from the exact one.
        offload: Keep the weights on ``device``, by default the CPU, and compute where the model is: they are fetched
            module by module, the next one meanwhile. Each token that is sampled takes all weights over the bus.
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
    quantize: Quantize | None = None
    offload: bool = False
    save: Save = "inside"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        _floating(self.dtype, type(self).__name__)
        if self.quantize not in (None, *get_args(Quantize)):
            raise ValueError(f"`quantize` of {type(self).__name__} is 'int8' or None; got {self.quantize!r}.")
        if self.save not in get_args(Save):
            raise ValueError(f"`save` of {type(self).__name__} is 'inside' or 'beside'; got {self.save!r}.")

    @override
    def take(self, model: LanguageModel, trainer: pl.Trainer) -> ReferenceModel:
        """Copy the model; of sharded weights, each process copies its part.

        Raises:
            MisconfigurationException: If the weights are sharded and the copy is to have another type or device, or if
                the copy would compute with the weights of the model that trains, or can't be quantized.
        """
        dtype = _floating(self.dtype, type(self).__name__)
        if is_sharded(trainer):
            if (dtype, self.device, self.quantize, self.offload) != (None, None, None, False):
                raise MisconfigurationException(
                    f"{self} was given for a model whose weights are sharded. Each process then keeps its part of the "
                    "copy, on the device and in the type of the model's part. Leave out `dtype`, `device`, `quantize` "
                    "and `offload`."
                )
            return ShardedCopy(model)
        if self.offload:
            return OffloadedCopy(model, dtype, self.device or "cpu", self.quantize)
        return FrozenCopy(model, dtype, self.device, self.quantize)

    @property
    @override
    def is_model_at_fit_start(self) -> bool:
        return self.since == "fit" and self.dtype is None and self.quantize is None

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


@dataclass(frozen=True, init=False, repr=False)
class Model(Reference):
    """Another model than the one that trains, such as a larger one of its family, or its first version.

    Its vocabulary has to be the model's. It stays as it is, and is moved to where the model is. Checkpoints hold only
    a few of its logits: a run that resumes needs the same model again, and is refused with another one.

    Args:
        model: A module, a local folder, or a name on the Hugging Face hub. A folder or a name is loaded at each fit's
            start.
        language_model: Where the language model is in the module, as for ``SelfGeneratedReplay``.
        options: Arguments of ``AutoModelForCausalLM.from_pretrained`` for a folder or a name, such as ``dtype``,
            ``quantization_config`` or ``device_map``.

    Raises:
        TypeError: If ``model`` is none of these, or ``options`` are given for a module.

    Example:
        >>> Model("folder", dtype="bfloat16")
        Model('folder', dtype='bfloat16')
    """

    model: str | os.PathLike[str] | nn.Module
    language_model: str | None
    options: dict[str, Any]

    def __init__(
        self, model: str | os.PathLike[str] | nn.Module, *, language_model: str | None = None, **options: Any
    ) -> None:
        if not isinstance(model, (str, os.PathLike, nn.Module)):
            raise TypeError(f"`model` of Model is a module, a folder or a name; got {model!r}.")
        if isinstance(model, nn.Module) and options:
            raise TypeError(
                f"Model was given a {type(model).__name__}, which is loaded already, and {sorted(options)}, which are "
                "for loading a folder or a name. Leave them out."
            )
        for name, value in (("model", model), ("language_model", language_model), ("options", options)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """How it was made."""
        model = type(self.model).__name__ if isinstance(self.model, nn.Module) else repr(str(self.model))
        path = {} if self.language_model is None else {"language_model": self.language_model}
        return f"Model({', '.join([model, *(f'{name}={value!r}' for name, value in (path | self.options).items())])})"

    @override
    def take(self, model: LanguageModel, trainer: pl.Trainer) -> ReferenceModel:
        """Load the model, if it is not loaded, and compare it with the one that trains.

        Raises:
            MisconfigurationException: If it can't be loaded, is no causal language model, has another vocabulary or
                tokenizer, or computes with weights of the model that trains.
        """
        holders = [*trainer.callbacks, trainer.datamodule, trainer.lightning_module]  # type: ignore[attr-defined]
        check_same_tokens(self.model, find_tokenizer(*holders))
        return OwnModel(load_own(self.model, self.language_model, self.options, model.device), model)


def reference_of(reference: ReferenceName | Reference | nn.Module) -> Reference:
    """The reference that a name stands for, with its defaults; a ``Reference`` as it is; a module as a ``Model``.

    Raises:
        ValueError: If there is none of that name.
        TypeError: If it is none of these.

    Example:
        >>> reference_of("ema")
        EMA(since='fit', decay=0.999, dtype=None, device=None)
    """
    if isinstance(reference, Reference):
        return reference
    kinds: dict[str, type[Reference]] = {"auto": Auto, "copy": Copy, "adapter": Adapter, "cached": Cached, "ema": EMA}
    expected = f"`reference` is one of {', '.join(map(repr, kinds))}, a module, or a Reference, such as Copy()"
    if isinstance(reference, nn.Module):
        return Model(reference)
    if not isinstance(reference, str):
        raise TypeError(f"{expected}; got {reference!r}.")
    if reference not in kinds:
        raise ValueError(f"{expected}; got {reference!r}. A model's folder or name is given as Model({reference!r}).")
    return kinds[reference]()


def _floating(given: str | torch.dtype | None, owner: str) -> torch.dtype | None:
    """The type of torch that is meant."""
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` of {owner} is a floating-point type of torch, such as 'bfloat16'; got {given!r}.")
    return dtype
