"""One forward for new and replay rows together, behind the back of the user's `training_step`.

Joining replay rows to the user's batch would change what the user's own code sees: a loss that takes its targets
from the input ids would train on them, a metric would count them, `self.log` would infer another batch size. So for
losses of our own the rows travel with the model's call instead: a pre-hook appends them to the inputs, a hook takes
their logits out of the output, and `training_step` sees the batch and the output it would see without replay.

Learning without forgetting needs no rows but the logits of the user's own: the same hooks, and nothing is changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_replay.models.language_model import LanguageModel, argument_names, find_logits

__all__ = ["JointForward", "ObservedForward", "joint_forward", "observed_forward"]

_LABELS = frozenset({"labels", "targets", "target"})


class JointForward:
    """What became of the rows that travel with a forward.

    Attributes:
        logits: The model's logits on the rows, shape ``(rows, length, vocabulary)``, with their graph; None as
            long as the model has not been called.
    """

    def __init__(self, model: LanguageModel, tokens: Tensor, ignore_index: int) -> None:
        self.logits: Tensor | None = None
        self._names = argument_names(model.module)
        self._tokens = tokens
        self._ignore_index = ignore_index
        self._user_shape: torch.Size | None = None

    def append(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Forward pre-hook: add the rows to the first call that gradients flow through."""
        if self._user_shape is not None or not torch.is_grad_enabled():
            return None
        names = [*self._names[: len(args)], *(f"argument {i}" for i in range(len(self._names), len(args)))]
        arguments = dict(zip(names, args, strict=True)) | kwargs
        token_name = next((name for name in (*self._names[:1], "input_ids", *arguments) if name in arguments), "")
        tokens = arguments.get(token_name)
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
            raise TypeError(
                f"Replay rows travel with the call of {type(module).__name__} as tokens of shape (rows, length), but "
                f"it was called with {sorted(arguments)} and no such tokens. Use `loss='mixed'`, which joins the "
                "rows to your batch instead, or call the model with tokens."
            )
        self._user_shape = tokens.shape
        joined = {
            name: self._join(name, value, is_tokens=name == token_name) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        return tuple(joined[name] for name in names), {name: joined[name] for name in kwargs}

    def split(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook: keep the rows' logits, hand back the output as it would be without them."""
        if self._user_shape is None or self.logits is not None or not torch.is_grad_enabled():
            return None
        logits = find_logits(output)
        (new_rows, new_length), (rows, length) = self._user_shape, self._tokens.shape
        joint_shape = (new_rows + rows, max(new_length, length))
        if logits.shape[:2] != joint_shape:
            raise TypeError(
                f"{type(module).__name__} was called with tokens of shape {joint_shape} and returned logits of shape "
                f"{tuple(logits.shape)}: replay needs the logits of every position."
            )
        self.logits = logits[new_rows:, :length]

        def crop(value: Tensor) -> Tensor:
            if value.dim() == 0 or value.shape[0] != joint_shape[0]:
                return value
            value = value[:new_rows]
            return value[:, :new_length] if value.dim() > 1 and value.shape[1] == joint_shape[1] else value

        return apply_to_collection(output, Tensor, crop)

    def _join(self, name: str, value: Tensor, is_tokens: bool) -> Tensor:
        """One argument with the rows appended, both padded on the right to one length.

        Under causal attention nothing sees what stands to its right, so the padding needs no mask.
        """
        assert self._user_shape is not None
        new_rows, new_length = self._user_shape
        if value.dim() < 2 or value.shape[0] != new_rows:
            return value
        rows, length = self._tokens.shape
        if is_tokens:
            ours, padding = self._tokens, 0
        elif name in _LABELS:
            ours, padding = self._filled(value, self._ignore_index), self._ignore_index
        elif name == "attention_mask" and value.dim() == 2:
            ours, padding = self._filled(value, 1), 1
        elif name == "position_ids":
            ours, padding = torch.arange(length, device=value.device).expand(rows, -1), 0
        elif name == "token_type_ids":
            ours, padding = self._filled(value, 0), 0
        else:
            raise TypeError(
                f"Replay rows have nothing to put into the model's argument `{name}` of shape {tuple(value.shape)}. "
                "Use `loss='mixed'` with `ReplayDataModule(to_batch=...)`, which builds the mixed batch your way."
            )
        if value.shape != self._user_shape:
            raise TypeError(
                f"The model's argument `{name}` has shape {tuple(value.shape)} beside tokens of shape "
                f"{tuple(self._user_shape)}; replay rows can only be joined to arguments of the tokens' shape."
            )
        joint_length = max(new_length, length)
        theirs = F.pad(value, (0, joint_length - new_length), value=padding)
        return torch.cat([theirs, F.pad(ours.to(value.dtype), (0, joint_length - length), value=padding)])

    def _filled(self, like: Tensor, fill: int) -> Tensor:
        return torch.full(self._tokens.shape, fill, dtype=like.dtype, device=like.device)


@contextmanager
def joint_forward(model: LanguageModel, tokens: Tensor, ignore_index: int = -100) -> Iterator[JointForward]:
    """Let rows travel with the model's next call that gradients flow through.

    The caller of the model gets the output of its own rows alone; a loss that the model itself computes leaves
    ours out, since their labels are ``ignore_index``.

    Args:
        model: The model.
        tokens: The rows, shape ``(rows, length)``, on the model's device.
        ignore_index: The label that the model's own loss leaves out.

    Yields:
        The record in which the rows' logits will stand.
    """
    record = JointForward(model, tokens, ignore_index)
    handles = (
        model.module.register_forward_pre_hook(record.append, with_kwargs=True),
        model.module.register_forward_hook(record.split, with_kwargs=True),
    )
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


class ObservedForward:
    """What the model was asked and what it answered.

    Attributes:
        logits: The logits of the first call that gradients flow through, with their graph; None as long as there was
            none.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.logits: Tensor | None = None
        self._names = argument_names(model.module)
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}

    def observe(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: keep arguments and logits."""
        if self.logits is None and torch.is_grad_enabled():
            self.logits, self._args, self._kwargs = find_logits(output), args, kwargs

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

    def ask(self, model: LanguageModel) -> Tensor:
        """What another model says to the same call, where the first model's logits are."""
        assert self.logits is not None
        args, kwargs = apply_to_collection((self._args, self._kwargs), Tensor, lambda value: value.to(model.device))
        return find_logits(model.module(*args, **kwargs)).to(self.logits.device)


@contextmanager
def observed_forward(model: LanguageModel) -> Iterator[ObservedForward]:
    """Keep what the model is asked and answers, in its next call that gradients flow through."""
    record = ObservedForward(model)
    handle = model.module.register_forward_hook(record.observe, with_kwargs=True)
    try:
        yield record
    finally:
        handle.remove()
