"""A language model's output head, run on a chunk of positions at a time, with loss and gradients in one pass.

Logits of a batch are most of the memory at a vocabulary of 128,000. Here they exist for a chunk alone: it is multiplied
out, compared, differentiated and overwritten by the next one, as in Liger's fused linear losses and TRL's distillation
trainer. The loss is a sum over positions, so its gradient is known up to a factor as soon as a chunk is compared, and
the backward has only to scale it.

Every type is named: under ``precision="bf16-true"``, Lightning sets torch's default type to 16 bits inside the step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

__all__ = [
    "CalledHead",
    "Compare",
    "Head",
    "LinearHead",
    "LogitTransform",
    "Place",
    "Sweep",
    "chunk_logits",
    "chunked_sum",
]

Place = slice | Tensor
"""Positions of a chunk, as an index into tensors of shape ``(all positions, ...)``."""

_CHUNK = {"cpu": (2**22, 128), "device": (2**25, 128)}
"""Logits in a chunk, and the positions that it has at least: the weight is read anew for each chunk, so small ones cost
time. At a vocabulary of 128k, 128 positions are 2^24 logits."""

_BLOCK = 2**14
"""Rows of a 16-bit weight whose gradient is added up in 32 bits at a time."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does between its output head and its logits.

    First ``vocabulary`` cuts off the outputs of a padded head, then ``scale`` multiplies (Cohere; Granite divides),
    then ``softcap`` bounds: ``softcap * tanh(outputs / softcap)`` (Gemma 2).

    Args:
        scale: What the outputs are multiplied by.
        softcap: The bound, above 0; None for none.
        vocabulary: The number of outputs that are logits; None for all.

    Raises:
        ValueError: If ``softcap`` is not above 0 or ``scale`` is 0.

    Example:
        >>> LogitTransform(scale=2.0, vocabulary=2)(torch.tensor([1.0, 2.0, 3.0]))
        tensor([2., 4.])
    """

    scale: float = 1.0
    softcap: float | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if self.scale == 0 or (self.softcap is not None and not self.softcap > 0):
            raise ValueError(f"A head's `scale` is not 0 and its `softcap` above 0 or None; got {self}.")

    @property
    def is_identity(self) -> bool:
        """Whether outputs are logits as they are, but for those that are cut off."""
        return self.scale == 1 and self.softcap is None

    def __call__(self, outputs: Tensor) -> Tensor:
        """The logits, in the outputs' own type."""
        logits = outputs if self.vocabulary is None else outputs[..., : self.vocabulary]
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def backward_(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """Turn the gradient with respect to the logits, given the logits, into that with respect to the outputs."""
        if self.softcap is not None:
            assert logits is not None
            gradient.mul_((logits / self.softcap).square_().neg_().add_(1))
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


class Compare(Protocol):
    """A loss on the logits of a chunk."""

    def __call__(self, logits: Tensor, place: Place, gradient: bool) -> Tensor:
        """The losses of a chunk's positions.

        Args:
            logits: Shape ``(positions, vocabulary)``, 32-bit floats. Overwritten: if ``gradient``, with the gradient of
                the losses' sum.
            place: Which of all positions these are.
            gradient: Whether the gradient is needed.

        Returns:
            Shape ``(positions,)``, 32-bit floats.
        """


class Sweep(ABC):
    """One pass of a head over the chunks of a batch."""

    gradients: list[Tensor | None]
    """Gradients with respect to the head's parameters, as far as they are needed, summed over the chunks so far."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of a chunk, shape ``(positions, vocabulary)``, 32-bit floats; the next call may overwrite them."""

    @abstractmethod
    def backward(self, gradient: Tensor) -> Tensor:
        """Add to ``gradients`` and return the gradient with respect to the hidden states of the last chunk.

        Args:
            gradient: That with respect to the logits; overwritten.
        """


class Head(Protocol):
    """An output head: what turns hidden states, position by position, into logits."""

    @property
    def transform(self) -> LogitTransform:
        """What follows it."""

    @property
    def vocabulary(self) -> int:
        """The number of logits of a position."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that gradients may be needed for."""

    def sweep(self, hidden: Tensor, positions: int, needs: Sequence[bool] = ()) -> Sweep:
        """Begin a pass.

        Args:
            hidden: Any hidden states of the batch, for their type and device.
            positions: The largest chunk.
            needs: Whether a gradient is needed: for the hidden states, then for each of ``parameters``.
        """


@dataclass(frozen=True)
class LinearHead:
    """A plain linear layer.

    Args:
        weight: Shape ``(outputs, width)``.
        bias: Shape ``(outputs,)``; None for none.
        transform: What follows it.
    """

    weight: Tensor
    bias: Tensor | None = None
    transform: LogitTransform = field(default_factory=LogitTransform)

    @property
    def vocabulary(self) -> int:
        """As of ``Head``."""
        return self.transform.vocabulary or len(self.weight)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """As of ``Head``."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def sweep(self, hidden: Tensor, positions: int, needs: Sequence[bool] = ()) -> Sweep:
        """As of ``Head``."""
        return _LinearSweep(self, hidden, positions, needs)


@dataclass(frozen=True)
class CalledHead:
    """Any other layer that works position by position, such as one with a LoRA adapter; differentiated by autograd.

    Args:
        function: Maps hidden states of shape ``(positions, width)`` to outputs of shape ``(positions, outputs)``.
        vocabulary: The number of logits.
        parameters: The tensors in it that are trained.
        transform: What follows it.
    """

    function: Callable[[Tensor], Tensor]
    vocabulary: int
    parameters: tuple[Tensor, ...] = ()
    transform: LogitTransform = field(default_factory=LogitTransform)

    def sweep(self, hidden: Tensor, positions: int, needs: Sequence[bool] = ()) -> Sweep:
        """As of ``Head``."""
        return _CalledSweep(self, needs)


class _LinearSweep(Sweep):
    def __init__(self, head: LinearHead, hidden: Tensor, positions: int, needs: Sequence[bool]) -> None:
        self._transform, self._needs = head.transform, [*needs, *[False] * 3][: 1 + len(head.parameters)]
        self._dtype = _matmul_type(hidden)
        # Cast once for all chunks, and not by autocast, which would keep a cast made without a graph for the model's
        # own next call.
        kept = slice(head.vocabulary)
        self._weight = head.weight.detach()[kept].to(self._dtype)
        self._bias = None if head.bias is None else head.bias.detach()[kept].to(self._dtype)
        self._outputs = torch.empty(positions, head.vocabulary, dtype=self._dtype, device=hidden.device)
        self._hidden = self._logits = hidden
        self.gradients = [
            torch.zeros_like(part, dtype=_sum_type(part.dtype)) if needed else None
            for part, needed in zip(head.parameters, self._needs[1:], strict=True)
        ]

    @override
    def logits(self, hidden: Tensor) -> Tensor:
        self._hidden, outputs = hidden.to(self._dtype), self._outputs[: len(hidden)]
        if self._bias is None:
            torch.mm(self._hidden, self._weight.t(), out=outputs)
        else:
            torch.addmm(self._bias, self._hidden, self._weight.t(), out=outputs)
        logits = self._logits = outputs if self._transform.is_identity else self._transform_of(outputs)
        # The softcap's derivative needs the logits, which `Compare` overwrites.
        keeps = self._transform.softcap is not None and any(self._needs)
        return logits.to(torch.float32, copy=keeps)

    def _transform_of(self, outputs: Tensor) -> Tensor:
        """``LogitTransform``, in place: the weight's rows are those of the vocabulary alone."""
        outputs.mul_(self._transform.scale)
        cap = self._transform.softcap
        return outputs if cap is None else outputs.div_(cap).tanh_().mul_(cap)

    @override
    def backward(self, gradient: Tensor) -> Tensor:
        if not self._transform.is_identity:
            self._transform.backward_(gradient, self._logits)
        gradient = gradient.to(self._dtype)
        for kept, added in zip(self.gradients, (self._add_to_weight, self._add_to_bias), strict=False):
            if kept is not None:
                added(kept[: gradient.shape[1]], gradient)
        return gradient @ self._weight if self._needs[0] else gradient

    def _add_to_weight(self, kept: Tensor, gradient: Tensor) -> None:
        if kept.dtype == self._dtype:
            kept.addmm_(gradient.t(), self._hidden)
            return
        # Sums of 16-bit numbers would round at each chunk: they are added up in 32 bits, a block of rows at a time.
        for start in range(0, len(kept), _BLOCK):
            some = slice(start, start + _BLOCK)
            kept[some] += gradient[:, some].t() @ self._hidden

    def _add_to_bias(self, kept: Tensor, gradient: Tensor) -> None:
        kept += gradient.sum(0, dtype=kept.dtype)


class _CalledSweep(Sweep):
    def __init__(self, head: CalledHead, needs: Sequence[bool]) -> None:
        self._head, self._needs = head, [*needs, *[False] * (1 + len(head.parameters))][: 1 + len(head.parameters)]
        self._inputs: list[Tensor] = []
        self._logits: Tensor | None = None
        self._hidden: Tensor | None = None
        self.gradients = [
            torch.zeros_like(part, dtype=_sum_type(part.dtype)) if needed else None
            for part, needed in zip(head.parameters, self._needs[1:], strict=True)
        ]

    @override
    def logits(self, hidden: Tensor) -> Tensor:
        self._hidden = hidden.detach().requires_grad_(self._needs[0])
        with torch.set_grad_enabled(any(self._needs)):
            self._logits = self._head.transform(self._head.function(self._hidden))
        return self._logits.detach().to(torch.float32, copy=True)

    @override
    def backward(self, gradient: Tensor) -> Tensor:
        assert self._logits is not None
        assert self._hidden is not None
        inputs = [
            part for part, needed in zip((self._hidden, *self._head.parameters), self._needs, strict=True) if needed
        ]
        given = gradient.to(self._logits.dtype)
        found = iter(torch.autograd.grad(self._logits, inputs, given, allow_unused=True, materialize_grads=True))
        self._logits = None
        to_hidden = next(found) if self._needs[0] else gradient
        for kept in self.gradients:
            if kept is not None:
                kept += next(found)
        return to_hidden


class _ChunkedSum(torch.autograd.Function):
    """The sum of a loss over positions. The gradients are computed with it and handed over by the backward."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, compare: Compare, selected: Tensor | None, hidden: Tensor, *parameters: Tensor
    ) -> Tensor:
        needs: Sequence[bool] = ctx.needs_input_grad[3:]
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        sweep = head.sweep(flat, _positions(head, flat), needs)
        # In 32 bits, since it is yet to be scaled: 16 would round it twice, or to zero.
        to_hidden = torch.zeros_like(flat, dtype=_sum_type(flat.dtype)) if needs[0] else None
        values = []
        for place in _places(head, flat, selected):
            logits = sweep.logits(flat[place])
            values.append(compare(logits, place, any(needs)))
            if any(needs):
                gradient = sweep.backward(logits)
                if to_hidden is not None:
                    to_hidden[place] = gradient.to(to_hidden.dtype)
        ctx.gradients = [to_hidden, *sweep.gradients]
        ctx.inputs = [(part.shape, part.dtype) for part in (hidden, *parameters)]
        return torch.cat(values).sum() if values else torch.zeros((), dtype=torch.float32, device=hidden.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "The loss of a head that runs in chunks was differentiated a second time, but its gradients are handed "
                "over the first time, since a copy would be as large as the head. Compute the loss again."
            )
        # In place, and in 32 bits: a copy of the weight's gradient would be as large as the head. A view of it would be
        # one too: autograd then adds the gradient of a tied embedding out of place.
        scaled = [
            part if part is None else part.mul_(upstream).to(dtype)
            for part, (_, dtype) in zip(gradients, ctx.inputs, strict=True)
        ]
        if scaled[0] is not None:
            scaled[0] = scaled[0].view(ctx.inputs[0][0])
        return (None, None, None, *scaled)


def chunked_sum(head: Head, hidden: Tensor, compare: Compare, selected: Tensor | None) -> Tensor:
    """The sum of a loss over positions, a scalar with the graph of hidden states and head.

    It can be differentiated once.

    Args:
        head: The head.
        hidden: Hidden states, shape ``(..., width)``.
        compare: The loss.
        selected: Indices of the positions that count, into the flattened positions; None for all.
    """
    inputs = (hidden, *head.parameters)
    if not torch.is_grad_enabled():  # which a Function isn't told
        inputs = tuple(part.detach() for part in inputs)
    total: Tensor = _ChunkedSum.apply(head, compare, selected, *inputs)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def chunk_logits(head: Head, hidden: Tensor, selected: Tensor | None = None) -> Iterator[tuple[Place, Tensor]]:
    """Logits without a graph, a chunk at a time.

    Args:
        head: The head.
        hidden: Hidden states, shape ``(..., width)``.
        selected: As for ``chunked_sum``.

    Yields:
        Which positions, and their logits, shape ``(positions, vocabulary)``, 32-bit floats. The next chunk may
        overwrite them.
    """
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    sweep = head.sweep(flat, _positions(head, flat))
    for place in _places(head, flat, selected):
        yield place, sweep.logits(flat[place])


def _positions(head: Head, flat: Tensor) -> int:
    """How many positions a chunk has at most."""
    logits, least = _CHUNK["cpu" if flat.device.type == "cpu" else "device"]
    return min(max(least, logits // head.vocabulary), len(flat))


def _places(head: Head, flat: Tensor, selected: Tensor | None) -> Iterator[Place]:
    size, number = _positions(head, flat), len(flat) if selected is None else len(selected)
    for start in range(0, number, size):
        some = slice(start, min(start + size, number))
        yield some if selected is None else selected[some]


def _matmul_type(hidden: Tensor) -> torch.dtype:
    """The type in which a linear layer would multiply these hidden states here."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:  # which autocast leaves alone
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
