"""Replay losses: pure functions of tensors, usable in any training loop."""

import math
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "Divergence",
    "divergence_from_top_k",
    "forward_kl",
    "jensen_shannon",
    "next_token_loss",
    "reverse_kl",
    "top_k_log_probs",
]

Divergence = Literal["forward", "reverse", "jensen_shannon"]
Reduction = Literal["mean", "none"]

_NEVER = -1e30
"""Log-probability of an impossible outcome: finite, so that zero times it is zero and not NaN."""

_PART = {"cpu": 2**18, "device": 2**26}
"""Logits in a part: on a CPU as many as its caches hold, on other devices enough to keep them busy."""


def forward_kl(
    logits: Tensor,
    reference_logits: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    temperature: float = 1.0,
) -> Tensor:
    r"""Forward KL divergence KL(π‖θ) from the reference π to the model θ, in nats, averaged over positions.

    .. math:: \frac{1}{|M|}\sum_{t \in M} \sum_v \pi_t(v)\,\bigl(\log \pi_t(v) - \log p_t(v)\bigr)

    Over the full vocabulary, in 32-bit floats whatever the logits' type
    (the regularizer ``kl_pre`` of arXiv 2605.26097, there at temperature 1).

    Args:
        logits: The model's logits, shape ``(rows, positions, vocabulary)``.
        reference_logits: The reference's, the same shape. No gradient flows into them.
        mask: True at the positions M to average over, shape ``(rows, positions)``. All of them by default.
        reduction: ``"mean"`` over the mask, or ``"none"`` for the divergence at every position, mask or not.
        temperature: Divides both logits. The gradient shrinks with its square (Hinton et al. 2015); raise the
            coefficient to compensate.

    Returns:
        A scalar, zero if the mask selects nothing; with ``"none"``, shape ``(rows, positions)``.

    Raises:
        ValueError: If the shapes differ or ``temperature`` is not above 0.

    Example:
        >>> import torch
        >>> reference = torch.tensor([[[0.5, 0.5]]]).log()
        >>> model = torch.tensor([[[0.25, 0.75]]]).log()
        >>> forward_kl(model, reference)  # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75)
        tensor(0.1438)
    """
    return _divergence("forward", logits, reference_logits, mask, reduction, temperature)


def reverse_kl(
    logits: Tensor,
    reference_logits: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    temperature: float = 1.0,
) -> Tensor:
    r"""Reverse KL divergence KL(θ‖π) from the model θ to the reference π, in nats, averaged over positions.

    .. math:: \frac{1}{|M|}\sum_{t \in M} \sum_v p_t(v)\,\bigl(\log p_t(v) - \log \pi_t(v)\bigr)

    It penalizes tokens that the model predicts and the reference does not. Tokens that the reference predicts and the
    model no longer does cost little. Arguments, return value and errors are those of ``forward_kl``.

    Example:
        >>> import torch
        >>> reference = torch.tensor([[[0.5, 0.5]]]).log()
        >>> model = torch.tensor([[[0.25, 0.75]]]).log()
        >>> reverse_kl(model, reference)  # 0.25 ln(0.25 / 0.5) + 0.75 ln(0.75 / 0.5)
        tensor(0.1308)
    """
    return _divergence("reverse", logits, reference_logits, mask, reduction, temperature)


def jensen_shannon(
    logits: Tensor,
    reference_logits: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    temperature: float = 1.0,
) -> Tensor:
    r"""Jensen–Shannon divergence of model and reference, in nats, averaged over positions; at most ln 2 at each.

    .. math:: \tfrac12 \mathrm{KL}(\pi \,\|\, m) + \tfrac12 \mathrm{KL}(p \,\|\, m), \quad m = \tfrac12 (\pi + p)

    (Lin 1991.) Arguments, return value and errors are those of ``forward_kl``.

    Example:
        >>> import torch
        >>> reference = torch.tensor([[[1.0, 0.0]]]).log()
        >>> model = torch.tensor([[[0.0, 1.0]]]).log()
        >>> jensen_shannon(model, reference)  # disjoint: ln 2
        tensor(0.6931)
    """
    return _divergence("jensen_shannon", logits, reference_logits, mask, reduction, temperature)


def top_k_log_probs(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The ``k`` most likely tokens of each position, and one bucket for all others, as a cached reference stores them.

    Args:
        logits: Shape ``(rows, positions, vocabulary)``.
        k: How many tokens; no more than the vocabulary has.
        temperature: Divides the logits.

    Returns:
        Token ids, shape ``(rows, positions, k)``, and log-probabilities in 32-bit floats, shape
        ``(rows, positions, k + 1)``; the last one is that of all other tokens together.

    Raises:
        ValueError: If ``k`` is not from 1 to the vocabulary's size, or ``temperature`` not above 0.

    Example:
        >>> import torch
        >>> ids, log_probs = top_k_log_probs(torch.tensor([[[0.5, 0.1, 0.4]]]).log(), k=1)
        >>> ids, log_probs.exp()
        (tensor([[[0]]]), tensor([[[0.5000, 0.5000]]]))
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"`k` has to be from 1 to {logits.shape[-1]}, the size of the vocabulary; got {k}.")
    ids = logits.topk(k, dim=-1).indices
    log_probs = _bucket_logits(logits, ids, temperature).log_softmax(-1).clamp(min=_NEVER)
    # If no token is left for it, the tail is impossible.
    return ids, F.pad(log_probs, (0, k + 1 - log_probs.shape[-1]), value=_NEVER)


def divergence_from_top_k(
    logits: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    kind: Divergence = "forward",
    temperature: float = 1.0,
) -> Tensor:
    r"""Divergence from a reference of which the ``k`` most likely tokens and the sum of the others are known.

    Both distributions are taken over ``k + 1`` buckets: one for each of the reference's ``k`` most likely tokens, and
    one for all others together. Merging outcomes never increases a divergence (the data-processing inequality), so
    this is a **lower bound** of the one over the full vocabulary. For the forward KL the difference is exactly

    .. math:: \pi_t(\text{tail}) \cdot \mathrm{KL}\bigl(\pi_t(\cdot \mid \text{tail}) \,\|\,
        p_t(\cdot \mid \text{tail})\bigr)

    With ``k`` equal to the vocabulary's size the difference is zero.

    Args:
        logits: The model's logits, shape ``(rows, positions, vocabulary)``.
        ids: The reference's most likely tokens, shape ``(rows, positions, k)``.
        log_probs: Their log-probabilities and the tail's, shape ``(rows, positions, k + 1)``, as
            ``top_k_log_probs`` returns. Normalized here, so they may be rounded to 16 bits.
        mask: True at the positions to average over, shape ``(rows, positions)``. All of them by default.
        reduction: ``"mean"`` over the mask, or ``"none"`` for the divergence at every position.
        kind: ``"forward"``, ``"reverse"`` or ``"jensen_shannon"``.
        temperature: Divides the model's logits. Pass the one that the reference's were cached with.

    Returns:
        A scalar, zero if the mask selects nothing; with ``"none"``, shape ``(rows, positions)``.

    Raises:
        ValueError: If the shapes don't match or ``temperature`` is not above 0.

    Example:
        >>> import torch
        >>> reference = torch.tensor([[[0.5, 0.3, 0.2]]]).log()
        >>> model = torch.tensor([[[0.4, 0.3, 0.3]]]).log()
        >>> forward_kl(model, reference), divergence_from_top_k(model, *top_k_log_probs(reference, k=1))
        (tensor(0.0305), tensor(0.0204))
    """
    if ids.shape[:-1] != logits.shape[:-1] or log_probs.shape != (*ids.shape[:-1], ids.shape[-1] + 1):
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} go with k ids and k + 1 log-probabilities a position; got ids of "
            f"shape {tuple(ids.shape)} and log-probabilities of shape {tuple(log_probs.shape)}."
        )
    ours = _bucket_logits(logits, ids.long(), temperature)
    values = _compare(ours, log_probs.detach()[..., : ours.shape[-1]], kind, temperature=1.0)
    return values if reduction == "none" else _mean(values, mask)


def next_token_loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Cross-entropy of the targets, in nats a token, averaged over positions.

    The regularizer ``ntp_pre`` of arXiv 2605.26097 if the targets are replay rows. Nothing is shifted:
    ``logits[:, t]`` predicts ``targets[:, t]``.

    Args:
        logits: Shape ``(rows, positions, vocabulary)``; converted to 32-bit floats.
        targets: Token ids, shape ``(rows, positions)``.
        mask: True at the positions to average over, shape ``(rows, positions)``. All of them by default.

    Returns:
        A scalar; zero if the mask selects nothing.

    Raises:
        ValueError: If the shapes don't match.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[0, 1, 1]])
        >>> logits = torch.zeros(1, 3, 2)  # uniform over two tokens: ln 2
        >>> next_token_loss(logits[:, :-1], tokens[:, 1:])
        tensor(0.6931)
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} go with targets of shape {tuple(logits.shape[:-1])}; "
            f"got {tuple(targets.shape)}."
        )
    losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return _mean(losses.view_as(targets), mask)


class _InPlaceDivergence(Protocol):
    """A divergence and its gradient, in the memory of its arguments.

    ``_Divergence`` computes a part of the positions at a time in four tensors, which it fills again for the next part.
    So the functions with this signature **overwrite all four arguments**; the trailing underscore in their names is
    torch's mark of that. Pass tensors that nothing else reads.
    """

    def __call__(self, log_p: Tensor, log_pi: Tensor, p: Tensor, pi: Tensor) -> Tensor:
        """Return the divergence of each position, and leave its gradient in ``p``.

        Args:
            log_p: The model's log-probabilities, shape ``(positions, outcomes)``, 32-bit floats. Overwritten.
            log_pi: The reference's, likewise. Overwritten.
            p: ``log_p.exp()``. Overwritten with the gradient with respect to the logits that ``log_p`` came from.
            pi: ``log_pi.exp()``. Overwritten.

        Returns:
            Shape ``(positions,)``; memory of its own.
        """


def _forward_kl_(log_p: Tensor, log_pi: Tensor, p: Tensor, pi: Tensor) -> Tensor:
    values = log_pi.sub_(log_p).mul_(pi).sum(-1)
    p.sub_(pi)
    return values


def _reverse_kl_(log_p: Tensor, log_pi: Tensor, p: Tensor, pi: Tensor) -> Tensor:
    values = (log_p.sub_(log_pi) * p).sum(-1)
    p.mul_(log_p.sub_(values.unsqueeze(-1)))
    return values


def _jensen_shannon_(log_p: Tensor, log_pi: Tensor, p: Tensor, pi: Tensor) -> Tensor:
    middle = torch.logaddexp(log_p, log_pi).sub_(math.log(2))
    to_p = (log_p.sub_(middle) * p).sum(-1)
    to_pi = log_pi.sub_(middle).mul_(pi).sum(-1)
    p.mul_(log_p.sub_(to_p.unsqueeze(-1))).mul_(0.5)
    return 0.5 * (to_p + to_pi)


_DIVERGENCES: dict[Divergence, _InPlaceDivergence] = {
    "forward": _forward_kl_,
    "reverse": _reverse_kl_,
    "jensen_shannon": _jensen_shannon_,
}


class _Divergence(torch.autograd.Function):
    """Divergences of all positions and, in the same pass, their gradient: a part of the positions at a time.

    Autograd would keep five or six tensors of the logits' size in 32 bits. This keeps only the gradient, and each part
    reuses the memory of the one before it. Every tensor's type is named: inside a step under ``precision="bf16-true"``,
    Lightning sets torch's default type to 16 bits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference_logits: Tensor, kind: Divergence, temperature: float) -> Tensor:
        shape, outcomes = logits.shape[:-1], logits.shape[-1]
        logits, reference_logits = logits.reshape(-1, outcomes), reference_logits.reshape(-1, outcomes)
        values = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        gradient = None
        if ctx.needs_input_grad[0]:
            # In 32 bits, since `backward` scales it: in 16 bits it would be rounded twice.
            gradient = torch.empty_like(logits, dtype=torch.float32)
        parts = _parts(logits)
        largest = len(logits[parts[0]]) if parts else 0
        memory = torch.empty(4, largest, outcomes, dtype=torch.float32, device=logits.device)
        for some in parts:
            log_p, log_pi, p, pi = memory[:, : len(logits[some])]
            for given, log_probs, probs in ((logits, log_p, p), (reference_logits, log_pi, pi)):
                softened = _softened(given[some], temperature)
                torch.log_softmax(softened, -1, out=log_probs).clamp_(min=_NEVER)
                torch.softmax(softened, -1, out=probs)
            values[some] = _DIVERGENCES[kind](log_p, log_pi, p, pi)
            if gradient is not None:
                gradient[some] = p if temperature == 1 else p.div_(temperature)
        ctx.save_for_backward(gradient)
        ctx.dtype, ctx.shape = logits.dtype, shape
        return values.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = (gradient * upstream.reshape(-1, 1)).to(ctx.dtype)
        return scaled.view(*ctx.shape, -1), None, None, None


def _compare(logits: Tensor, reference_logits: Tensor, kind: Divergence, temperature: float) -> Tensor:
    values: Tensor = _Divergence.apply(logits, reference_logits, kind, temperature)  # type: ignore[no-untyped-call]
    return values


def _divergence(
    kind: Divergence,
    logits: Tensor,
    reference_logits: Tensor,
    mask: Tensor | None,
    reduction: Reduction,
    temperature: float,
) -> Tensor:
    if logits.shape != reference_logits.shape:
        raise ValueError(
            f"The logits of model and reference have to be of one shape; got {tuple(logits.shape)} "
            f"and {tuple(reference_logits.shape)}."
        )
    values = _compare(logits, reference_logits.detach(), kind, temperature)
    return values if reduction == "none" else _mean(values, mask)


def _parts(logits: Tensor) -> list[slice]:
    """Parts of logits of shape ``(positions, outcomes)`` that are compared at a time."""
    size = max(1, _PART["cpu" if logits.device.type == "cpu" else "device"] // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"`temperature` divides the logits and has to be above 0; got {temperature}.")


def _softened(logits: Tensor, temperature: float) -> Tensor:
    """Logits in 32-bit floats, divided by the temperature."""
    _check_temperature(temperature)
    return logits.float() if temperature == 1 else logits.float() / temperature


class _Buckets(torch.autograd.Function):
    """Logits of chosen tokens and, last, of all others together: their log-sum-exp.

    Autograd would keep three tensors of the logits' size and allocate three more; this keeps none and allocates one.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        # Not as 1 - sum of the others: if the tail is small, that would be rounding error alone.
        tail = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True).clamp_(min=_NEVER)
        ctx.save_for_backward(logits, ids, tail)
        return torch.cat([logits.gather(-1, ids), tail], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, ids, tail = ctx.saved_tensors
        gradient = (logits - tail).exp_().mul_(upstream[..., -1:])
        return gradient.scatter_(-1, ids, upstream[..., :-1]), None


def _bucket_logits(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Logits of the tokens ``ids`` and, last, of all other tokens together if there are any."""
    logits = _softened(logits, temperature)
    if ids.shape[-1] == logits.shape[-1]:
        return logits.gather(-1, ids)
    buckets: Tensor = _Buckets.apply(logits, ids)  # type: ignore[no-untyped-call]
    return buckets


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)
