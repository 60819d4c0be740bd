"""A budget of forgetting in place of a coefficient."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_replay.callbacks.checks import DEFAULT_COEFFICIENT
from lightning_replay.callbacks.replay_loss import KL, NextToken, ReplayLoss
from lightning_replay.callbacks.verdict import Course, Verdict, verdict
from lightning_replay.references.reference import EMA, Cached, Reference
from lightning_replay.utilities.distributed import Processes
from lightning_replay.utilities.validation import is_number

__all__ = ["DRIFT", "NEAR", "BudgetController", "ForgettingBudget"]

DRIFT = KL()
"""What a budget limits: KL(π‖θ) on replay rows, in nats a token."""

_AVERAGE = 0.9
"""The share of the smoothed drift that a measurement keeps. Four rows of 128 tokens scatter by 15 to 20%."""
_RATE = 0.1
"""How much the logarithm of the coefficient moves in a step at which the drift is twice the budget."""
_PROPORTIONAL = 3.0
"""How much higher the logarithm of the coefficient is as long as the drift is twice the budget. It answers before the
rate has added up: without it, the lag of the average and of the model makes the coefficient swing."""
_LARGEST = 3.0
"""Where the relative violation of a measurement is cut off, so that the average is soon back from a model that went far
astray."""
_FURTHEST = (-0.5, 1.0)
"""Where the smoothed relative violation is cut off. Drift is far above a budget only for a while, and far below it as
long as a learning rate warms up: a coefficient that sank in that time would be late."""
_HELD = 50
"""For how many measurements the coefficient may wait for the drift to reach the budget: it begins at zero."""
_SPAN = 1000.0
"""The factor between the first coefficient and its bounds."""
_PRICE_AVERAGE = 0.98
"""The share of the logarithm of the price that a step keeps."""
_MORE = 0.2
"""The share of the budget whose worth is told at the end."""
NEAR = 0.25
"""How far the drift may be from its budget, relative to it, for the price to be that of the budget."""


@dataclass(frozen=True)
class ForgettingBudget:
    r"""How much may be forgotten, for ``SelfGeneratedReplay(coefficient=ForgettingBudget(0.05))``.

    The *drift*, KL(π‖θ) on replay rows in nats a token, is held at the budget, and the new task gets all the rest. On
    the reference's own samples the drift is the expected rise of the loss. The coefficient is the multiplier of this
    constraint: it follows the smoothed relative violation in log space (Ziegler et al. 2019, arXiv 1909.08593; Rezende
    & Viola 2018, arXiv 1810.00597), with a proportional part against oscillation, and both losses are divided by one
    more than the coefficient,

    .. math:: \frac{\text{loss} + \text{coefficient} \cdot \text{replay loss}}{1 + \text{coefficient}}

    (Stooke et al. 2020, arXiv 2007.03964). Without this, gradients grow with the coefficient faster than Adam's
    averages follow: its steps become larger, which is drift, which raises the coefficient. With an optimizer whose
    steps are in proportion to the gradient, such as plain SGD, the new task's steps are smaller by this factor.

    The drift is measured on rows that are drawn for the first time, since rows that have been trained on read low; rows
    that carry no number of uses are taken for new. Between such rows the coefficient stays. Each optimizer step reads
    two numbers from the device. Measuring takes no forward of the model. It is the replay loss itself for the forward
    KL at temperature 1, and else takes the head's logits once more; for a loss that asks no reference, such as
    ``"ntp"``, also a forward of the reference. With ``reference="cached"`` it is the lower bound that ``Cached`` gives.
    If the model's forward in training is random, as with dropout, the drift is that in evaluation mode, which takes
    another forward of the model.

    The coefficient stays between a thousandth and a thousand times ``start``. It stays at ``start`` until the drift has
    reached the budget, or for 50 measurements. If the drift remains far below, it sinks to its lower bound.

    Logged: ``replay/drift``, smoothed, ``replay/budget`` and, for the forward KL at temperature 1 and the next-token
    loss, whose gradient is the drift's, ``replay/price``: the smoothed coefficient. At the optimum it is the exchange
    rate, how many nats of the new task's loss a nat of drift buys. Before, as long as the new task's loss falls, a
    larger budget buys more, since it also lets it fall faster. The fit ends with a verdict, from that price and from
    whether your own loss still fell: what would lower it, more steps, a larger budget, a larger model, or nothing.

    Args:
        budget: The drift to hold, in nats a token, above 0: a number, or a function of the optimizer step.
        start: The first coefficient, above 0. Early drift is the worst, so rather high.

    Raises:
        ValueError: If a number is not above 0 and finite.

    Example:
        >>> from lightning_replay import SelfGeneratedReplay
        >>> replay = SelfGeneratedReplay(coefficient=ForgettingBudget(0.05))
    """

    budget: float | Callable[[int], float]
    start: float = DEFAULT_COEFFICIENT

    def __post_init__(self) -> None:
        if not callable(self.budget):
            _check_positive(self.budget, "`budget` is the drift to hold in nats a token,")
        _check_positive(self.start, "`start` is the first coefficient,")

    def at(self, step: int) -> float:
        """The budget at an optimizer step.

        Raises:
            ValueError: If the function of the step returned something that is no budget.
        """
        if not callable(self.budget):
            return float(self.budget)
        value = self.budget(step)
        _check_positive(value, f"What the schedule `budget` returned for step {step} is a drift in nats a token,")
        return float(value)

    def check(self, loss: ReplayLoss, reference: Reference, source: str) -> None:
        """Refuse what leaves no drift to measure.

        Raises:
            ValueError: With what to use instead.
        """
        if loss.rows != "replay":
            raise ValueError(
                f"`coefficient=ForgettingBudget(...)` holds the drift on replay rows, and {type(loss).__name__} adds "
                "no loss on them. Use `loss='kl'` or `loss='ntp'`."
            )
        if source == "live":
            raise ValueError(
                "`coefficient=ForgettingBudget(...)` holds the drift on samples of the reference; on those of the live "
                "model, which has left what it forgot, the divergence is another quantity. Use `source='reference'`."
            )
        if isinstance(reference, EMA):
            raise ValueError(
                "`coefficient=ForgettingBudget(...)` holds the drift from the model before finetuning, and an average "
                "follows the model, however far it goes. Use `reference='auto'`."
            )
        cached = loss.cached(reference)
        if isinstance(reference, Cached) and (cached is None or loss.temperature != 1):
            raise ValueError(
                "With `reference='cached'`, `coefficient=ForgettingBudget(...)` measures the drift with the "
                "log-probabilities that the loss has cached, at a temperature of 1. Use `loss=KL()`, or another "
                "reference."
            )


class BudgetController:
    """Moves a coefficient so that the drift stays at its budget.

    Args:
        budget: The budget.
        has_price: Whether the gradient of the replay loss is that of the drift, so that the coefficient is its price.

    Attributes:
        coefficient: The factor of the replay loss.
        drift: The smoothed drift; None before the first measurement.
        allowed: The budget at the last measurement.
    """

    def __init__(self, budget: ForgettingBudget, has_price: bool = True) -> None:
        self.budget = budget
        self.has_price = has_price
        self.forget()

    @classmethod
    def of(cls, budget: ForgettingBudget, loss: ReplayLoss) -> "BudgetController":
        """The controller for a replay loss."""
        return cls(budget, loss == DRIFT or type(loss) is NextToken)

    def forget(self) -> None:
        """Begin anew."""
        self.coefficient = float(self.budget.start)
        self.drift: float | None = None
        self.allowed = math.nan
        self._level = self._log_price = math.log(self.coefficient)
        self._violation: float | None = None
        self._waited: int | None = 0
        self._unmeasured = 0
        self._pending: list[tuple[Tensor | float, int]] = []
        self._new_losses: list[Tensor | float] = []
        self._course = Course()

    def observe(self, drift: Tensor | float, tokens: int) -> None:
        """Take the drift of a batch, which counts at the end of its optimizer step.

        Args:
            drift: The mean over the target tokens of rows that are drawn for the first time, without a graph.
            tokens: The number of these tokens.
        """
        self._pending.append((drift, tokens))

    def observe_new_loss(self, loss: Tensor) -> None:
        """Take the user's own loss of a batch, for the verdict at the end."""
        self._new_losses.append(loss)

    def update(self, step: int, processes: Processes = Processes()) -> None:  # noqa: B008
        """Move the coefficient at the end of an optimizer step; all processes call this.

        Args:
            step: The number of steps taken.
            processes: Whose measurements count.
        """
        drifts = sum(float(drift) * tokens for drift, tokens in self._pending), sum(n for _, n in self._pending)
        losses = sum(map(float, self._new_losses)), len(self._new_losses)
        self._pending, self._new_losses = [], []
        everyone = processes.gather((*drifts, *losses))
        drift, tokens, loss, batches = (sum(each) for each in zip(*everyone, strict=True))
        self._course.add(loss / batches if batches else math.nan)
        measured = drift / tokens if tokens else math.nan
        if not math.isfinite(measured):  # no new row, or a step that overflowed
            self._unmeasured += 1
            return
        self._unmeasured = 0
        self.allowed = allowed = self.budget.at(step)
        self.drift = _averaged(self.drift, measured)
        self._violation = _averaged(self._violation, min(measured / allowed - 1, _LARGEST))
        violation = min(max(self._violation, _FURTHEST[0]), _FURTHEST[1])
        if self._waited is not None:
            self._waited += 1
            if violation < 0 and self._waited <= _HELD:
                return
            self._waited = None
        # The bounds hold for the sum of all violations too, which would else have to be undone first.
        self._level = self._bounded(self._level + _RATE * violation)
        log_coefficient = self._bounded(self._level + _PROPORTIONAL * violation)
        self.coefficient = math.exp(log_coefficient)
        self._log_price = _PRICE_AVERAGE * self._log_price + (1 - _PRICE_AVERAGE) * log_coefficient

    @property
    def price(self) -> float | None:
        """How many nats of the new task's loss a nat of drift buys; None if the coefficient doesn't tell."""
        return math.exp(self._log_price) if self.has_price else None

    def values(self) -> dict[str, float]:
        """What to log, by key."""
        if self.drift is None:
            return {}
        price = {} if self.price is None else {"replay/price": self.price}
        return {"replay/drift": self.drift, "replay/budget": self.allowed} | price

    def summary(self) -> str:
        """The end of the run in a sentence or two."""
        if self.drift is None:
            return "Forgetting budget: no row was drawn for the first time, so the drift was never measured."
        line = f"Forgetting budget: drift {self.drift:.3g} of {self.allowed:.3g} nats a token"
        if self._unmeasured > _HELD:
            line += (
                f", last measured {self._unmeasured} steps before the end, since when no new row was drawn or the "
                "drift was not finite"
            )
        if self.drift > (1 + NEAR) * self.allowed:
            return (
                f"{line}, which was not held, with a coefficient of {self.coefficient:.3g}. Use a lower learning rate, "
                "more replay rows or a larger budget."
            )
        if not self._binds:
            line += f". The budget did not bind at the end, at a coefficient of {self.coefficient:.3g}"
        elif self._gain is None:
            line += f", with a coefficient of {self.coefficient:.3g}"
        else:
            line += (
                f"; {_MORE * self.allowed:.2g} nats more would lower the new task's loss by about {self._gain:.2g}, "
                "and by more while it still falls"
            )
        return f"{line}. {self.verdict.sentence}"

    @property
    def verdict(self) -> Verdict:
        """What would lower the new task's loss, if the budget has been held."""
        return verdict(self._course, self._binds, self._gain)

    @property
    def _binds(self) -> bool:
        return self.drift is not None and self.drift >= (1 - NEAR) * self.allowed

    @property
    def _gain(self) -> float | None:
        """What a larger budget buys; None if it isn't known, as after a price at which it would be the whole loss."""
        gain = None if self.price is None else _MORE * self.allowed * self.price
        return None if gain is None or gain >= self._course.level else gain

    def state_dict(self) -> dict[str, Any]:
        """All that the coefficients to come depend on."""
        return {
            "coefficient": self.coefficient,
            "drift": self.drift,
            "allowed": self.allowed,
            "level": self._level,
            "log_price": self._log_price,
            "violation": self._violation,
            "waited": self._waited,
            "unmeasured": self._unmeasured,
            "pending": [(float(drift), tokens) for drift, tokens in self._pending],
            "new_losses": list(map(float, self._new_losses)),
            "course": self._course.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self.coefficient, self.drift, self.allowed = state["coefficient"], state["drift"], state["allowed"]
        self._level, self._log_price, self._violation = state["level"], state["log_price"], state["violation"]
        self._waited, self._unmeasured = state["waited"], state["unmeasured"]
        self._pending = [(drift, tokens) for drift, tokens in state["pending"]]
        self._new_losses = list(state["new_losses"])
        self._course.load_state_dict(state["course"])

    def _bounded(self, log_coefficient: float) -> float:
        middle, reach = math.log(self.budget.start), math.log(_SPAN)
        return min(max(log_coefficient, middle - reach), middle + reach)


def _averaged(average: float | None, value: float) -> float:
    return value if average is None else _AVERAGE * average + (1 - _AVERAGE) * value


def _check_positive(value: Any, what: str) -> None:
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{what} above 0 and finite; got {value!r}.")
