"""A copy whose weights stay on another device, such as the CPU, and are fetched module by module when it is called."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.models import FrozenCopy

__all__ = ["OffloadedCopy"]


class OffloadedCopy(FrozenCopy):
    """A frozen copy whose weights are on another device than its forward.

    Where the model runs, there are the weights of the module that computes and of the next one, which is fetched
    meanwhile. On CUDA the weights are in pinned memory and fetched in a stream of their own. A token that is sampled
    takes all weights over the bus once, whatever the number of rows, so sample many rows at a time.

    While it is made, the whole copy is where the model is.

    Args:
        model: The model to copy.
        dtype: As for ``FrozenCopy``.
        device: Where the weights stay.
        quantize: As for ``FrozenCopy``.

    Raises:
        MisconfigurationException: As for ``FrozenCopy``.
    """

    def __init__(
        self,
        model: LanguageModel,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        quantize: str | None = None,
    ) -> None:
        runs_on = model.device
        super().__init__(model.uncompiled, dtype, device, quantize)
        self._model = replace(self._model, runs_on=runs_on)
        self._fetching = _Fetching(self._model.module, runs_on)


class _Fetching:
    """Gives each module its weights on the device for as long as its forward runs."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._homes: dict[nn.Module, dict[str, Tensor]] = {}
        self._next: dict[nn.Module, nn.Module] = {}
        """Which module was called after each one in the last forward."""
        self._last: nn.Module | None = None
        self._ahead: dict[nn.Module, dict[str, Tensor]] = {}
        pinned: dict[Tensor, Tensor] = {}
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        if tensor not in pinned:  # tied weights stay tied
                            pinned[tensor] = self._pinned(tensor)
                        held[name] = pinned[tensor]  # type: ignore[assignment]
            if any(tensor is not None for tensor in (*part._parameters.values(), *part._buffers.values())):
                part.register_forward_pre_hook(self._before)
                part.register_forward_hook(self._after, always_call=True)
        module.register_forward_hook(self._end, always_call=True)

    def _end(self, *_: Any) -> None:
        """Drop what was fetched ahead and not used."""
        self._last = None
        self._ahead.clear()

    def _pinned(self, tensor: Tensor) -> Tensor:
        wraps_others = is_traceable_wrapper_subclass(tensor)
        if self._stream is None or tensor.device.type != "cpu" or wraps_others:
            return tensor
        home = tensor.detach().pin_memory()
        return nn.Parameter(home, requires_grad=False) if isinstance(tensor, nn.Parameter) else home

    def _before(self, part: nn.Module, args: Any) -> None:
        fetched = self._ahead.pop(part, None) or self._fetch(part)
        if self._stream is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(self._stream)
            for tensor in fetched.values():
                for each in _plain_parts(tensor):
                    each.record_stream(now)
        self._homes[part] = {}
        for held in (part._parameters, part._buffers):
            for name in fetched.keys() & held.keys():
                self._homes[part][name] = held[name]  # type: ignore[assignment]
                held[name] = fetched[name]  # type: ignore[assignment]
        if self._last is not None:
            self._next[self._last] = part
        self._last = part
        following = self._next.get(part)
        if following is not None and following not in self._ahead and following not in self._homes:
            self._ahead[following] = self._fetch(following)

    def _after(self, part: nn.Module, args: Any, output: Any) -> None:
        homes = self._homes.pop(part, {})
        for held in (part._parameters, part._buffers):
            for name in homes.keys() & held.keys():
                held[name] = homes[name]  # type: ignore[assignment]

    def _fetch(self, part: nn.Module) -> dict[str, Tensor]:
        fetched = {}
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for name, tensor in (*part._parameters.items(), *part._buffers.items()):
                if tensor is not None:
                    there = tensor.detach().to(self._device, non_blocking=True, copy=True)
                    fetched[name] = nn.Parameter(there, False) if isinstance(tensor, nn.Parameter) else there
        return fetched


def _plain_parts(tensor: Any) -> list[Tensor]:
    """The tensors that a quantized weight holds, which has no stream of its own; of any other, itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]
