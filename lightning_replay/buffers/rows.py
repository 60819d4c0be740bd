"""Rows of tokens to replay."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ReplayRows"]


class ReplayRows(NamedTuple):
    """Rows of tokens, padded on the right to one length.

    Attributes:
        tokens: Token ids, shape ``(rows, length)``, ``int64``. What stands past a row's length is padding.
        lengths: Number of real tokens in each row, shape ``(rows,)``, ``int64``.
        targets: True on the tokens that a replay loss is taken on, shape ``(rows, length)``; None for all real ones.
        top_ids: The reference's likeliest next tokens after each token but the last, shape
            ``(rows, length - 1, k)``; None where they are not cached.
        top_log_probs: Their log-probabilities and, last, that of all other tokens together, shape
            ``(rows, length - 1, k + 1)``.
        uses: How often each row has been drawn, this time included, shape ``(rows,)``; None outside a buffer.
        steps: The optimizer step at which each row was added, shape ``(rows,)``; None outside a buffer.

    Example:
        >>> rows = ReplayRows(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2]))
        >>> rows.mask
        tensor([[ True,  True,  True],
                [ True,  True, False]])
        >>> rows.targets_mask
        tensor([[ True,  True],
                [ True, False]])
    """

    tokens: Tensor
    lengths: Tensor
    targets: Tensor | None = None
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None
    uses: Tensor | None = None
    steps: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """True on real tokens, shape ``(rows, length)``."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths.unsqueeze(1)

    @property
    def targets_mask(self) -> Tensor:
        """True where the next token is a target, shape ``(rows, length - 1)``: the positions a loss is taken at."""
        mask = self.mask if self.targets is None else self.mask & self.targets
        return mask[:, 1:]

    @classmethod
    def cat(cls, parts: Sequence["ReplayRows"]) -> "ReplayRows":
        """Rows one after another, padded to the length of the longest; what one part lacks, the whole lacks."""
        length = max(part.tokens.shape[1] for part in parts)
        columns = zip(*(part.widened(length) for part in parts), strict=True)
        return cls(*(None if any(part is None for part in column) else torch.cat(column) for column in columns))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "ReplayRows":
        """The same rows on ``device``."""
        return ReplayRows(*(part if part is None else part.to(device, non_blocking=True) for part in self))  # type: ignore[arg-type]

    def take(self, rows: Tensor) -> "ReplayRows":
        """Some of the rows, by their numbers or by a mask of shape ``(rows,)``."""
        return ReplayRows(*(part if part is None else part[rows] for part in self))  # type: ignore[arg-type]

    def widened(self, length: int) -> "ReplayRows":
        """The same rows, padded to ``length`` tokens."""
        missing = length - self.tokens.shape[1]
        if not missing:
            return self
        return self._replace(
            tokens=F.pad(self.tokens, (0, missing)),
            targets=None if self.targets is None else F.pad(self.targets, (0, missing)),
            top_ids=None if self.top_ids is None else F.pad(self.top_ids, (0, 0, 0, missing)),
            top_log_probs=None if self.top_log_probs is None else F.pad(self.top_log_probs, (0, 0, 0, missing)),
        )
