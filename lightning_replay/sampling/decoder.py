"""Next-token logits of rows that grow: token by token where the model keeps what it has read, else from the start."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor, nn
from transformers.cache_utils import StaticCache

from lightning_replay.models.cache import CachedReader, bytes_of_row
from lightning_replay.models.calls import state_argument, virtual_tokens
from lightning_replay.models.language_model import LanguageModel

__all__ = ["Decoder", "rows_at_a_time"]

_MEMORY = {"share": 0.125, "cpu": 2**30}
"""What decoding may take: a share of a device's memory, or bytes on a CPU."""
_MOST_ROWS = 256
"""Rows past which decoding gets no faster."""
_COMPILED: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()


class Decoder:
    """Reads rows as they grow and returns the next token's logits.

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
        self._reader: CachedReader | None = None
        if compiled:
            state = _static(model, length)
            self._reader = CachedReader(model.module, model.vocabulary, length, _compiled(model.module), state)
        elif model.has_cache:
            self._reader = CachedReader(model.module, model.vocabulary, length)

    def next_logits(self, tokens: Tensor) -> Tensor:
        """The next token's logits in 32-bit floats, shape ``(rows, vocabulary)``.

        Args:
            tokens: The rows so far, shape ``(rows, tokens)``; what an earlier call has read is not read again.
        """
        logits = self._model.logits(tokens) if self._reader is None else self._reader.read(tokens)
        return logits[:, -1].float()


def rows_at_a_time(model: LanguageModel, length: int) -> int:
    """How many rows of a length to decode together: as many as pay and as memory is meant for.

    The same on every run on one kind of device, so that samples are too.

    Args:
        model: The model, in evaluation mode.
        length: Tokens in a row.
    """
    row_bytes = 16 * model.vocabulary  # logits and what is drawn from them
    if model.has_cache:
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        try:
            row_bytes += bytes_of_row(model.uncompiled.module, token, length)
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
            return 1
    if model.device.type == "cuda":
        memory = _MEMORY["share"] * torch.cuda.get_device_properties(model.device).total_memory
    else:
        memory = _MEMORY["cpu"]
    return int(min(_MOST_ROWS, max(1, memory // row_bytes)))


def _static(model: LanguageModel, length: int) -> StaticCache:
    """Keys and values of a fixed size, yet to be filled."""
    takes_keys = state_argument(model.module) in ("cache", "past_key_values")
    if not model.has_cache or not takes_keys or virtual_tokens(model.module):
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
