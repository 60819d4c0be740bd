"""A 16-bit model computing in 32 bits for a while, without a second copy of its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["can_widen", "widened"]

_NARROW = (torch.bfloat16, torch.float16)


def can_widen(module: nn.Module) -> bool:
    """Whether a model has 16-bit weights and nothing but plain floating-point weights.

    Not for sharded and quantized weights, nor for flash attention, which computes in 16 bits whatever it is given.
    """
    weights = [*module.parameters(), *module.buffers()]
    attention = str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
    plain = all(type(weight) in (nn.Parameter, Tensor) for weight in weights)
    floating = all(weight.is_floating_point() for weight in module.parameters())
    return plain and floating and "flash" not in attention and any(weight.dtype in _NARROW for weight in weights)


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Hold 16-bit weights in 32 bits, those of a layer only for as long as the layer runs.

    A layer is an item of an outermost ``nn.ModuleList``, as the blocks of a transformer are; the rest is held in 32
    bits all the time. The weights that are put back are the very tensors that were there.
    """
    layers: list[nn.Module] = []
    names: list[str] = []
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
            layers.extend(child)
    in_layers = {id(weight) for layer in layers for weight in _weights(layer)}
    saved: dict[int, list[tuple[Tensor, Tensor]]] = {}
    rest = _widen([weight for weight in _weights(module) if id(weight) not in in_layers])

    def enter(layer: nn.Module, *_: Any) -> None:
        saved.setdefault(id(layer), []).extend(_widen(_weights(layer)))

    def leave(layer: nn.Module, *_: Any) -> None:
        _restore(saved.pop(id(layer), []))

    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for kept in saved.values():
            _restore(kept)
        _restore(rest)


def _weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _widen(weights: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Widen the 16-bit ones in place; return them with what they were."""
    narrow = [(weight, weight.data) for weight in weights if weight.dtype in _NARROW]
    for weight, data in narrow:
        weight.data = data.float()
    return narrow


def _restore(narrow: list[tuple[Tensor, Tensor]]) -> None:
    for weight, data in narrow:
        weight.data = data
