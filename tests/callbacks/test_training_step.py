from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_replay import SelfGeneratedReplay
from tests.helpers.modules import PlainDescent, mapping_loader, quiet_trainer

Make = Callable[..., LlamaForCausalLM]

OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda loss: loss.item(),
    "a detached loss": lambda loss: loss.detach(),
    "a mapping with a detached loss": lambda loss: {"loss": loss.detach()},
    "a mapping with a number": lambda loss: {"loss": loss.item()},
    "a mapping without a loss": lambda loss: {"value": loss},
    "a pair": lambda loss: (loss, loss),
    "a loss of several values": lambda loss: loss.expand(2),
}


class Returning(PlainDescent):
    """A module whose step returns something other than its loss."""

    def __init__(self, model: Any, change: Callable[[Tensor], Any]) -> None:
        super().__init__(model)
        self.change = change

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.change(self.loss(batch))


def error_of(module: Any, *callbacks: Any) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        quiet_trainer(callbacks=list(callbacks), max_steps=2).fit(module, mapping_loader())
    return caught.type, str(caught.value)


@pytest.mark.parametrize("loss", ["kl", "ntp", "lwf"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_step_that_cannot_be_trained_on_raises_the_error_it_raises_without_replay(
    tiny_llama: Make, output: str, loss: Any
) -> None:
    expected = error_of(Returning(tiny_llama(), OUTPUTS[output]))
    replay = SelfGeneratedReplay(loss, replay_fraction=None if loss == "lwf" else 0.2)
    assert error_of(Returning(tiny_llama(), OUTPUTS[output]), replay) == expected


def test_a_step_that_returns_none_is_skipped(tiny_llama: Make) -> None:
    model = tiny_llama()
    before = [parameter.clone() for parameter in model.parameters()]
    trainer = quiet_trainer(callbacks=[SelfGeneratedReplay(replay_fraction=0.2)], max_epochs=1, max_steps=-1)
    trainer.fit(Returning(model, lambda loss: None), mapping_loader())
    assert all(map(torch.equal, before, model.parameters()))
