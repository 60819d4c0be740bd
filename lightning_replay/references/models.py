"""The models that rows come from and are compared with: before finetuning, as it trains, or averaged over training."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typing_extensions import override

from lightning_replay.models.language_model import LanguageModel, evaluating
from lightning_replay.references.independence import independent_copy
from lightning_replay.references.probe import probe_logits, probe_tokens
from lightning_replay.references.quantized import load_plain_state, plain_state, quantize_to_int8

__all__ = ["FrozenCopy", "LiveModel", "MovingAverage", "ReferenceModel", "SavedReference"]


class ReferenceModel(ABC):
    """A language model in evaluation mode, without gradients, for as long as it is needed."""

    weights_stay: ClassVar[bool] = False
    """Whether the weights that the language model has in ``active`` are still the same ones, in the same memory, after
    it, until the next optimizer step. If not, its output head is copied for the replay loss."""

    @abstractmethod
    def active(self) -> AbstractContextManager[LanguageModel]:
        """A context that yields the language model and restores whatever it has changed."""

    def follow(self, model: LanguageModel) -> None:  # noqa: B027
        """Called after each optimizer step, with the model that trains. Most references stay as they are."""


class SavedReference(ReferenceModel):
    """A reference whose weights belong into checkpoints: they can't be taken again from a model that has trained."""

    comes_from_model: ClassVar[bool] = True
    """Whether it is made of the model's weights, so that a run can't resume from a checkpoint that doesn't hold it."""

    @abstractmethod
    def state_dict(self) -> Mapping[str, Tensor]:
        """The weights. Of sharded ones all processes call this together."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the weights by saved ones."""


class LiveModel(ReferenceModel):
    """The model as it trains, or any other module that needs no copy.

    Args:
        model: The model. For a module of one's own: ``model.on(module)``.
    """

    weights_stay: ClassVar[bool] = True

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @override
    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the model itself, in evaluation mode."""
        with evaluating(self._model.module):
            yield self._model


class FrozenCopy(SavedReference):
    """A copy of the model's weights as they are now: exact for every model, for the memory of a second one.

    It is no submodule of the user's module, so optimizers, strategies and checkpoints of that don't see it.

    Args:
        model: The model to copy.
        dtype: The type of the copy's weights; by default the model's. A type of half the bits takes half the memory.
            Differences that it rounds away are not protected.
        device: The device of the copy; by default the model's. Tokens are moved there and logits back.
        quantize: ``"int8"``: the weights of linear and embedding layers become 8-bit integers, with a scale a row.

    Raises:
        MisconfigurationException: If the copy would compute with the weights of the model that trains, or it can't be
            quantized.
    """

    weights_stay: ClassVar[bool] = True

    def __init__(
        self,
        model: LanguageModel,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        quantize: str | None = None,
    ) -> None:
        copy = independent_copy(model)
        copy.module.eval().requires_grad_(False)
        if dtype is not None:
            _convert(copy.module, dtype)
        if quantize is not None:
            self._quantize(copy)
        self._model = copy.on(copy.module.to(device=device))

    @override
    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the copy."""
        with torch.no_grad():
            yield self._model

    @override
    def state_dict(self) -> dict[str, Tensor]:
        return plain_state(self._model.module)

    @override
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        load_plain_state(self._model.module, state)

    @staticmethod
    def _quantize(copy: LanguageModel) -> None:
        """Quantize a copy, say how much of it that was, and try it."""
        before = _bytes(copy.module)
        share = quantize_to_int8(copy.module)
        try:
            logits = probe_logits(copy, probe_tokens(copy, 4))
        except Exception as error:  # whatever the model's own code does with its weights
            raise MisconfigurationException(
                f"{type(copy.module).__name__} can't be called with weights in 8 bits: {type(error).__name__}: {error} "
                "Use `Copy(dtype='bfloat16')`."
            ) from error
        if not bool(logits.isfinite().all()):
            raise MisconfigurationException(
                f"With weights in 8 bits, {type(copy.module).__name__} gives logits that are not finite. Use "
                "`Copy(dtype='bfloat16')`."
            )
        rank_zero_info(
            f"Replay: the reference holds {share:.0%} of its weights in 8 bits, {_bytes(copy.module) / 2**20:,.0f} MiB "
            f"instead of {before / 2**20:,.0f}. The first `replay/loss` is its divergence from the exact copy."
        )


def _convert(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert weights as `from_pretrained` loads them in this type: not the frequencies of rotary positions.

    Rounded, they would turn each position by an angle whose error grows with the position.
    """
    frequencies = [
        (part, name, value)
        for part in module.modules()
        for name, value in part.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    ]
    module.to(dtype=dtype)
    for part, name, value in frequencies:
        part._buffers[name] = value


def _bytes(module: torch.nn.Module) -> int:
    """The memory of a module's weights and buffers."""
    return sum({part.data_ptr(): part.nbytes for part in plain_state(module).values()}.values())


class MovingAverage(FrozenCopy):
    """An exponential moving average of the weights, a reference that follows the model slowly.

    It protects against sudden change: what the model loses within about ``1 / (1 - decay)`` steps is pulled back. It
    does not protect against slow change: the average forgets what the model lost longer ago.

    Args:
        model: The model to follow.
        decay: The share of the average that an update keeps.
        dtype: As for ``FrozenCopy``; 16 bits round small updates away.
        device: As for ``FrozenCopy``.

    Raises:
        MisconfigurationException: As for ``FrozenCopy``.
    """

    def __init__(
        self,
        model: LanguageModel,
        decay: float,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(model, dtype, device)
        self.decay = decay

    @override
    @torch.no_grad()
    def follow(self, model: LanguageModel) -> None:
        """Take a step towards the model's weights: average ← decay · average + (1 - decay) · weights."""
        for average, weight in zip(self._model.module.parameters(), model.module.parameters(), strict=True):
            wraps_others = is_traceable_wrapper_subclass(weight)
            if weight.is_floating_point() and not wraps_others:  # a quantized one doesn't train, and has no average
                average.lerp_(weight.to(average), 1 - self.decay)
        for ours, theirs in zip(self._model.module.buffers(), model.module.buffers(), strict=True):
            ours.copy_(theirs)
