"""Reading rows as they grow with a model that keeps what it has read: its cache, and memory for it."""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from typing_extensions import override

from lightning_replay.models.calls import base_argument_names, find_logits, find_state, state_in, virtual_tokens

__all__ = ["CachedReader", "bytes_of_row"]


class CachedReader:
    """Reads each token of growing rows once, with the state that the model returned for the tokens before.

    Args:
        module: The model, in evaluation mode.
        vocabulary: Size of the last dimension of its logits.
        length: How many tokens the rows will have; keys and values get memory for them at the first read.
    """

    def __init__(self, module: nn.Module, vocabulary: int, length: int) -> None:
        self._module: Any = module
        self._vocabulary = vocabulary
        self._length = length
        # The head's output for a whole prompt takes many times the memory of the keys and values.
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in base_argument_names(module) else {}
        self._argument: str | None = None
        self._read = 0
        self.state: Any = None

    def read(self, tokens: Tensor) -> Tensor:
        """Logits of the last position, shape ``(rows, vocabulary)``.

        Args:
            tokens: The rows so far, shape ``(rows, tokens)``; what an earlier call has read is not read again.

        Raises:
            IndexError: If the rows have grown past ``length``.
            TypeError: If the model returns no state or no logits.
        """
        if tokens.shape[1] > self._length:
            raise IndexError(f"A reader of rows of {self._length} tokens was given rows of {tokens.shape[1]}.")
        unread, self._read = tokens[:, self._read :], tokens.shape[1]
        options = {} if self._argument is None else {self._argument: self.state}
        if unread.shape[1] > 1:
            options |= self._last_only
        output = self._module(unread, use_cache=True, **options)
        if self._argument is None:
            self._begin(output)
        else:
            self.state = state_in(output, self._argument)
        if self.state is None:
            raise TypeError(f"{type(self._module).__name__} returned no state that it takes back")
        return find_logits(output, self._vocabulary)[:, -1]

    def _begin(self, output: Any) -> None:
        """Find the state in the first output, once: asking for a signature takes as long as a small layer."""
        self._argument, state = find_state(self._module, output) or (None, None)
        self.state = _preallocated(state, self._length - self._read)
        if virtual_tokens(self._module):  # the state holds them: PEFT would put them before the next tokens again
            self._module = self._module.get_base_model()


def bytes_of_row(module: nn.Module, token: Tensor, length: int) -> int:
    """Bytes of the keys and values of one row that has grown to a length, what the model puts before it included.

    Args:
        module: The model, in evaluation mode.
        token: One token to read, shape ``(1, 1)``.
        length: Tokens in the row.
    """
    found = find_state(module, module(token, use_cache=True))
    total = 0
    for layer in _growing_layers(None if found is None else found[1]):
        for part in (layer.keys, layer.values):
            places = part.shape[-2]  # more than the one token, if the model puts a prefix before it
            total += part.nbytes // places * (places - 1 + length)
    return total


def _growing_layers(state: Any) -> list[DynamicLayer]:
    """The layers whose keys and values are copied at each new token; those of a sliding window keep their size."""
    layers = state.layers if isinstance(state, DynamicCache) else ()
    return [layer for layer in layers if type(layer) is DynamicLayer and layer.keys is not None]


def _preallocated(state: Any, more: int) -> Any:
    """The same state with memory for so many more tokens, so that a new token's keys and values copy no others."""
    growing = {id(layer) for layer in _growing_layers(state)}
    if growing:
        state.layers = [_PreallocatedLayer(each, more) if id(each) in growing else each for each in state.layers]
    return state


class _PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of an attention layer, with memory for a known number of tokens after those it holds.

    Past that it gets as much again. A slice past the end would be cut, and a write to it lost in a broadcast.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, filled: DynamicLayer, more: int) -> None:
        super().__init__()
        self.__dict__.update(vars(filled))
        self._memory = [self._with_room(part, more) for part in (filled.keys, filled.values)]
        self.keys, self.values = (memory[..., : filled.keys.shape[-2], :] for memory in self._memory)

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._memory[0].shape[-2]:  # a model may write more than one place for a token
            self._memory = [self._with_room(part, end) for part in (self.keys, self.values)]
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[..., start:end, :] = states
        self.keys, self.values = (memory[..., :end, :] for memory in self._memory)
        return self.keys, self.values

    @staticmethod
    def _with_room(part: Tensor, more: int) -> Tensor:
        memory = part.new_empty(*part.shape[:-2], part.shape[-2] + more, part.shape[-1])
        memory[..., : part.shape[-2], :] = part
        return memory
