"""The models that rows come from and are compared with: before finetuning, as it trains, or an average of the way."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_replay.models.language_model import LanguageModel, evaluating, is_adapted

__all__ = [
    "DisabledAdapter",
    "FrozenCopy",
    "LiveModel",
    "MovingAverage",
    "ReferenceModel",
    "adapter_is_idle",
]


class ReferenceModel(Protocol):
    """Something that becomes a language model in evaluation mode, without gradients, for as long as it is needed."""

    def active(self) -> AbstractContextManager[LanguageModel]:
        """A context that yields the language model and leaves everything as it was."""
        ...


class LiveModel:
    """The model as it trains."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the model itself, in evaluation mode."""
        with evaluating(self._model.module):
            yield self._model


class FrozenCopy:
    """A copy of the model's weights as they are now: exact for every model, at the price of a second one in memory.

    It is nobody's submodule, so optimizers, strategies and checkpoints of the user's module don't see it.

    Args:
        model: The model to copy.
        dtype: What the copy's weights are kept in; by default as the model's. Half the bits take half the memory, and
            what they round away is no longer protected.
        device: Where the copy is kept; by default where the model is. Tokens go there and logits come back.
    """

    def __init__(
        self, model: LanguageModel, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        module = deepcopy(model.module).eval().requires_grad_(False)
        self._model = model.on(module.to(device=device, dtype=dtype))

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the copy."""
        with torch.no_grad():
            yield self._model

    def state_dict(self) -> dict[str, Tensor]:
        """The copy's weights."""
        state: dict[str, Tensor] = self._model.module.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put other weights in the copy's place."""
        self._model.module.load_state_dict(dict(state))


class MovingAverage(FrozenCopy):
    """An exponential moving average of the weights, as a reference that follows the model slowly.

    It protects against sudden change: what the model loses within about ``1 / (1 - decay)`` steps is pulled back. It
    does not protect against slow change: what has been lost for longer is lost to the average as well.

    Args:
        model: The model to follow.
        decay: Share of the average that an update keeps.
        dtype: As for ``FrozenCopy``; 16 bits round small updates away.
        device: As for ``FrozenCopy``.
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

    @torch.no_grad()
    def update(self, model: LanguageModel) -> None:
        """Take a step towards the model's weights: average ← decay · average + (1 - decay) · weights."""
        for average, weight in zip(self._model.module.parameters(), model.module.parameters(), strict=True):
            average.lerp_(weight.to(average), 1 - self.decay)
        for ours, theirs in zip(self._model.module.buffers(), model.module.buffers(), strict=True):
            ours.copy_(theirs)


class DisabledAdapter:
    """A PEFT model with its adapters switched off: the exact base model, for no memory at all."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the model, its adapters off; what PEFT does to `requires_grad` on the way is undone."""
        module: Any = self._model.module
        trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        try:
            with evaluating(module), module.disable_adapter():
                yield self._model
        finally:
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)


def adapter_is_idle(model: LanguageModel) -> bool:
    """Whether switching the adapters off gives the model as it is now, for as long as it trains.

    True for a PEFT model whose adapters are fresh (they change nothing yet) and whose base weights are frozen.
    An adapter that has been trained before is a part of the model to remember, so it must not be switched off.

    Args:
        model: The model, before finetuning.
    """
    if not is_adapted(model.module):
        return False
    tokens = torch.arange(min(model.vocabulary, model.context or 64, 64), device=model.device).unsqueeze(0)
    with evaluating(model.module):
        now = model.logits(tokens)
    with DisabledAdapter(model).active() as base:
        before = base.logits(tokens)
        # Not bit for bit: a fresh DoRA divides by the norm that it multiplies with.
        idle = bool((now - before).abs().max() <= 16 * torch.finfo(now.dtype).eps * before.abs().max())
        # Switched off, PEFT freezes its adapters: what still trains now is a base weight.
        return idle and not any(parameter.requires_grad for parameter in model.module.parameters())
