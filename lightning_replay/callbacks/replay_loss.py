"""The losses that replay adds to the user's loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.linear_losses import divergence_of_heads, next_token_loss_of_head, top_k_divergence_of_head
from lightning_replay.losses import (
    Divergence,
    divergence_from_top_k,
    forward_kl,
    jensen_shannon,
    next_token_loss,
    reverse_kl,
)
from lightning_replay.models.head import HiddenStates
from lightning_replay.references.reference import Cached, Reference
from lightning_replay.utilities.validation import check_choice, is_number

__all__ = ["KL", "LossName", "LwF", "Mixed", "NextToken", "ReplayLoss", "replay_loss_of"]

LossName = Literal["kl", "ntp", "mixed", "lwf"]

_DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "jensen_shannon": jensen_shannon}


class ReplayLoss(ABC):
    """A loss on replay rows. For a custom loss, subclass it and define ``__call__``.

    Example:
        >>> class UnlikelyTokens(ReplayLoss):
        ...     needs_reference = False
        ...     def __call__(self, logits, rows, reference_logits):
        ...         log_probs = logits.float().log_softmax(-1).gather(2, rows.tokens[:, 1:, None])[..., 0]
        ...         return -(log_probs.clamp(max=-2) * rows.targets_mask).sum() / rows.targets_mask.sum()
        >>> from lightning_replay import SelfGeneratedReplay
        >>> replay = SelfGeneratedReplay(loss=UnlikelyTokens())
    """

    rows: ClassVar[Literal["replay", "batch", "new"]] = "replay"
    """``"replay"``: the loss is computed on replay rows, in a separate forward. ``"batch"``: replay rows join the
    user's batch, and no loss is added. ``"new"``: the loss is computed on the user's rows; there are no replay rows."""

    needs_reference: ClassVar[bool] = True
    """Whether the loss uses the reference's logits."""

    takes_cached: ClassVar[bool] = False
    """Whether the loss can be computed from a cached reference: ``rows.top_ids`` and ``rows.top_log_probs``."""

    temperature: float = 1.0
    """Divides the logits, including those of a cached reference."""

    pure_function: ClassVar[str] = ""
    """The function of ``lightning_replay`` to call in a training step with manual optimization."""

    def cached(self, reference: Reference) -> Cached | None:
        """The reference if rows carry its log-probabilities for this loss, else None."""
        return reference if self.takes_cached and isinstance(reference, Cached) else None

    @property
    def takes_hidden(self) -> bool:
        """Whether ``on_hidden`` computes what ``__call__`` does: both are of one class, neither alone of a subclass."""
        owner = _owner(self, "__call__", "on_hidden")
        return owner is not ReplayLoss and "on_hidden" in vars(owner)

    def asks_reference(self, rows: ReplayRows) -> bool:
        """Whether the loss on these rows needs a forward of the reference."""
        return self.needs_reference and not (self.takes_cached and rows.top_ids is not None)

    def on_hidden(self, ours: HiddenStates, rows: ReplayRows, reference: HiddenStates | None) -> Tensor:
        """The same loss of hidden states, without logits of the whole batch; a loss of your own needs none.

        Args:
            ours: The model's hidden states after each token of the rows but the last, and its head.
            rows: The rows.
            reference: Those of the reference, without a graph; None if ``asks_reference`` is False.

        Raises:
            NotImplementedError: If the loss takes logits alone.
        """
        raise NotImplementedError(f"{type(self).__name__} is computed from logits.")

    @abstractmethod
    def __call__(self, logits: Tensor, rows: ReplayRows, reference_logits: Callable[[], Tensor]) -> Tensor:
        """The loss on replay rows, in nats a token, averaged over their targets.

        Args:
            logits: The model's logits after each token of the rows but the last, shape
                ``(rows, length - 1, vocabulary)``.
            rows: The rows, on the logits' device. ``rows.targets_mask`` is True where the next token is a target.
            reference_logits: Returns the reference's logits, the same shape, without a graph.
        """


@dataclass(frozen=True)
class KL(ReplayLoss):
    """Divergence from the reference model to the trained one, over the full vocabulary (``"kl"``).

    Args:
        direction: ``"forward"``: KL(π‖θ), as arXiv 2605.26097. ``"reverse"``: KL(θ‖π). ``"jensen_shannon"``: the
            symmetric divergence of both.
        temperature: Divides the logits of both models.

    Raises:
        ValueError: If ``direction`` is unknown or ``temperature`` is not above 0.
    """

    direction: Divergence = "forward"
    temperature: float = 1.0

    takes_cached: ClassVar[bool] = True
    pure_function: ClassVar[str] = "forward_kl"

    def __post_init__(self) -> None:
        check_choice("direction", self.direction, Divergence)
        _check_temperature(self.temperature)

    def __call__(self, logits: Tensor, rows: ReplayRows, reference_logits: Callable[[], Tensor]) -> Tensor:
        """The divergence on replay rows; from cached log-probabilities if the rows have them."""
        if rows.top_ids is not None and rows.top_log_probs is not None:
            return divergence_from_top_k(
                logits,
                rows.top_ids,
                rows.top_log_probs,
                rows.targets_mask,
                kind=self.direction,
                temperature=self.temperature,
            )
        function = _DIVERGENCES[self.direction]
        return function(logits, reference_logits(), rows.targets_mask, temperature=self.temperature)

    @override
    def on_hidden(self, ours: HiddenStates, rows: ReplayRows, reference: HiddenStates | None) -> Tensor:
        mask, options = rows.targets_mask, (self.direction, self.temperature)
        if rows.top_ids is not None and rows.top_log_probs is not None:
            return top_k_divergence_of_head(*ours, rows.top_ids, rows.top_log_probs, mask, *options)
        assert reference is not None
        return divergence_of_heads(*ours, *reference, mask, *options)


@dataclass(frozen=True)
class NextToken(ReplayLoss):
    """Next-token loss on replay rows (``"ntp"``). It needs no reference model."""

    needs_reference: ClassVar[bool] = False
    pure_function: ClassVar[str] = "next_token_loss"

    def __call__(self, logits: Tensor, rows: ReplayRows, reference_logits: Callable[[], Tensor]) -> Tensor:
        """The next-token loss on replay rows."""
        return next_token_loss(logits, rows.tokens[:, 1:], rows.targets_mask)

    @override
    def on_hidden(self, ours: HiddenStates, rows: ReplayRows, reference: HiddenStates | None) -> Tensor:
        return next_token_loss_of_head(*ours, rows.tokens[:, 1:], rows.targets_mask)


@dataclass(frozen=True)
class Mixed(ReplayLoss):
    """Replay rows join the batch, and the user's own loss sees them (``"mixed"``); no loss is added."""

    rows: ClassVar[Literal["replay", "batch", "new"]] = "batch"
    needs_reference: ClassVar[bool] = False

    def __call__(self, logits: Tensor, rows: ReplayRows, reference_logits: Callable[[], Tensor]) -> Tensor:
        """No loss of its own.

        Raises:
            TypeError: Always.
        """
        raise TypeError("`loss='mixed'` has no loss of its own: replay rows join the batch, whose loss is the user's.")


@dataclass(frozen=True)
class LwF(ReplayLoss):
    """Forward KL divergence on the *new* rows: learning without forgetting (``"lwf"``; Li & Hoiem 2016).

    There are no replay rows, so nothing is sampled. It protects the reference's predictions on the new text, and prior
    text only indirectly.

    Args:
        temperature: Divides the logits of both models.

    Raises:
        ValueError: If ``temperature`` is not above 0.
    """

    temperature: float = 1.0

    rows: ClassVar[Literal["replay", "batch", "new"]] = "new"
    pure_function: ClassVar[str] = "forward_kl"

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def __call__(self, logits: Tensor, rows: ReplayRows, reference_logits: Callable[[], Tensor]) -> Tensor:
        """The divergence on any rows."""
        return self.on_logits(logits, reference_logits(), rows.targets_mask)

    def on_logits(self, logits: Tensor, reference_logits: Tensor, mask: Tensor | None) -> Tensor:
        """The divergence of logits, averaged over the positions in a mask of shape ``(rows, positions)``."""
        return forward_kl(logits, reference_logits, mask, temperature=self.temperature)

    def on_heads(self, ours: HiddenStates, reference: HiddenStates, mask: Tensor | None) -> Tensor:
        """The same of hidden states, without logits of the whole batch."""
        return divergence_of_heads(*ours, *reference, mask, "forward", self.temperature)

    @property
    def takes_heads(self) -> bool:
        """Whether ``on_heads`` computes what ``on_logits`` does, which a subclass may have changed alone."""
        return "on_heads" in vars(_owner(self, "on_logits", "on_heads"))


def _owner(loss: ReplayLoss, *methods: str) -> type:
    """The class closest to a loss's own that defines any of these methods."""
    return next(kind for kind in type(loss).__mro__ if set(methods) & vars(kind).keys())


_LOSSES: dict[LossName, type[ReplayLoss]] = {"kl": KL, "ntp": NextToken, "mixed": Mixed, "lwf": LwF}


def replay_loss_of(given: LossName | ReplayLoss) -> ReplayLoss:
    """Return the loss of a name, with its defaults; a ``ReplayLoss`` is returned unchanged.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> replay_loss_of("kl")
        KL(direction='forward', temperature=1.0)
    """
    if isinstance(given, ReplayLoss):
        return given
    if given not in _LOSSES:
        raise ValueError(
            f"`loss` is one of {', '.join(map(repr, _LOSSES))}, or an object such as KL(direction='reverse'); "
            f"got {given!r}."
        )
    return _LOSSES[given]()


def _check_temperature(temperature: float) -> None:
    if not is_number(temperature) or not temperature > 0:
        raise ValueError(f"`temperature` divides the logits and has to be above 0; got {temperature!r}.")
