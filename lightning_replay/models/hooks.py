"""Observing the call that the user's `training_step` makes to its language model, without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_replay.models.language_model import LanguageModel, argument_names

__all__ = ["ObservedForward", "observed_forward"]


_LABELS = frozenset({"labels", "shift_labels", "num_items_in_batch"})
"""Arguments of which a Hugging Face model computes a loss of its own."""

_INPUTS = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "token_type_ids",
        "cache_position",
        "logits_to_keep",
    }
)


class ObservedForward:
    """The arguments and the logits of a model's call.

    Attributes:
        logits: The logits of the first call that gradients flow through, with their graph; None as long as there was
            none.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.logits: Tensor | None = None
        self._model = model
        self._names = argument_names(model.module)
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}

    def observe(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: keep arguments and logits.

        Raises:
            MisconfigurationException: If the call returned no logits.
        """
        if self.logits is not None or not torch.is_grad_enabled():
            return
        try:
            self.logits = self._model.logits_in(output)
        except TypeError as error:
            raise MisconfigurationException(
                f"`loss='lwf'` takes the divergence on the logits of your step's own call, but "
                f"{type(module).__name__} returned none ({error}), as models patched for fused losses do when labels "
                "are given. Switch the fused loss off, or use `loss='kl'`, whose rows take a forward of their own."
            ) from error
        self._args, self._kwargs = args, kwargs

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the call, by name; positional ones that the signature doesn't name by number."""
        unnamed = (f"argument {number}" for number in range(len(self._names), len(self._args)))
        return dict(zip([*self._names[: len(self._args)], *unnamed], self._args, strict=True)) | self._kwargs

    def argument(self, *names: str) -> Tensor | None:
        """The first of these arguments of the call that is a tensor of the logits' rows and positions."""
        assert self.logits is not None
        arguments = dict(zip(self._names, self._args, strict=False)) | self._kwargs
        for name in names:
            value = arguments.get(name)
            if isinstance(value, Tensor) and value.shape == self.logits.shape[:2]:
                return value
        return None

    @property
    def asks_logits_alone(self) -> bool:
        """Whether the call, without its labels, asks for logits alone and no loss: so far as names can tell."""
        tensors = [name for name, value in list(self.arguments.items())[1:] if isinstance(value, Tensor)]
        return len(self._args) <= 1 and set(tensors) <= _INPUTS | _LABELS

    def ask(self, model: LanguageModel, labels: bool = True) -> Tensor:
        """The logits of another model for the same call, on the device of the first model's.

        Args:
            model: The other model.
            labels: Whether it gets the labels too.
        """
        assert self.logits is not None
        kept = {name: value for name, value in self._kwargs.items() if labels or name not in _LABELS}
        args, kwargs = apply_to_collection((self._args, kept), Tensor, lambda value: value.to(model.device))
        return model.logits_in(model.module(*args, **kwargs)).to(self.logits.device)


@contextmanager
def observed_forward(model: LanguageModel) -> Iterator[ObservedForward]:
    """Keep arguments and logits of the model's next call that gradients flow through."""
    record = ObservedForward(model)
    handle = model.module.register_forward_hook(record.observe, with_kwargs=True)
    try:
        yield record
    finally:
        handle.remove()
