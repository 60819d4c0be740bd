"""Next-token logits of rows that grow: token by token where the model keeps what it has read, else from the start."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache
from typing_extensions import override

from lightning_replay.models.language_model import LanguageModel, state_argument

__all__ = ["Decoder", "rows_at_a_time"]

_MEMORY = {"share": 0.125, "cpu": 2**30}
"""What decoding may take: a share of a device's memory, or bytes on a CPU."""
_MOST_ROWS = 256
"""Rows past which decoding gets no faster."""
_COMPILED: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()


class Decoder:
    """Reads rows as they grow and says what may come next.

    Args:
        model: The model, in evaluation mode.
        length: How long the rows will be.
        compiled: Whether `torch.compile` makes the forward, over keys and values of a fixed size; with CUDA graphs on a
            device that has them. The first rows of each shape wait for the compiler.

    Raises:
        MisconfigurationException: If ``compiled`` and the model takes no keys and values of a fixed size.
    """

    def __init__(self, model: LanguageModel, length: int, compiled: bool = False) -> None:
        self._model = model = model.uncompiled  # rows that grow would have it compiled anew on the way
        self._length = length
        self._argument = state_argument(model.module) if model.has_cache else None
        self._state: Any = None
        self._read = 0
        self._forward: Callable[..., Any] = model.module
        if compiled:
            self._forward, self._state = _compiled(model.module), _static(model, length)

    def next_logits(self, tokens: Tensor) -> Tensor:
        """The next token's logits in 32-bit floats, shape ``(rows, vocabulary)``.

        Args:
            tokens: The rows so far, shape ``(rows, tokens)``; what an earlier call has read is not read again.
        """
        if self._argument is None:
            return self._model.logits(tokens)[:, -1].float()
        unread, self._read = tokens[:, self._read :], tokens.shape[1]
        if self._state is None:
            output = self._forward(unread, use_cache=True)
            self._state = _preallocated(getattr(output, self._argument), self._length)
        else:
            output = self._forward(unread, use_cache=True, **{self._argument: self._state})
            self._state = getattr(output, self._argument)
        logits: Tensor = output.logits[:, -1].float()
        return logits


def rows_at_a_time(model: LanguageModel, length: int) -> int:
    """How many rows of a length to decode together: as many as pay and as memory is meant for.

    The same on every run on one kind of device, so that samples are too.

    Args:
        model: The model, in evaluation mode.
        length: Tokens in a row.
    """
    bytes_of_row = 16 * model.vocabulary  # logits and what is drawn from them
    if model.has_cache:
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        try:
            state = getattr(model.uncompiled.module(token, use_cache=True), str(state_argument(model.module)))
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
            return 1
        layers = state.layers if isinstance(state, DynamicCache) else ()
        kept = [part for layer in layers if type(layer) is DynamicLayer for part in (layer.keys, layer.values)]
        bytes_of_row += sum(part.nbytes for part in kept) * length
    if model.device.type == "cuda":
        memory = _MEMORY["share"] * torch.cuda.get_device_properties(model.device).total_memory
    else:
        memory = _MEMORY["cpu"]
    return int(min(_MOST_ROWS, max(1, memory // bytes_of_row)))


def _static(model: LanguageModel, length: int) -> StaticCache:
    """Keys and values of a fixed size, yet to be filled."""
    if not model.has_cache or state_argument(model.module) not in ("cache", "past_key_values"):
        raise MisconfigurationException(
            "`compile_sampling=True` decodes a Hugging Face model with keys and values of a fixed size, which "
            f"{type(model.module).__name__} doesn't take. Leave it out."
        )
    config: Any = model.module.config
    return StaticCache(config=config, max_cache_len=length)


def _compiled(module: nn.Module) -> Callable[..., Any]:
    """The module's forward, compiled once for as long as the module lives."""
    if module not in _COMPILED:
        mode = "reduce-overhead" if torch.cuda.is_available() else "default"
        weakly = weakref.ref(module)  # a forward that held the module would keep it for ever

        def forward(*args: Any, **kwargs: Any) -> Any:
            alive = weakly()
            assert alive is not None
            return alive(*args, **kwargs)

        _COMPILED[module] = torch.compile(forward, mode=mode)
    return _COMPILED[module]


def _preallocated(state: Any, length: int) -> Any:
    """The same state; keys and values that would be copied at each new token get memory for the whole row instead."""
    if isinstance(state, DynamicCache):
        for number, layer in enumerate(state.layers):
            if type(layer) is DynamicLayer:  # others, such as those of a sliding window, keep their size
                state.layers[number] = _PreallocatedLayer(layer, length)
    return state


class _PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of an attention layer in memory for rows of a known length."""

    keys: Tensor
    values: Tensor

    def __init__(self, filled: DynamicLayer, length: int) -> None:
        super().__init__()
        self.__dict__.update(vars(filled))
        self._memory = [self._with_room(part, length) for part in (filled.keys, filled.values)]
        self.keys, self.values = (memory[..., : filled.keys.shape[-2], :] for memory in self._memory)

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[..., start:end, :] = states
        self.keys, self.values = (memory[..., :end, :] for memory in self._memory)
        return self.keys, self.values

    @staticmethod
    def _with_room(part: Tensor, length: int) -> Tensor:
        memory = part.new_empty(*part.shape[:-2], length, part.shape[-1])
        memory[..., : part.shape[-2], :] = part
        return memory
