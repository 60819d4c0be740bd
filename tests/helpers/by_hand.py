"""Replay written into the user's own step, to compare with."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_replay import (
    next_token_loss,
)
from tests.helpers.modules import (
    PlainDescent,
    quiet_trainer,
)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def train(module: L.LightningModule, data: Any, *callbacks: Any, **options: Any) -> L.Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), **options)
    if isinstance(data, L.LightningDataModule):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, data)
    return trainer


def kl_by_hand(of: Tensor, given: Tensor) -> Tensor:
    of, given = of.float(), given.float()
    return (of.softmax(-1) * (of.log_softmax(-1) - given.log_softmax(-1))).sum(-1).mean()


DIVERGENCES_BY_HAND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda ours, theirs: kl_by_hand(theirs, ours),
    "reverse": kl_by_hand,
    "softened": lambda ours, theirs: kl_by_hand(theirs / 2, ours / 2),
}


class ByHand(PlainDescent):
    """The same training with the replay loss written into the step, on rows and a reference of its own.

    The rows go through a forward of their own.
    """

    def __init__(
        self, model: nn.Module, reference: nn.Module, rows: list[Tensor], loss: str, coefficient: float
    ) -> None:
        super().__init__(model)
        self.rows = rows
        self.replay_loss = loss
        self.coefficient = coefficient
        self.reference: list[nn.Module] = [reference.eval()]  # in a list, so that it is not a part of the module

    def loss(self, batch: Any) -> Tensor:
        rows = self.rows[self.trainer.fit_loop.total_batch_idx]
        own, logits = super().loss(batch), self.model(rows[:, :-1]).logits
        if self.replay_loss == "ntp":
            added = next_token_loss(logits, rows[:, 1:])
        else:
            with torch.no_grad():
                reference = self.reference[0](rows[:, :-1]).logits
            added = DIVERGENCES_BY_HAND[self.replay_loss](logits, reference)
        total: Tensor = own + self.coefficient * added
        return total
