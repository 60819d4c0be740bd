"""Adding the replay loss to what the user's `training_step` returns."""

import functools
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.callbacks.budget import DRIFT, BudgetController, ForgettingBudget
from lightning_replay.callbacks.observed_targets import observed_targets
from lightning_replay.callbacks.replay_loss import LwF, ReplayLoss
from lightning_replay.callbacks.reuse_gap import ReuseGap
from lightning_replay.data.feed import RowFeed
from lightning_replay.models.head import HiddenStates, OutputHeads
from lightning_replay.models.hooks import observed_forward
from lightning_replay.models.language_model import LanguageModel, evaluating
from lightning_replay.references.hidden import reference_hidden
from lightning_replay.references.models import ReferenceModel
from lightning_replay.utilities.seeds import own_randomness
from lightning_replay.utilities.validation import is_number

__all__ = ["ReplayStep"]


class ReplayStep:
    """Adds ``coefficient`` times the replay loss to what ``training_step`` returns.

    With a budget, the sum is divided by one more than the coefficient, as ``ForgettingBudget`` says.

    Args:
        loss: The replay loss.
        coefficient: The factor of the replay loss: a number, a function of the optimizer step, or a budget.

    Attributes:
        last_loss: The replay loss of the last step that had rows, without the coefficient, on the rows of this rank;
            None before the first.
        last_coefficient: Its factor.
        budget: Moves the factor, if a budget is given.
        reuse_gap: How much lower the loss is on rows that have been used before.
        seconds: Wall-clock time of forwards and losses of replay, without the backward. It is measured on the host,
            without synchronizing the device.

    Raises:
        ValueError: If ``coefficient`` is negative or not a number.
    """

    def __init__(self, loss: ReplayLoss, coefficient: float | Callable[[int], float] | ForgettingBudget) -> None:
        self.budget: BudgetController | None = None
        if isinstance(coefficient, ForgettingBudget):
            self.budget = BudgetController.of(coefficient, loss)
            coefficient = coefficient.start
        elif not callable(coefficient):
            _check_coefficient(coefficient, "`coefficient`")
        self.loss = loss
        self.coefficient = coefficient
        self.last_loss: Tensor | None = None
        self.reuse_gap = ReuseGap()
        self.last_coefficient = 0.0
        self.seconds = 0.0
        self._heads = OutputHeads()

    def wrap(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        model: LanguageModel,
        reference: Callable[[], ReferenceModel],
        feed: RowFeed | None,
        seed: int,
        ignore_index: int,
        reuse_gap: ReuseGap | None = None,
    ) -> Callable[[], None]:
        """Replace the module's step by one that adds the replay loss, as an attribute of the instance.

        It runs wherever Lightning runs `training_step`: inside DDP's forward, inside autocast, before the loss is
        divided for gradient accumulation. So the replay loss is scaled and synchronized as the user's is. If several
        ranks average their gradients, each weights its replay loss by its share of the target tokens, so that all
        tokens count the same.

        If the user's step returns nothing that can be trained on (None, or a loss without a graph), its output is
        returned unchanged, so that Lightning skips the step or raises its own error.

        Args:
            trainer: The Trainer.
            pl_module: The module whose step to wrap.
            model: The language model in it.
            reference: Returns the reference model.
            feed: Draws the replay rows; None for a loss on the new rows.
            seed: Seed of what is random in the forward of replay rows, such as dropout. The global random state, and
                with it the dropout of the user's own forwards, stays as it would be without replay.
            ignore_index: The label that the user's loss ignores, for a loss on the new rows.
            reuse_gap: Takes the loss of each batch of replay rows, with the uses of the rows.

        Returns:
            A function that restores the module's step.
        """
        original = pl_module.training_step
        self._heads = OutputHeads()
        if feed is not None and self.loss.takes_hidden:
            self._heads.of(model)  # so that what can be said of it is said before the first step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            step = functools.partial(original, *args, **kwargs)
            weight = 1.0
            if feed is None:
                output, loss = self._on_new_rows(model, reference, step, args[0], ignore_index)
            else:
                weight = feed.weight
                key = (seed, trainer.global_rank, trainer.fit_loop.total_batch_idx)
                fresh = None if self.budget is None or not weight else _drawn_first(feed.drawn)
                output, loss = self._on_replay_rows(model, reference, step, feed, key, fresh)
            share = None
            if self.budget is not None and _has_graph(output):
                self.budget.observe_new_loss(_loss_of(output).detach())
                share = 1 / (1 + self.budget.coefficient)
            if loss is None:
                return output if share is None else _combined(output, None, share)
            self.last_loss, self.last_coefficient = loss.detach(), self._coefficient(trainer.global_step)
            drawn = None if feed is None else feed.drawn
            if reuse_gap is not None and weight and drawn is not None and drawn.uses is not None:
                reuse_gap.observe(self.last_loss, drawn.uses)
            return _combined(output, self.last_coefficient * weight * loss, share)

        of_instance = vars(pl_module).get("training_step")
        pl_module.training_step = training_step  # type: ignore[method-assign]
        return functools.partial(_restore_training_step, pl_module, of_instance)

    def forget(self) -> None:
        """Begin as if no step had been taken, but for the time."""
        self.last_loss, self.reuse_gap = None, ReuseGap()
        if self.budget is not None:
            self.budget.forget()

    def state_dict(self) -> dict[str, Any]:
        """What was computed last, and the time taken so far."""
        return {
            "loss_seconds": self.seconds,
            "last_loss": None if self.last_loss is None else self.last_loss.cpu(),
            "last_coefficient": self.last_coefficient,
            "reuse_gap": self.reuse_gap.state_dict(),
            "budget": None if self.budget is None else self.budget.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self.seconds, self.last_loss = state["loss_seconds"], state["last_loss"]
        self.last_coefficient = state["last_coefficient"]
        self.reuse_gap.load_state_dict(state["reuse_gap"])
        if self.budget is not None and state.get("budget") is not None:
            self.budget.load_state_dict(state["budget"])

    def _on_replay_rows(
        self,
        model: LanguageModel,
        reference: Callable[[], ReferenceModel],
        step: Callable[[], Any],
        feed: RowFeed,
        key: tuple[int, ...],
        fresh: ReplayRows | None,
    ) -> tuple[Any, Tensor | None]:
        """The output of the user's step, and the loss on the rows drawn for it.

        The budget takes the drift on ``fresh``, the rows with the targets that it is measured on. Where all processes
        have to call the model equally often, it is measured in each, even if it does not count. If the forward was
        random, as with dropout, what it gives is further from the reference than the model is.
        """
        output, drawn = step(), feed.drawn
        if not _has_graph(output) or drawn is None:
            return output, None
        started = time.perf_counter()
        rows = drawn.to(model.device)
        tokens = rows.tokens[:, :-1]  # the last token of a row predicts nothing in it
        lockstep = self.budget is not None and feed.processes.lockstep
        is_loss = self.loss == DRIFT and fresh is drawn and not lockstep
        on = drawn if fresh is None and lockstep else fresh
        measured = None if on is None or is_loss else on.to(model.device)
        asked = _Asked(reference, model, self._heads, tokens)
        with own_randomness(model.device, *key) as was_random:
            loss, drift = self._loss_and_drift(self.loss, asked, rows, measured)
            if on is not None and was_random():
                with evaluating(model.module):
                    drift, _ = self._loss_and_drift(DRIFT, asked, on.to(model.device), None)
        if self.budget is not None and fresh is not None:
            value = loss.detach() if drift is None else drift
            self.budget.observe(value, int(fresh.targets_mask.sum()))
        self.seconds += time.perf_counter() - started
        return output, loss

    def _loss_and_drift(
        self, loss_on: ReplayLoss, asked: "_Asked", rows: ReplayRows, measured: ReplayRows | None
    ) -> tuple[Tensor, Tensor | None]:
        """A loss on replay rows and the drift on some, from one forward of the model."""
        found = self._from_hidden(loss_on, asked, rows, measured) if loss_on.takes_hidden else None
        if found is not None:
            return found
        logits, drift = asked.call(asked.model), None
        if measured is not None:
            drift = DRIFT(logits.detach(), measured, lambda: asked.logits)
        return loss_on(logits, rows, lambda: asked.logits), drift

    def _from_hidden(
        self, loss_on: ReplayLoss, asked: "_Asked", rows: ReplayRows, measured: ReplayRows | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """The same without logits of the whole batch; None if whole logits are to be taken."""
        if self._heads.of(asked.model) is None:
            return None
        before = None
        if loss_on.asks_reference(rows) or (measured is not None and DRIFT.asks_reference(measured)):
            before = asked.hidden
            if before is None:
                return None
        drift: Tensor | None = None

        def inside(ours: HiddenStates) -> Tensor:
            nonlocal drift
            loss = loss_on.on_hidden(ours, rows, before)
            if measured is not None:
                with torch.no_grad():
                    drift = DRIFT.on_hidden(ours, measured, before)
            return loss

        loss = self._heads.run(asked.model, asked.call, inside)
        return None if loss is None else (loss, drift)

    def _on_new_rows(
        self,
        model: LanguageModel,
        reference: Callable[[], ReferenceModel],
        step: Callable[[], Any],
        batch: Any,
        ignore_index: int,
    ) -> tuple[Any, Tensor | None]:
        """The output of the user's step, and the divergence on the rows of its own batch."""
        assert isinstance(self.loss, LwF)
        head = self._heads.of(model) if self.loss.takes_heads and _can_be_watched(model) else None
        with observed_forward(model) as observed:
            watched = nullcontext() if head is None else head.watched(lambda: observed.logits is not None)
            with watched as seen:
                output = step()
        if not _has_graph(output):
            return output, None
        if observed.logits is None:
            raise _never_called(model)
        trained = [name for name, value in observed.arguments.items() if getattr(value, "requires_grad", False)]
        if trained:
            raise _trained_inputs(model, trained)
        started = time.perf_counter()
        mask = observed_targets(batch, observed, model.vocabulary, ignore_index)
        before = None
        # A loss of the model's own would find one number for each position in the place of its logits.
        if seen and observed.asks_logits_alone and seen[0].states.shape[:-1] == observed.logits.shape[:-1]:
            before = reference_hidden(self._heads, reference(), model, functools.partial(observed.ask, labels=False))
        if seen and before is not None:
            loss = self.loss.on_heads(seen[0], before, mask)
        else:
            with reference().active() as active:
                reference_logits = observed.ask(active)
            loss = self.loss.on_logits(observed.logits, reference_logits, mask)
        self.seconds += time.perf_counter() - started
        return output, loss

    def _coefficient(self, step: int) -> float:
        if self.budget is not None:
            return self.budget.coefficient
        value = self.coefficient(step) if callable(self.coefficient) else self.coefficient
        _check_coefficient(value, f"What the schedule `coefficient` returned for step {step}")
        return float(value)


class _Asked:
    """The model on the tokens of replay rows, and the reference, which is called once at most for each answer.

    Args:
        reference: Returns the reference.
        model: The model that trains.
        heads: The output heads found so far.
        tokens: The rows without their last tokens.
    """

    def __init__(
        self, reference: Callable[[], ReferenceModel], model: LanguageModel, heads: OutputHeads, tokens: Tensor
    ) -> None:
        self.model = model
        self.tokens = tokens
        self._reference = reference
        self._heads = heads

    def call(self, asked: LanguageModel) -> Tensor:
        """The logits of a model."""
        return asked.logits(self.tokens)

    @functools.cached_property
    def logits(self) -> Tensor:
        """Those of the reference."""
        with self._reference().active() as active:
            return self.call(active)

    @functools.cached_property
    def hidden(self) -> HiddenStates | None:
        """Hidden states of the reference; None if whole logits are to be taken."""
        return reference_hidden(self._heads, self._reference(), self.model, self.call)


def _can_be_watched(model: LanguageModel) -> bool:
    """Whether hidden states of the user's own call, and weights, can be used when the call is over."""
    is_sharded = any(isinstance(part, FSDPModule) for part in model.module.modules())
    return model.module is model.uncompiled.module and not is_sharded


def _never_called(model: LanguageModel) -> MisconfigurationException:
    return MisconfigurationException(
        f"`training_step` never called {type(model.module).__name__}, whose logits `loss='lwf'` needs. Call the "
        "module itself, not its `forward`, or name the module that it calls with `language_model`."
    )


def _trained_inputs(model: LanguageModel, names: list[str]) -> MisconfigurationException:
    return MisconfigurationException(
        f"`loss='lwf'` calls the reference model with the arguments that `training_step` calls "
        f"{type(model.module).__name__} with, but {names} are computed with weights that train, so the reference would "
        "not predict what the model predicted before finetuning. Call the model with token ids, freeze these weights, "
        "or use a loss on replay rows."
    )


def _check_coefficient(value: Any, what: str) -> None:
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{what} is the factor of the replay loss, at least 0 and finite; got {value!r}.")


def _has_graph(output: Any) -> bool:
    """Whether what a step returned is a loss, or a mapping with one, that gradients flow from."""
    loss = _loss_of(output)
    return isinstance(loss, Tensor) and loss.requires_grad


def _loss_of(output: Any) -> Any:
    return output.get("loss") if isinstance(output, Mapping) else output


def _combined(output: Any, added: Tensor | None, share: float | None) -> Any:
    """What a step returned, with a loss added and the sum multiplied by a share, if these are given."""
    if isinstance(output, Mapping):
        return {**output, "loss": _combined(output["loss"], added, share)}
    total = output if added is None else output + added
    return total if share is None else share * total


def _drawn_first(drawn: ReplayRows | None) -> ReplayRows | None:
    """The rows, with targets in those alone that are drawn for the first time; None if these have no target."""
    if drawn is None or drawn.uses is None or bool((drawn.uses == 1).all()):
        return drawn
    fresh = drawn._replace(targets=drawn.target_tokens & (drawn.uses == 1).unsqueeze(1))
    return fresh if bool(fresh.targets_mask.any()) else None


def _restore_training_step(pl_module: pl.LightningModule, of_instance: Any) -> None:
    """Restore the step that the instance had as an attribute, or else that of its class."""
    del pl_module.training_step
    if of_instance is not None:
        pl_module.training_step = of_instance  # type: ignore[method-assign]
