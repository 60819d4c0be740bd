"""What replay adds to the loss of the user's `training_step`, without an edit to it."""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.callbacks.replay_loss import LwF, ReplayLoss
from lightning_replay.data.batches import inputs_and_targets
from lightning_replay.data.feed import RowFeed
from lightning_replay.head_chunks import LinearHead
from lightning_replay.models.head import HiddenStates, OutputHeads
from lightning_replay.models.hooks import ObservedForward, observed_forward
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.models import ReferenceModel
from lightning_replay.utilities.validation import is_number

__all__ = ["ReplayStep"]


class ReplayStep:
    """Adds ``coefficient`` times the replay loss to what ``training_step`` returns.

    Args:
        loss: The replay loss.
        coefficient: What the replay loss is multiplied by: a number, or a function of the optimizer step.
        ignore_index: The label that the user's loss leaves out.

    Attributes:
        last_loss: The replay loss of the last step, without the coefficient, on the rows of this rank; None if there
            was none yet.
        last_coefficient: What it was multiplied by.
        seconds: Wall-clock time spent in forwards and losses of replay, as the host measures it: an accelerator may
            still be at work. The backward is not included.

    Raises:
        ValueError: If ``coefficient`` is negative or not a number.
    """

    def __init__(self, loss: ReplayLoss, coefficient: float | Callable[[int], float], ignore_index: int) -> None:
        if not callable(coefficient):
            _check_coefficient(coefficient, "`coefficient`")
        self.loss = loss
        self.coefficient = coefficient
        self.ignore_index = ignore_index
        self.last_loss: Tensor | None = None
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
    ) -> Callable[[], None]:
        """Put a step that adds the replay loss in the place of the module's own, as an attribute of the instance.

        It runs wherever Lightning runs `training_step`: inside DDP's forward, inside autocast, before the loss is
        divided for gradient accumulation. So the replay loss is scaled and synchronized as the user's is. If several
        ranks average their gradients, each weighs its replay loss by its share of the target tokens, so that all count
        the same.

        Args:
            trainer: The Trainer.
            pl_module: The module whose step to wrap.
            model: The language model in it.
            reference: Returns the reference model.
            feed: Draws the replay rows; None for a loss on the new rows.

        Returns:
            A function that puts everything back.
        """
        original, self.last_loss = pl_module.training_step, None
        self._heads = OutputHeads()
        if feed is not None and self.loss.takes_hidden:
            self._heads.of(model)  # so that what can be said of it is said before the first step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            step = functools.partial(original, *args, **kwargs)
            weight = 1.0
            if feed is None:
                output, loss = self._on_new_rows(model, reference, step, args[0])
            else:
                weight = feed.weight
                output, loss = self._on_replay_rows(model, reference, step, feed.drawn)
            if output is None or loss is None:  # None is Lightning's way to skip a step
                return output
            self.last_loss, self.last_coefficient = loss.detach(), self._coefficient(trainer.global_step)
            return _with_added_loss(output, self.last_coefficient * weight * loss)

        of_instance = vars(pl_module).get("training_step")
        pl_module.training_step = training_step  # type: ignore[method-assign]
        return functools.partial(_restore_training_step, pl_module, of_instance)

    def _on_replay_rows(
        self,
        model: LanguageModel,
        reference: Callable[[], ReferenceModel],
        step: Callable[[], Any],
        drawn: ReplayRows | None,
    ) -> tuple[Any, Tensor | None]:
        """What the user's step returns, and the loss on the rows drawn for it."""
        output = step()
        if output is None or drawn is None:
            return output, None
        started = time.perf_counter()
        rows = drawn.to(model.device)
        tokens = rows.tokens[:, :-1]  # the last token of a row predicts nothing in it

        def reference_logits() -> Tensor:
            with reference().active() as active:
                return active.logits(tokens)

        loss = self._from_hidden(model, reference, rows, tokens) if self.loss.takes_hidden else None
        if loss is None:
            loss = self.loss(model.logits(tokens), rows, reference_logits)
        self.seconds += time.perf_counter() - started
        return output, loss

    def _from_hidden(
        self, model: LanguageModel, reference: Callable[[], ReferenceModel], rows: ReplayRows, tokens: Tensor
    ) -> Tensor | None:
        """The loss on replay rows, without logits of the whole batch; None if whole logits are to be taken.

        The reference comes first: its hidden states and its head are all that is left of it when the model is called.
        """
        if self._heads.of(model) is None:
            return None
        before: HiddenStates | None = None
        if self.loss.asks_reference(rows):
            source = reference()
            with source.active() as active:
                # A layer with an adapter is another one when the adapter is switched on again.
                stays = source.weights_stay

                def keep(given: HiddenStates) -> HiddenStates | None:
                    is_own = isinstance(given.head, LinearHead) or active.module is not model.module
                    return given.kept(copy=not (stays and is_own))

                before = self._heads.run(active, lambda asked: asked.logits(tokens), keep)
            if before is None:
                return None
        loss = functools.partial(self.loss.on_hidden, rows=rows, reference=before)
        return self._heads.run(model, lambda asked: asked.logits(tokens), loss)

    def _on_new_rows(
        self, model: LanguageModel, reference: Callable[[], ReferenceModel], step: Callable[[], Any], batch: Any
    ) -> tuple[Any, Tensor | None]:
        """What the user's step returns, and the divergence on the rows of its own batch."""
        with observed_forward(model) as observed:
            output = step()
        if output is None:
            return None, None
        if observed.logits is None:
            raise _never_called(model)
        started = time.perf_counter()
        with reference().active() as active:
            reference_logits = observed.ask(active)
        assert isinstance(self.loss, LwF)
        loss = self.loss.on_logits(observed.logits, reference_logits, _new_targets(batch, observed, self.ignore_index))
        self.seconds += time.perf_counter() - started
        return output, loss

    def _coefficient(self, step: int) -> float:
        if not callable(self.coefficient):
            return self.coefficient
        value = self.coefficient(step)
        _check_coefficient(value, f"What the schedule `coefficient` returned for step {step}")
        return float(value)


def _new_targets(batch: Any, observed: ObservedForward, ignore_index: int) -> Tensor | None:
    """True where the next token of a new row is neither padding nor left out of the user's loss; None if unknown.

    The batch knows best; where it is of a kind of its own, the arguments of the model's call may tell.
    """
    assert observed.logits is not None
    rows, positions = observed.logits.shape[:2]
    targets: Tensor | None
    try:
        targets = inputs_and_targets(batch)[2]
    except TypeError:
        targets = observed.argument("labels")
        attention = observed.argument("attention_mask")
        if targets is None and attention is not None:
            targets = attention.long() - 1  # padding counts as left out
        targets = None if targets is None else F.pad(targets[:, 1:], (0, 1), value=-100)
    if targets is None or len(targets) != rows or targets.shape[1] < positions:
        return None
    targets = targets[:, :positions]
    return (targets >= 0) & (targets != ignore_index)


def _never_called(model: LanguageModel) -> MisconfigurationException:
    return MisconfigurationException(
        f"`training_step` never called {type(model.module).__name__}, whose logits replay needs. Call the "
        "module itself, not its `forward`, or say with `language_model` which module it does call."
    )


def _check_coefficient(value: Any, what: str) -> None:
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{what} is what the replay loss is multiplied by, at least 0 and finite; got {value!r}.")


def _with_added_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] + loss}
    return output + loss


def _restore_training_step(pl_module: pl.LightningModule, of_instance: Any) -> None:
    """Give back the step that the instance had of its own, or else that of its class."""
    del pl_module.training_step
    if of_instance is not None:
        pl_module.training_step = of_instance  # type: ignore[method-assign]
