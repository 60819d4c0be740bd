"""The models that replay rows come from and are compared with: the model before finetuning, or as it trains."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_replay.language_model import LanguageModel, evaluating, is_adapted

__all__ = ["DisabledAdapter", "FrozenCopy", "LiveModel", "ReferenceKeeper", "ReferenceModel", "adapter_is_idle"]

_CHECKPOINT_KEY = "lightning_replay_reference"


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
    """

    def __init__(self, model: LanguageModel) -> None:
        module = deepcopy(model.module).eval().requires_grad_(False)
        self._model = model.on(module)

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


class ReferenceKeeper:
    """Takes the reference model π at the start of a fit and carries it through checkpoints.

    A fresh PEFT adapter is switched off; every other model is copied. After a resume, π is the saved one: the
    weights that the checkpoint brings are half trained.
    """

    def __init__(self) -> None:
        self._reference: FrozenCopy | DisabledAdapter | None = None
        self._restored: Mapping[str, Tensor] | None = None
        self._restored_idle_adapter = False

    def get(self, trainer: pl.Trainer, model: LanguageModel) -> ReferenceModel:
        """The reference; taken from the model if this fit has none yet.

        Raises:
            MisconfigurationException: If the run resumes from a checkpoint that holds no reference.
        """
        if self._reference is None:
            # After a resume the adapter is trained, but the base under it is still the reference.
            if self._restored_idle_adapter or adapter_is_idle(model):
                self._reference = DisabledAdapter(model)
            else:
                self._reference = self._copy(trainer, model)
        return self._reference

    def release(self) -> None:
        """Forget the reference; the next fit takes its own."""
        self._reference = self._restored = None
        self._restored_idle_adapter = False

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put a copied reference into a checkpoint; an adapter switched off needs no saving."""
        if isinstance(self._reference, FrozenCopy):
            checkpoint[_CHECKPOINT_KEY] = self._reference.state_dict()
        elif isinstance(self._reference, DisabledAdapter):
            checkpoint[_CHECKPOINT_KEY] = None

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the reference from a checkpoint, if it holds one."""
        if _CHECKPOINT_KEY in checkpoint:
            self._reference = None
            self._restored = checkpoint[_CHECKPOINT_KEY]
            self._restored_idle_adapter = self._restored is None

    def _copy(self, trainer: pl.Trainer, model: LanguageModel) -> FrozenCopy:
        if trainer.ckpt_path is not None and self._restored is None:
            raise MisconfigurationException(
                f"The run resumes from {trainer.ckpt_path}, which holds no reference model: it was saved with "
                "`save_weights_only=True` or without replay, and the model before finetuning can't be told from its "
                "weights. Resume from a full checkpoint of a run with replay, or load the weights into the module "
                "and fit without `ckpt_path`: the reference is then the model as loaded."
            )
        reference = FrozenCopy(model)
        if self._restored is not None:
            reference.load_state_dict(self._restored)
            self._restored = None
        return reference


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
        idle = torch.equal(now, base.logits(tokens))
        # Switched off, PEFT freezes its adapters: what still trains now is a base weight.
        return idle and not any(parameter.requires_grad for parameter in model.module.parameters())
