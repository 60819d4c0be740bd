"""Which tokens a batch asks a causal language model for: labels checked against the tokens they stand for."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORED", "checked_labels", "find_marker", "following"]

IGNORED = -100
"""The label of positions without a loss, as PyTorch and Hugging Face have it."""


def checked_labels(
    tokens: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    *,
    shifted: bool,
    vocabulary: int | None = None,
    ignore_index: int | None = None,
    advice: str = "",
) -> Tensor:
    """The labels of a batch, ``IGNORED`` where they leave a position out, if every other one holds its token.

    A label leaves its position out if it is negative, not in the vocabulary, ``ignore_index``, or the value that
    ``find_marker`` finds. Not checked are the label of a row's first token, on which no loss is taken, and the last
    target of a row that was shifted, which is not among the row's tokens.

    Args:
        tokens: Token ids, shape ``(rows, length)``.
        labels: One label for each token, of the same shape.
        mask: Zero on padding, of the same shape; None if nothing marks padding.
        shifted: Whether ``labels[:, t]`` is the token after ``tokens[:, t]``, or ``tokens[:, t]`` itself.
        vocabulary: The number of token ids; labels from there on are left out. None if it is not known.
        ignore_index: A label that is left out; by default it is found.
        advice: What ends the error message.

    Raises:
        ValueError: If a label is left in and is not the token that it stands for.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7]])
        >>> checked_labels(tokens, torch.tensor([[-1, 6, 7]]), None, shifted=False)
        tensor([[-100,    6,    7]])
    """
    labels = labels.long()
    left_out = _left_out(labels, mask, shifted, vocabulary)
    if ignore_index is not None:
        left_out = left_out | (labels == ignore_index)
    wrong = _wrong(tokens, labels, left_out, shifted)
    if bool(wrong.any()):
        marker = None if ignore_index is not None else find_marker(tokens, labels, mask, shifted, vocabulary)
        if marker is None:
            raise ValueError(f"{_diagnosis(tokens, labels, left_out, shifted)}{advice}")
        left_out = left_out | (labels == marker)
    return labels.masked_fill(left_out, IGNORED)


def find_marker(
    tokens: Tensor, labels: Tensor, mask: Tensor | None, shifted: bool, vocabulary: int | None = None
) -> int | None:
    """The one token id that labels use to leave positions out, as with ``ignore_index=tokenizer.pad_token_id``.

    A token id counts only if it is the label of every position whose label is not its token, and if it also marks
    padding: where ``mask`` is zero, or, if nothing marks padding, as the token that occurs only at the ends of rows.

    Args:
        tokens: Token ids, shape ``(rows, length)``.
        labels: One label for each token, of the same shape.
        mask: Zero on padding; None if nothing marks padding.
        shifted: Whether ``labels[:, t]`` is the token after ``tokens[:, t]``, or ``tokens[:, t]`` itself.
        vocabulary: The number of token ids, if it is known.

    Returns:
        The token id, or None if there is none.
    """
    labels = labels.long()
    wrong = _wrong(tokens, labels, _left_out(labels, mask, shifted, vocabulary), shifted)
    values = torch.unique((labels[:, :-1] if shifted else labels[:, 1:])[wrong])
    if len(values) != 1:
        return None
    padding = None if mask is None else mask == 0
    if padding is not None and bool(padding.any()):
        return int(values) if bool((labels[padding] == values).all()) else None
    # A single token at the beginning of a row may be the start token, so an end of two tokens is needed.
    found = tokens == values
    ends = found.long().cumprod(1).bool() | found.long().flip(1).cumprod(1).flip(1).bool()
    is_padding = bool((found == ends).all()) and int(ends.sum(1).max()) > 1
    return int(values) if is_padding else None


def following(labels: Tensor) -> Tensor:
    """The labels of the next tokens, ``IGNORED`` at the end of a row.

    Example:
        >>> following(torch.tensor([[1, 2, 3]]))
        tensor([[   2,    3, -100]])
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _left_out(labels: Tensor, mask: Tensor | None, shifted: bool, vocabulary: int | None) -> Tensor:
    left_out = labels < 0
    if vocabulary is not None:
        left_out = left_out | (labels >= vocabulary)
    if mask is not None and not shifted:
        left_out = left_out | (mask == 0)
    return left_out


def _wrong(tokens: Tensor, labels: Tensor, left_out: Tensor, shifted: bool) -> Tensor:
    """True where a label that is left in is not its token, shape ``(rows, length - 1)``."""
    if not shifted:
        return (labels[:, 1:] != tokens[:, 1:]) & ~left_out[:, 1:]
    # The last token of a row that was shifted before it was padded is among the targets alone, so it is not checked.
    padding = left_out | ((labels == tokens) & (tokens == tokens[:, -1:]))
    is_last = padding.flip(1).long().cumprod(1).flip(1)[:, 1:].bool() & ~padding[:, :-1]
    return (labels[:, :-1] != tokens[:, 1:]) & ~left_out[:, :-1] & ~is_last


def _diagnosis(tokens: Tensor, labels: Tensor, left_out: Tensor, shifted: bool) -> str:
    """What labels that are not their tokens hold instead, and how to pass it."""
    left_in = ~left_out

    def share(labels: Tensor, tokens: Tensor, left_in: Tensor) -> float:
        return float((labels == tokens)[left_in].double().mean()) if bool(left_in.any()) else 0.0

    same = share(labels, tokens, left_in)
    after = share(labels[:, :-1], tokens[:, 1:], left_in[:, :-1])
    before = share(labels[:, 1:], tokens[:, :-1], left_in[:, 1:])
    name = "targets" if shifted else "labels"
    found = (
        f"The batch's `{name}` are not the tokens that the model is to predict: of {int(left_in.sum())} positions that "
        f"they leave in, {same:.0%} have the token at the same position, {after:.0%} the token after it and "
        f"{before:.0%} the token before it; a batch with `{name}` has "
        f"{'the token after it' if shifted else 'the token at the same position'} at all of them. "
    )
    if set(labels[left_in].tolist()) <= {0, 1} < set(tokens[left_in].tolist()) | {0, 1}:
        return found + (
            "They look like a mask: a batch with a mask is {'input_ids': tokens, 'attention_mask': mask}, with "
            "`labels` of the tokens themselves, and -100 where no loss is taken."
        )
    if shifted and same > max(after, before):
        return found + (
            "They are not shifted: pass {'input_ids': tokens, 'labels': targets}, or the pair (row[:-1], row[1:])."
        )
    if shifted and before > after:
        return found + "The pair seems to be in the wrong order: pass (tokens, targets)."
    if not shifted and after > max(same, before):
        return found + (
            "They are already shifted: pass the pair (input_ids, labels), or `labels` that are a copy of `input_ids` "
            "with -100 where no loss is taken, as the causal models of Hugging Face take them."
        )
    copies = "the row one token on" if shifted else "a copy of `input_ids`"
    return found + (
        f"Set `{name}` to {copies}, with -100 where no loss is taken. Labels of masked language models, and labels "
        "for inputs that were changed, can't be used for next-token prediction."
    )
