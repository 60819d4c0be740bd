"""What replay adds to the loss of the user's `training_step`, without an edit to it."""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.data.batches import inputs_and_targets
from lightning_replay.data.replay import ReplayDataModule
from lightning_replay.losses import (
    Divergence,
    divergence_from_top_k,
    forward_kl,
    jensen_shannon,
    next_token_loss,
    reverse_kl,
)
from lightning_replay.models.hooks import ObservedForward, joint_forward, observed_forward
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.keeper import ReferenceKeeper
from lightning_replay.utilities.validation import is_number

__all__ = ["Forward", "ReplayObjective"]

Forward = Literal["auto", "joint", "separate"]


class ReplayObjective:
    """Adds ``coefficient`` times the replay loss to what ``training_step`` returns.

    Args:
        loss: ``"kl"``, ``"ntp"`` or ``"lwf"``; see ``SelfGeneratedReplay``, as for all others.
        coefficient: What the replay loss is multiplied by: a number, or a function of the optimizer step.
        divergence: Which divergence.
        temperature: That of the divergence.
        reference: Keeps the reference model.
        forward: How replay rows go through the model.
        ignore_index: The label that the user's loss leaves out.

    Attributes:
        last_loss: The replay loss of the last step, without the coefficient, on the rows of this process; None as long
            as there was none.
        last_coefficient: What it was multiplied by.
        seconds: Wall-clock time spent in forwards and losses of replay, as the host sees it: an accelerator may still
            be at work. The backward is not in it.

    Raises:
        ValueError: If ``coefficient`` is negative or not a number.
    """

    def __init__(
        self,
        loss: str,
        coefficient: float | Callable[[int], float],
        divergence: Divergence,
        temperature: float,
        reference: ReferenceKeeper,
        forward: Forward,
        ignore_index: int,
    ) -> None:
        if not callable(coefficient):
            _check_coefficient(coefficient, "`coefficient`")
        self.loss = loss
        self.coefficient = coefficient
        self.divergence: Divergence = divergence
        self.temperature = temperature
        self.reference = reference
        self.forward: Forward = forward
        self.ignore_index = ignore_index
        self.last_loss: Tensor | None = None
        self.last_coefficient = 0.0
        self.seconds = 0.0

    def wrap(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: LanguageModel, data: ReplayDataModule | None
    ) -> Callable[[], None]:
        """Put a step that adds the replay loss in the place of the module's own, as an attribute of the instance.

        It runs wherever Lightning runs `training_step`: inside DDP's forward, inside autocast, before the loss is
        divided for gradient accumulation. So the replay loss is scaled and synchronised as the user's is. Where several
        processes average their gradients, each weighs its replay loss by its share of the target tokens, so that all
        count the same.

        Args:
            trainer: The Trainer.
            pl_module: The module whose step to wrap.
            model: The language model in it.
            data: Where replay rows are drawn; None for ``"lwf"``, which takes the new ones.

        Returns:
            A function that puts everything back.
        """
        original, self.last_loss = pl_module.training_step, None

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            step = functools.partial(original, *args, **kwargs)
            if data is None:
                output, loss = self._on_new_rows(trainer, model, step, args[0])
            else:
                output, loss = self._on_replay_rows(trainer, model, step, data.drawn)
            if output is None or loss is None:  # None is Lightning's way to skip a step
                return output
            self.last_loss, self.last_coefficient = loss.detach(), self._coefficient(trainer.global_step)
            weight = 1.0 if data is None else data.drawn_weight
            return _with_added_loss(output, self.last_coefficient * weight * loss)

        of_instance = vars(pl_module).get("training_step")
        pl_module.training_step = training_step  # type: ignore[method-assign]
        return functools.partial(_restore_training_step, pl_module, of_instance)

    def _on_replay_rows(
        self, trainer: pl.Trainer, model: LanguageModel, step: Callable[[], Any], drawn: ReplayRows | None
    ) -> tuple[Any, Tensor | None]:
        """What the user's step returns, and the loss on the rows drawn for it."""
        if drawn is None:
            return step(), None
        rows = drawn.to(model.device)
        tokens = rows.tokens[:, :-1]  # the last token of a row predicts nothing in it
        if self.forward == "joint" or (self.forward == "auto" and model.device.type != "cpu"):
            with joint_forward(model, tokens, self.ignore_index) as joint:
                output = step()
            if output is not None and joint.logits is None:
                raise _never_called(model)
            logits = joint.logits
        else:
            output, logits = step(), None
        if output is None:
            return None, None
        started = time.perf_counter()
        loss = self._replay_loss(trainer, model, model.logits(tokens) if logits is None else logits, rows)
        self.seconds += time.perf_counter() - started
        return output, loss

    def _replay_loss(self, trainer: pl.Trainer, model: LanguageModel, logits: Tensor, rows: ReplayRows) -> Tensor:
        """The loss on replay rows, from the model's logits after each of their tokens but the last."""
        if self.loss == "ntp":
            return next_token_loss(logits, rows.tokens[:, 1:], rows.targets_mask)
        if rows.top_ids is not None and rows.top_log_probs is not None:
            return divergence_from_top_k(
                logits,
                rows.top_ids,
                rows.top_log_probs,
                rows.targets_mask,
                kind=self.divergence,
                temperature=self.temperature,
            )
        with self.reference.get(trainer, model).active() as reference:
            reference_logits = reference.logits(rows.tokens[:, :-1])
        return self._divergence(logits, reference_logits, rows.targets_mask)

    def _on_new_rows(
        self, trainer: pl.Trainer, model: LanguageModel, step: Callable[[], Any], batch: Any
    ) -> tuple[Any, Tensor | None]:
        """What the user's step returns, and the divergence on the rows of its own batch."""
        with observed_forward(model) as observed:
            output = step()
        if output is None:
            return None, None
        if observed.logits is None:
            raise _never_called(model)
        started = time.perf_counter()
        with self.reference.get(trainer, model).active() as reference:
            reference_logits = observed.ask(reference)
        mask = _new_targets(batch, observed, self.ignore_index)
        loss = self._divergence(observed.logits, reference_logits, mask)
        self.seconds += time.perf_counter() - started
        return output, loss

    def _divergence(self, logits: Tensor, reference_logits: Tensor, mask: Tensor | None) -> Tensor:
        function = {"forward": forward_kl, "reverse": reverse_kl, "jensen_shannon": jensen_shannon}[self.divergence]
        return function(logits, reference_logits, mask, temperature=self.temperature)

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
