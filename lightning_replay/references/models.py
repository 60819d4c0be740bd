"""The models that rows come from and are compared with: before finetuning, as it trains, or averaged over training."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_replay.models.language_model import LanguageModel, evaluating
from lightning_replay.references.independence import independent_copy

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

    Raises:
        MisconfigurationException: If the copy would compute with the weights of the model that trains.
    """

    weights_stay: ClassVar[bool] = True

    def __init__(
        self, model: LanguageModel, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        copy = independent_copy(model)
        copy.module.eval().requires_grad_(False)
        self._model = copy.on(copy.module.to(device=device, dtype=dtype))

    @override
    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the copy."""
        with torch.no_grad():
            yield self._model

    @override
    def state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._model.module.state_dict()
        return state

    @override
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._model.module.load_state_dict(dict(state))


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
            average.lerp_(weight.to(average), 1 - self.decay)
        for ours, theirs in zip(self._model.module.buffers(), model.module.buffers(), strict=True):
            ours.copy_(theirs)
