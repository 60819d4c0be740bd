"""Replay losses of hidden states and an output head, whose logits exist a chunk of positions at a time.

They compute what ``lightning_replay.losses`` compute of whole logits, value and gradients, in memory that grows with
the hidden states alone. A loss can be differentiated once: its gradients are computed with it and handed over.
"""

import torch
from torch import Tensor

from lightning_replay.head_chunks import (
    Compare,
    Head,
    LinearHead,
    LogitTransform,
    Place,
    Sweep,
    chunk_logits,
    chunked_sum,
)
from lightning_replay.losses import (
    _DIVERGENCES,
    _NEVER,
    Divergence,
    _check_temperature,
    _parts,
    divergence_from_top_k,
    top_k_log_probs,
)

__all__ = [
    "LogitTransform",
    "divergence_of_heads",
    "linear_divergence",
    "linear_divergence_from_top_k",
    "linear_next_token_loss",
    "linear_top_k_log_probs",
    "next_token_loss_of_head",
    "top_k_divergence_of_head",
    "top_k_of_head",
]

_IDENTITY = LogitTransform()


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    mask: Tensor | None = None,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    transform: LogitTransform = _IDENTITY,
    reference_transform: LogitTransform | None = None,
) -> Tensor:
    """Divergence from a reference to the model, in nats, averaged over positions, of hidden states and head weights.

    That of ``forward_kl``, ``reverse_kl`` or ``jensen_shannon`` for the logits ``transform(hidden @ weight.T + bias)``.

    Args:
        hidden: The model's hidden states, the input of its head, shape ``(rows, positions, width)``.
        weight: The weight of its head, shape ``(vocabulary, width)``; gradients flow into both.
        reference_hidden: The reference's hidden states, shape ``(rows, positions, reference width)``.
        reference_weight: The weight of its head, shape ``(vocabulary, reference width)``. No gradients flow here.
        bias: The bias of the model's head, shape ``(vocabulary,)``.
        reference_bias: That of the reference's.
        mask: True at the positions to average over, shape ``(rows, positions)``; all of them by default. The other
            positions take no work.
        kind: ``"forward"``: KL(π‖θ). ``"reverse"``: KL(θ‖π). ``"jensen_shannon"``: of both.
        temperature: Divides both logits.
        transform: What the model does between head and logits.
        reference_transform: What the reference does; by default the same.

    Returns:
        A scalar, zero if the mask selects nothing. It can be differentiated once.

    Raises:
        ValueError: If the shapes don't match or ``temperature`` is not above 0.

    Example:
        >>> hidden, weight = torch.tensor([[[1.0, 3.0]]]).log(), torch.eye(2)  # probabilities 1/4 and 3/4
        >>> linear_divergence(hidden, weight, torch.zeros(1, 1, 2), weight)  # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75)
        tensor(0.1438)
    """
    reference_transform = transform if reference_transform is None else reference_transform
    return divergence_of_heads(
        hidden,
        LinearHead(weight, bias, transform),
        reference_hidden,
        LinearHead(reference_weight, reference_bias, reference_transform),
        mask,
        kind,
        temperature,
    )


def linear_next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    transform: LogitTransform = _IDENTITY,
) -> Tensor:
    """Cross-entropy of the targets, in nats a token, averaged over positions, of hidden states and the head's weight.

    That of ``next_token_loss`` for the logits ``transform(hidden @ weight.T + bias)``. Nothing is shifted.

    Args:
        hidden: Hidden states, the input of the head, shape ``(rows, positions, width)``.
        weight: The weight of the head, shape ``(vocabulary, width)``.
        targets: Token ids, shape ``(rows, positions)``.
        bias: The bias of the head, shape ``(vocabulary,)``.
        mask: As for ``linear_divergence``.
        transform: What the model does between head and logits.

    Returns:
        A scalar, zero if the mask selects nothing. It can be differentiated once.

    Raises:
        ValueError: If the shapes don't match.

    Example:
        >>> linear_next_token_loss(torch.ones(1, 3, 4), torch.zeros(2, 4), torch.tensor([[0, 1, 1]]))  # ln 2
        tensor(0.6931)
    """
    return next_token_loss_of_head(hidden, LinearHead(weight, bias, transform), targets, mask)


def linear_divergence_from_top_k(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    transform: LogitTransform = _IDENTITY,
) -> Tensor:
    """Divergence from a cached reference, of hidden states and the head's weight.

    That of ``divergence_from_top_k`` for the logits ``transform(hidden @ weight.T + bias)``.

    Args:
        hidden: Hidden states, the input of the head, shape ``(rows, positions, width)``.
        weight: The weight of the head, shape ``(vocabulary, width)``.
        ids: The reference's most likely tokens, shape ``(rows, positions, k)``.
        log_probs: Their log-probabilities and that of all other tokens, shape ``(rows, positions, k + 1)``.
        bias: The bias of the head, shape ``(vocabulary,)``.
        mask: As for ``linear_divergence``.
        kind: As for ``linear_divergence``.
        temperature: Divides the model's logits. Pass the one that the reference's were cached with.
        transform: What the model does between head and logits.

    Returns:
        A scalar, zero if the mask selects nothing. It can be differentiated once.

    Raises:
        ValueError: If the shapes don't match or ``temperature`` is not above 0.

    Example:
        >>> hidden, weight = torch.tensor([[[0.4, 0.3, 0.3]]]).log(), torch.eye(3)
        >>> cached = linear_top_k_log_probs(torch.tensor([[[0.5, 0.3, 0.2]]]).log(), weight, k=1)
        >>> linear_divergence_from_top_k(hidden, weight, *cached)
        tensor(0.0204)
    """
    return top_k_divergence_of_head(
        hidden, LinearHead(weight, bias, transform), ids, log_probs, mask, kind, temperature
    )


def linear_top_k_log_probs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    transform: LogitTransform = _IDENTITY,
) -> tuple[Tensor, Tensor]:
    """The ``k`` most likely tokens of each position and one bucket for all others, of hidden states and head weight.

    Those of ``top_k_log_probs`` for the logits ``transform(hidden @ weight.T + bias)``, without a graph.

    Args:
        hidden: Hidden states, the input of the head, shape ``(rows, positions, width)``.
        weight: The weight of the head, shape ``(vocabulary, width)``.
        k: How many tokens; no more than the vocabulary has.
        bias: The bias of the head, shape ``(vocabulary,)``.
        temperature: Divides the logits.
        transform: What the model does between head and logits.

    Returns:
        Token ids, shape ``(rows, positions, k)``, and log-probabilities, shape ``(rows, positions, k + 1)``.

    Raises:
        ValueError: If ``k`` is not from 1 to the vocabulary's size, or ``temperature`` not above 0.

    Example:
        >>> ids, log_probs = linear_top_k_log_probs(torch.tensor([[[0.5, 0.1, 0.4]]]).log(), torch.eye(3), k=1)
        >>> ids, log_probs.exp()
        (tensor([[[0]]]), tensor([[[0.5000, 0.5000]]]))
    """
    return top_k_of_head(hidden, LinearHead(weight, bias, transform), k, temperature)


def divergence_of_heads(
    hidden: Tensor,
    head: Head,
    reference_hidden: Tensor,
    reference_head: Head,
    mask: Tensor | None,
    kind: Divergence,
    temperature: float,
) -> Tensor:
    """``linear_divergence`` for heads of any kind."""
    _check_temperature(temperature)
    if hidden.shape[:-1] != reference_hidden.shape[:-1] or head.vocabulary != reference_head.vocabulary:
        raise ValueError(
            "Model and reference have to have hidden states of the same positions and heads of the same vocabulary; "
            f"got hidden states of shape {tuple(hidden.shape)} with {head.vocabulary} logits, and of shape "
            f"{tuple(reference_hidden.shape)} with {reference_head.vocabulary}."
        )
    flat = reference_hidden.detach().reshape(-1, reference_hidden.shape[-1])
    compare = _Divergence(kind, temperature, reference_head, flat)
    return _mean(hidden, head, compare, mask)


def next_token_loss_of_head(hidden: Tensor, head: Head, targets: Tensor, mask: Tensor | None) -> Tensor:
    """``linear_next_token_loss`` for a head of any kind."""
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"Hidden states of shape {tuple(hidden.shape)} go with targets of shape {tuple(hidden.shape[:-1])}; "
            f"got {tuple(targets.shape)}."
        )
    flat = targets.reshape(-1)

    def compare(logits: Tensor, place: Place, gradient: bool) -> Tensor:
        values = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for some in _parts(logits):
            # As `F.cross_entropy`: a target of -100 has a loss of zero.
            wanted = flat[place][some]
            counted = wanted != -100
            chosen = wanted.clamp(min=0).unsqueeze(1)
            log_probs = torch.log_softmax(logits[some], -1)
            values[some] = -log_probs.gather(1, chosen).squeeze(1) * counted
            if gradient:
                torch.exp(log_probs, out=logits[some])
                logits[some].scatter_add_(1, chosen, torch.full_like(chosen, -1.0, dtype=torch.float32))
                logits[some].mul_(counted.unsqueeze(1))
        return values

    return _mean(hidden, head, compare, mask)


def top_k_divergence_of_head(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    log_probs: Tensor,
    mask: Tensor | None,
    kind: Divergence,
    temperature: float,
) -> Tensor:
    """``linear_divergence_from_top_k`` for a head of any kind."""
    _check_temperature(temperature)
    if ids.shape[:-1] != hidden.shape[:-1] or log_probs.shape != (*ids.shape[:-1], ids.shape[-1] + 1):
        raise ValueError(
            f"Hidden states of shape {tuple(hidden.shape)} go with k ids and k + 1 log-probabilities a position; got "
            f"ids of shape {tuple(ids.shape)} and log-probabilities of shape {tuple(log_probs.shape)}."
        )
    flat_ids, flat_log_probs = ids.flatten(0, -2), log_probs.flatten(0, -2)

    def compare(logits: Tensor, place: Place, gradient: bool) -> Tensor:
        values, (ours, theirs) = [], (flat_ids[place], flat_log_probs[place])
        for some in _parts(logits):
            with torch.set_grad_enabled(gradient):
                leaf = logits[some].detach().requires_grad_(gradient)
                found = divergence_from_top_k(
                    leaf, ours[some], theirs[some], reduction="none", kind=kind, temperature=temperature
                )
            if gradient:
                logits[some] = torch.autograd.grad(found, leaf, torch.ones_like(found))[0]
            values.append(found.detach())
        return torch.cat(values)

    return _mean(hidden, head, compare, mask)


@torch.no_grad()
def top_k_of_head(hidden: Tensor, head: Head, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """``linear_top_k_log_probs`` for a head of any kind."""
    found = [top_k_log_probs(logits, k, temperature) for _, logits in chunk_logits(head, hidden)]
    ids, log_probs = (torch.cat(parts).view(*hidden.shape[:-1], -1) for parts in zip(*found, strict=True))
    return ids, log_probs


class _Divergence:
    """Divergences of a chunk, from the reference's logits for the same chunk."""

    def __init__(self, kind: Divergence, temperature: float, head: Head, hidden: Tensor) -> None:
        self._compare, self._temperature, self._hidden, self._head = _DIVERGENCES[kind], temperature, hidden, head
        self._sweep: Sweep | None = None
        self._memory: Tensor | None = None

    def __call__(self, logits: Tensor, place: Place, gradient: bool) -> Tensor:
        if isinstance(place, Tensor):
            place = place.to(self._hidden.device)
        if self._sweep is None:
            self._sweep = self._head.sweep(self._hidden, len(logits))
        with torch.no_grad():  # the reference's weights may require gradients
            reference = self._sweep.logits(self._hidden[place]).to(logits.device)
        values = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for some in _parts(logits):
            ours, theirs = logits[some], reference[some]
            if self._temperature != 1:
                ours.div_(self._temperature)
                theirs.div_(self._temperature)
            log_p, log_pi = self._buffers(ours)
            # In the memory of the logits: probabilities, then ours is the gradient.
            for given, log_probs in ((ours, log_p), (theirs, log_pi)):
                torch.log_softmax(given, -1, out=log_probs).clamp_(min=_NEVER)
                torch.exp(log_probs, out=given)
            values[some] = self._compare(log_p, log_pi, ours, theirs)
            if self._temperature != 1:
                ours.div_(self._temperature)
        return values

    def _buffers(self, part: Tensor) -> Tensor:
        if self._memory is None or self._memory.shape[1] < len(part):
            self._memory = torch.empty(2, *part.shape, dtype=torch.float32, device=part.device)
        return self._memory[:, : len(part)]


def _mean(hidden: Tensor, head: Head, compare: Compare, mask: Tensor | None) -> Tensor:
    if mask is None:
        return chunked_sum(head, hidden, compare, None) / hidden.shape[:-1].numel()
    if mask.shape != hidden.shape[:-1] or mask.is_floating_point():
        raise ValueError(
            f"`mask` is True at the positions to average over, of shape {tuple(hidden.shape[:-1])}; got {mask.dtype} "
            f"of shape {tuple(mask.shape)}."
        )
    selected = mask.flatten().nonzero().squeeze(1)
    return chunked_sum(head, hidden, compare, selected) / max(1, len(selected))
