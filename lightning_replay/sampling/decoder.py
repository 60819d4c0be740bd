"""Next-token logits of rows that grow: token by token if the model has a cache, else from the start of the row."""

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor

from lightning_replay.models.cache import CachedReader, bytes_of_row
from lightning_replay.models.language_model import LanguageModel

__all__ = ["Decoder", "rows_at_a_time"]

_MEMORY = {"share": 0.125, "cpu": 2**30}
"""What decoding may take: a share of a device's memory, or bytes on a CPU."""
_MOST_ROWS = 256
"""Rows past which decoding gets no faster."""


class Decoder:
    """Reads rows as they grow and returns the next token's logits.

    Args:
        model: The model, in evaluation mode.
        length: How long the rows will be.
    """

    def __init__(self, model: LanguageModel, length: int) -> None:
        self._model = model = model.uncompiled  # rows that grow would have it compiled anew on the way
        self._reader = CachedReader(model.module, model.vocabulary, length) if model.has_cache else None

    def next_logits(self, tokens: Tensor) -> Tensor:
        """The next token's logits in 32-bit floats, shape ``(rows, vocabulary)``.

        Args:
            tokens: The rows so far, shape ``(rows, tokens)``; what an earlier call has read is not read again.
        """
        logits = self._model.logits(tokens)[:, -1] if self._reader is None else self._reader.read(tokens)
        return logits.float()


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
