"""A scheduler's notice that arrives in work that takes longer than a batch."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers import LlamaForCausalLM

from lightning_replay import SelfGeneratedReplay
from tests.helpers.modules import UserModule, mapping_loader, quiet_trainer

Make = Callable[..., LlamaForCausalLM]


class Notified(UserModule):
    """Counts the calls of its model, of copies as well; at one of them the process gets the signal."""

    def __init__(self, model: Any, at: int | None) -> None:
        super().__init__(model)
        self.calls = 0

        def count(module: Any, arguments: Any, output: Any) -> None:
            self.calls += 1
            if self.calls == at:
                os.kill(os.getpid(), signal.SIGTERM)

        model.register_forward_hook(count)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.before_the_first_step = self.calls
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("options", [{"loss": "ntp", "source": "live"}, {"reference": "cached"}], ids=["ntp", "cached"])
def test_a_first_fill_ends_at_the_next_token(tiny_llama: Make, options: dict[str, Any]) -> None:
    def fit(module: Notified) -> None:
        torch.manual_seed(0)
        replay = SelfGeneratedReplay(replay_fraction=0.2, seed=1, **options)
        quiet_trainer(callbacks=[replay], max_steps=1).fit(module, mapping_loader())

    whole = Notified(tiny_llama(), None)
    fit(whole)
    undisturbed = whole.before_the_first_step
    module = Notified(tiny_llama(), undisturbed - 8)
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # one that another test left may end the process
    try:
        with pytest.raises(SIGTERMException):
            fit(module)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not module.batches
    assert module.calls <= undisturbed - 7
