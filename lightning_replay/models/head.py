"""A model's output head: finding it, and calling the model with a loss in the head's place.

In a call with a loss in the head's place, the model does all that it does without: hooks run, FSDP2 gathers weights,
autocast and adapters are as they are. Only the head's ``forward`` is another. It gets the hidden states, has the head's
weights at hand as the head itself would, computes what is wanted of them and returns one number for each position
instead of one for each token of the vocabulary. Neither an exception that leaves the forward early nor a call of the
model's body alone would do: both leave out hooks of the whole model, such as those by which FSDP2 gathers the head's
weight and brings its gradient home.

What follows the head, a scale or a bound, then sees one number for each position. It is found out by giving it chosen
numbers in the head's place.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_replay.head_chunks import CalledHead, Head, LinearHead, LogitTransform, chunk_logits
from lightning_replay.models.calls import evaluating
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.models.probe import probe_tokens, shown

__all__ = ["HiddenStates", "OutputHead", "OutputHeads", "WholeLogitsError"]

T = TypeVar("T")

_EXPONENTS = (-14, -10, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 8, 20)
_POINTS = [sign * 2.0**exponent for exponent in _EXPONENTS for sign in (1.0, -1.0)]
"""What is put in the head's place: powers of two, which every type holds exactly, the largest beyond every bound."""
_LENGTH = 4
"""Tokens in each row of the trial."""
_BLOCK = 2**12
"""Outputs of a quantized head that are computed at a time."""
_TRIALS = 4
"""How many modules are tried at most."""


class WholeLogitsError(Exception):
    """Why a model's head can't be replaced by a loss. Whole logits are taken then."""


class HiddenStates(NamedTuple):
    """The hidden states of a call and the head that turns them into logits.

    Attributes:
        states: The input of the head, shape ``(rows, positions, width)``.
        head: The head, with the weights of the call.
    """

    states: Tensor
    head: Head

    def kept(self, copy: bool) -> "HiddenStates | None":
        """The same without a graph, to be used when the call is over.

        Args:
            copy: Whether the model's weights or adapters may be others by then.

        Returns:
            None if they may, and the head is more than a weight and a bias.
        """
        states, head = self.states.detach(), self.head
        if isinstance(head, LinearHead):
            weight, bias = (None if part is None else part.detach() for part in (head.weight, head.bias))
            assert weight is not None
            if copy:
                weight, bias = weight.clone(), None if bias is None else bias.clone()
            return HiddenStates(states, LinearHead(weight, bias, head.transform))
        return None if copy else HiddenStates(states, head)


class OutputHead:
    """The output head of a model.

    Args:
        module: The head.
        vocabulary: The number of the model's logits.
        transform: What follows the head.
    """

    def __init__(self, module: nn.Module, vocabulary: int, transform: LogitTransform) -> None:
        self.module = module
        self.vocabulary = vocabulary
        self.transform = transform
        self._inside: Callable[[HiddenStates], Tensor] | None = None
        self._calls = 0
        self._thread = 0
        self._is_patched = False
        self._original: Callable[..., Any] = module.forward
        self._lock = threading.RLock()
        # One function for all calls, so that a compiled model is compiled for it once.
        self._stand_in = torch.compiler.disable(self._forward)  # type: ignore[no-untyped-call]

    def run(
        self, model: LanguageModel, call: Callable[[LanguageModel], Tensor], inside: Callable[[HiddenStates], T]
    ) -> T:
        """Call the model with a function in the head's place.

        Args:
            model: The model.
            call: Calls what it is given, as in ``lambda model: model.logits(tokens)``, and returns the logits.
            inside: What is wanted of the hidden states. It runs inside the model's call.

        Returns:
            What ``inside`` returned. Of a scalar with a graph, the backward goes through the model's output too, so
            that hooks there run.

        Raises:
            WholeLogitsError: If the model did not call its head once, with hidden states alone.
        """
        results: list[T] = []

        def stub(given: HiddenStates) -> Tensor:
            result = inside(given)
            results.append(result)
            shape = (*given.states.shape[:-1], 1)
            if isinstance(result, Tensor) and result.requires_grad:
                return result.to(given.states.dtype).expand(shape)
            return given.states.new_zeros(shape)

        output = self.call_with(model, call, stub)
        (result,) = results
        if isinstance(result, Tensor) and result.requires_grad and output.requires_grad:
            tied: Any = _Tied.apply(result, output)  # type: ignore[no-untyped-call]
            return tied  # type: ignore[no-any-return]
        return result

    def call_with(
        self, model: LanguageModel, call: Callable[[LanguageModel], Tensor], stub: Callable[[HiddenStates], Tensor]
    ) -> Tensor:
        """The model's output if its head returns what ``stub`` does, of shape ``(rows, positions, 1)``."""
        with self._replaced():
            self._inside, self._calls, self._thread = stub, 0, threading.get_ident()
            try:
                output = call(dataclasses.replace(model, vocabulary=1))
            finally:
                self._inside = None
            if self._calls != 1:
                raise WholeLogitsError(f"{type(model.module).__name__} called its head {self._calls} times")
            return output

    @contextmanager
    def watched(self, done: Callable[[], bool]) -> Iterator[list[HiddenStates]]:
        """Keep the hidden states of the head's last call that gradients flow through, with their graph.

        Args:
            done: Whether later calls are to be left out.

        Yields:
            A list that holds them once the head has been called.
        """
        found: list[HiddenStates] = []

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled() and not done():
                hidden = [*args, *kwargs.values()]
                found[:] = [HiddenStates(hidden[0], self._resolved("forward" in vars(module)))]

        handle = self.module.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield found
        finally:
            handle.remove()

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        with self._lock:
            own = vars(self.module).get("forward")
            self._original, self._is_patched = self.module.forward, own is not None
            self.module.forward = self._stand_in
            try:
                yield
            finally:
                del self.module.forward
                if own is not None:
                    self.module.forward = own

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        # Another thread may sample from the model meanwhile.
        if self._inside is None or threading.get_ident() != self._thread:
            return self._original(*args, **kwargs)
        self._calls += 1
        hidden = [*args, *kwargs.values()]
        if len(hidden) != 1 or not isinstance(hidden[0], Tensor) or hidden[0].dim() != 3:
            raise WholeLogitsError("its head is called with more than hidden states of shape (rows, positions, width)")
        return self._inside(HiddenStates(hidden[0], self._resolved(self._is_patched)))

    def _resolved(self, is_patched: bool) -> Head:
        """The head with the weights that it has now."""
        linear = None if is_patched else _linear_in(self.module, outermost=True)
        if linear is None:
            trained = tuple(part for part in self.module.parameters() if part.requires_grad)
            if any(isinstance(part, DTensor) for part in self.module.parameters()):
                raise WholeLogitsError("its head's weights are sharded while it is called")
            return CalledHead(
                self._original if self._inside else self.module.forward, self.vocabulary, trained, self.transform
            )
        if isinstance(linear.weight, DTensor):
            raise WholeLogitsError("its head's weights are sharded while it is called")
        wraps_others = is_traceable_wrapper_subclass(linear.weight)
        if wraps_others:  # a quantized weight, which is no matrix to multiply with
            if any(part.requires_grad for part in linear.parameters()):
                raise WholeLogitsError("its head's weights train and are no plain tensors")
            return CalledHead(partial(_in_blocks, linear.weight, linear.bias), self.vocabulary, (), self.transform)
        return LinearHead(linear.weight, linear.bias, self.transform)


class OutputHeads:
    """The output heads of some models, each found once. If there is none, this says so once."""

    def __init__(self) -> None:
        self._found: dict[nn.Module, OutputHead | None] = {}

    def of(self, model: LanguageModel) -> OutputHead | None:
        """The head of a model; None if whole logits are to be taken."""
        if model.module not in self._found:
            try:
                self._found[model.module] = _find(model)
            except WholeLogitsError as error:
                self.give_up(model, error)
        return self._found[model.module]

    def give_up(self, model: LanguageModel, reason: WholeLogitsError) -> None:
        """Take whole logits of a model from here on, and say why."""
        self._found[model.module] = None
        rank_zero_info(
            f"Replay takes whole logits of {type(model.uncompiled.module).__name__}, which is exact but needs the "
            f"memory of {model.vocabulary:,} numbers a token: {reason}."
        )

    def run(
        self, model: LanguageModel, call: Callable[[LanguageModel], Tensor], inside: Callable[[HiddenStates], T]
    ) -> T | None:
        """As ``OutputHead.run``; None if whole logits are to be taken."""
        head = self.of(model)
        if head is None:
            return None
        try:
            return head.run(model, call, inside)
        except WholeLogitsError as error:
            self.give_up(model, error)
            return None


def _in_blocks(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    """A linear layer, a block of outputs at a time: the call may make a matrix of another type of the weight."""
    starts = range(0, len(weight), _BLOCK)
    outputs = torch.cat([F.linear(hidden, weight[start : start + _BLOCK]) for start in starts], -1)
    return outputs if bias is None else outputs + bias


class _Tied(torch.autograd.Function):
    """A value whose backward begins at another tensor too, with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        ctx.other = other.shape, other.dtype, other.device
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.other
        return upstream, torch.zeros(shape, dtype=dtype, device=device)


class _Call(NamedTuple):
    module: nn.Module
    hidden: Tensor
    output: Tensor


def _find(model: LanguageModel) -> OutputHead:
    """Find a model's head and try it: on a few tokens it has to reproduce the model's logits to rounding."""
    bare = model.uncompiled
    length = min(_LENGTH, model.context or _LENGTH)
    rows = -(-len(_POINTS) // length)
    tokens, _ = probe_tokens(getattr(bare.module, "config", None), model.vocabulary, rows, length, model.device)
    device = model.device.type
    quiet = torch.compiler.set_stance("force_eager"), torch.autocast(device, enabled=False)
    reason = "no layer was found that maps hidden states to logits"
    with isolate_rng(), evaluating(bare.module), quiet[0], quiet[1]:
        logits, calls = _observed(bare, tokens)
        for call in calls[:_TRIALS]:
            try:
                return _tried(bare, tokens, logits, call)
            except WholeLogitsError as error:
                reason = str(error)
            except Exception as error:  # whatever the model's own code raises if the head returns one number
                reason = f"with one number in the place of the head's outputs, it raised {shown(error)}"
    raise WholeLogitsError(reason)


def _observed(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, list[_Call]]:
    """The logits of some tokens, and the calls that may have been the head's, the last one first.

    A wrapper that hands its input on as it is, such as that of an adapter, stands for the layer in it.
    """
    calls: list[_Call] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
        if not isinstance(output, Tensor) or len(given) != 1 or not given[0].is_floating_point():
            return
        if given[0].shape[:2] != tokens.shape or output.shape[:2] != tokens.shape or given[0].dim() != 3:
            return
        if output.dim() == 3 and output.shape[2] >= model.vocabulary:
            # A wrapper's call ends after that of the layer in it.
            calls[:] = [call for call in calls if not (call.hidden is given[0] and _holds(module, call.module))]
            calls.append(_Call(module, given[0], output))

    parts = [part for part in model.module.modules() if part is not model.module]
    handles = [part.register_forward_hook(look, with_kwargs=True) for part in parts]
    try:
        logits = model.logits(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return logits, calls[::-1]


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(part is other for other in module.modules())


def _tried(model: LanguageModel, tokens: Tensor, logits: Tensor, call: _Call) -> OutputHead:
    """The head that made a call, if it reproduces the logits."""
    exact = torch.float32 if tokens.device.type == "mps" else torch.float64
    points = torch.tensor(_POINTS, dtype=exact, device=tokens.device)
    points = points.repeat(-(-tokens.numel() // len(points)))[: tokens.numel()].view(*tokens.shape, 1)
    bare = OutputHead(call.module, model.vocabulary, LogitTransform())
    with torch.enable_grad():
        seen = bare.call_with(model, lambda model: model.logits(tokens), lambda _: points)
    if seen.requires_grad:  # it will be another, and takes a gradient of its own
        raise WholeLogitsError(f"what follows its layer {type(call.module).__name__} has weights that train")
    coarsest, finest = max(eps := [torch.finfo(part.dtype).eps for part in (call.output, logits, seen)]), eps[2]
    transform = None
    if seen.shape == points.shape:  # some models convert to their own type before or after a scale
        transform = _transform_of(points, seen, 8 * finest) or _transform_of(points, seen, 2 * coarsest)
    if transform is None:
        raise WholeLogitsError(
            f"what follows its layer {type(call.module).__name__} is no scale and no bound on each output"
        )
    if call.output.shape[2] != model.vocabulary:
        transform = dataclasses.replace(transform, vocabulary=model.vocabulary)
    head = OutputHead(call.module, model.vocabulary, transform)

    def in_chunks(given: HiddenStates) -> Tensor:
        return torch.cat([chunk.clone() for _, chunk in chunk_logits(given.head, given.states)])

    ours = head.run(model, lambda model: model.logits(tokens), in_chunks).view_as(logits)
    # Sums of n products are off by about sqrt(n) * eps / 2; those of 16-bit types are rounded once.
    allowed = (64 if coarsest <= torch.finfo(torch.float32).eps else 8) * coarsest * float(logits.abs().max())
    off = float((ours.double() - logits.double()).abs().max())
    if not off <= allowed:
        raise WholeLogitsError(
            f"its layer {type(call.module).__name__} gives logits that are off by {off:.1e}; rounding explains "
            f"{allowed:.1e}"
        )
    return head


def _transform_of(points: Tensor, seen: Tensor, eps: float) -> LogitTransform | None:
    """The scale and the bound that map some numbers to others; None if none does."""
    made = dict(zip(points.flatten().tolist(), seen.flatten().tolist(), strict=True))
    scale, bound, slope = made[1.0], abs(made[_POINTS[-2]]), made[_POINTS[0]] / _POINTS[0]
    if not all(map(math.isfinite, made.values())) or not scale or not slope or not bound:
        return None
    slope = 1.0 if abs(slope - 1) < 1e-6 else slope  # a bound bends even the smallest number a little
    for candidate in (LogitTransform(scale), LogitTransform(slope, bound)):
        expected = candidate(points.double())
        if bool(((expected - seen.double()).abs() <= eps * expected.abs()).all()):
            return candidate
    return None


def _linear_in(module: Any, outermost: bool = False) -> nn.Linear | None:
    """The plain linear layer that a module amounts to now, if it does.

    A PEFT adapter that is switched off leaves the layer under it, and ``modules_to_save`` stands for one of its copies.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    if hooked and not outermost:  # those of the outermost module run
        return None
    if hasattr(module, "base_layer") and hasattr(module, "disable_adapters"):
        return _linear_in(module.base_layer) if module.disable_adapters and not module.merged else None
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = module.active_adapters
        if module.disable_adapters or any(name not in module.modules_to_save for name in active):
            return _linear_in(module.original_module)
        return _linear_in(module.modules_to_save[active[0]]) if len(active) == 1 else None
    return module if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward else None
