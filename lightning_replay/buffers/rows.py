"""Rows of tokens to replay."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_replay.utilities.validation import are_ids, is_integer

__all__ = ["ReplayRows", "checked_rows", "pack_tokens", "unpack_tokens"]

_LARGEST_TOKEN = 2**31 - 1


class ReplayRows(NamedTuple):
    """Rows of tokens, padded on the right to one length.

    Attributes:
        tokens: Token ids, shape ``(rows, length)``, ``int64``. Everything past a row's length is padding.
        lengths: Number of real tokens in each row, shape ``(rows,)``, ``int64``.
        targets: True on the tokens that contribute to a replay loss, shape ``(rows, length)``; None for all real ones.
        top_ids: The reference's likeliest next tokens after each token but the last, shape
            ``(rows, length - 1, k)``; None if they are not cached.
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
    def target_tokens(self) -> Tensor:
        """True on real tokens that are targets, shape ``(rows, length)``."""
        return self.mask if self.targets is None else self.mask & self.targets

    @property
    def targets_mask(self) -> Tensor:
        """True on positions whose next token is a target, shape ``(rows, length - 1)``: those of a loss."""
        return self.target_tokens[:, 1:]

    @classmethod
    def cat(cls, parts: Sequence["ReplayRows"]) -> "ReplayRows":
        """Concatenate rows, padded to the longest.

        Targets that are None in one part are its real tokens; any other field that is None in one part is None in the
        result.
        """
        length = max(part.tokens.shape[1] for part in parts)
        if any(part.targets is not None for part in parts):
            parts = [part._replace(targets=part.target_tokens) for part in parts]
        columns = zip(*(part.widened(length) for part in parts), strict=True)
        return cls(*(None if any(part is None for part in column) else torch.cat(column) for column in columns))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "ReplayRows":
        """The same rows on ``device``."""
        # Without blocking, a copy from an accelerator could be read on the CPU before it is there.
        ahead = device.type != "cpu"
        return ReplayRows(*(part if part is None else part.to(device, non_blocking=ahead) for part in self))  # type: ignore[arg-type]

    def take(self, rows: Tensor) -> "ReplayRows":
        """Some of the rows, selected by index or by a mask of shape ``(rows,)``."""
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


def checked_rows(rows: ReplayRows, length: int, top_k: int) -> ReplayRows:
    """Refuse rows that a buffer can't store.

    Args:
        rows: The rows to store.
        length: Tokens in a row of the buffer.
        top_k: Number of log-probabilities that the buffer stores with each position, the tail's excluded.

    Returns:
        The rows on the CPU, their tokens as ``int64``.

    Raises:
        ValueError: If the shapes don't fit, an id is negative or takes more than 31 bits, a length is outside
            ``[1, length]``, or the number of log-probabilities isn't ``top_k``.
    """
    if any(part is not None and part.is_meta for part in rows):
        raise ValueError("The buffer stores tensors that hold data; got one on the `meta` device, which holds none.")
    rows = rows.to(torch.device("cpu"))
    tokens, lengths = rows.tokens, rows.lengths
    if not are_ids(tokens) or not 1 <= tokens.shape[1] <= length:
        raise ValueError(
            f"The buffer takes integer ids of shape (rows, up to {length}); "
            f"got {tokens.dtype} of shape {tuple(tokens.shape)}."
        )
    tokens = tokens.long()
    if tokens.numel() and int(tokens.min()) < 0:
        raise ValueError(f"Token ids are at least 0; got {int(tokens.min())}.")
    if tokens.numel() and int(tokens.max()) > _LARGEST_TOKEN:
        raise ValueError(f"The buffer stores token ids in 31 bits, up to {_LARGEST_TOKEN}; got {int(tokens.max())}.")
    if lengths.shape != tokens.shape[:1] or not is_integer(lengths):
        raise ValueError(
            f"`lengths` has a whole number for each of {len(tokens)} rows; "
            f"got {lengths.dtype} of shape {tuple(lengths.shape)}."
        )
    if lengths.numel() and not (int(lengths.min()) >= 1 and int(lengths.max()) <= tokens.shape[1]):
        raise ValueError(f"The lengths of these rows lie between 1 and {tokens.shape[1]}; got {lengths.tolist()}.")
    if rows.targets is not None and (rows.targets.shape != tokens.shape or rows.targets.dtype != torch.bool):
        raise ValueError(
            f"`targets` is a boolean tensor of the tokens' shape {tuple(tokens.shape)}; "
            f"got {rows.targets.dtype} of shape {tuple(rows.targets.shape)}."
        )
    _check_cached(rows, top_k)
    return rows._replace(tokens=tokens)


def _check_cached(rows: ReplayRows, top_k: int) -> None:
    cached = 0 if rows.top_ids is None else rows.top_ids.shape[-1]
    if cached != top_k:
        raise ValueError(f"The buffer stores {top_k} log-probabilities per position; the rows have {cached}.")
    if rows.top_ids is None:
        return
    positions = (len(rows.tokens), rows.tokens.shape[1] - 1)
    given = None if rows.top_log_probs is None else tuple(rows.top_log_probs.shape)
    if rows.top_ids.shape[:-1] != positions or given != (*positions, cached + 1):
        raise ValueError(
            f"`top_ids` has shape {(*positions, cached)} and `top_log_probs` {(*positions, cached + 1)}; "
            f"got {tuple(rows.top_ids.shape)} and {given}."
        )


def pack_tokens(tokens: Tensor, targets: Tensor) -> Tensor:
    """Store the targets' mask in the sign of the tokens, so that it takes no memory of its own.

    Args:
        tokens: Token ids of at least 0.
        targets: True on targets, the tokens' shape.

    Returns:
        Targets as they are, other tokens as their bitwise complement, which is negative.

    Example:
        >>> packed = pack_tokens(torch.tensor([5, 0, 7]), torch.tensor([True, False, False]))
        >>> packed, unpack_tokens(packed)
        (tensor([ 5, -1, -8]), (tensor([5, 0, 7]), tensor([ True, False, False])))
    """
    return torch.where(targets, tokens, ~tokens)


def unpack_tokens(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and targets of what ``pack_tokens`` returned."""
    return torch.where(packed < 0, ~packed, packed), packed >= 0
