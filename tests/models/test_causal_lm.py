import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_replay import CausalLM
from tests.helpers.modules import mapping_loader, quiet_trainer

Make = Callable[..., LlamaForCausalLM]


def test_a_local_folder_is_loaded_to_train(tiny_llama: Make, tmp_path: Path) -> None:
    original = tiny_llama().to(torch.bfloat16)
    original.save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        module = CausalLM(folder)
        assert all(child.training for child in module.model.modules())
        for ours, saved in zip(module.model.parameters(), original.parameters(), strict=True):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, saved.float())
        assert module.hparams["model"] == str(tmp_path)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_warms_up_and_follows_its_schedule(tiny_llama: Make, schedule: Any) -> None:
    rates: list[float] = []

    class Rates(CausalLM):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    module = Rates(tiny_llama(), learning_rate=1.0, warmup_steps=3, schedule=schedule)
    quiet_trainer(max_steps=11, max_epochs=-1).fit(module, mapping_loader())
    after = [1.0] * 8 if schedule == "constant" else [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, *after])


def test_the_schedule_ends_with_the_epochs_where_no_steps_are_given(tiny_llama: Make) -> None:
    module = CausalLM(tiny_llama(), learning_rate=1.0)
    trainer = quiet_trainer(max_steps=-1, max_epochs=2)
    trainer.fit(module, mapping_loader())
    assert trainer.global_step == 16
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_only_matrices_are_decayed_and_frozen_weights_left_out(tiny_llama: Make) -> None:
    module = CausalLM(tiny_llama(), weight_decay=0.3)
    module.model.get_input_embeddings().weight.requires_grad_(False)  # type: ignore[operator]
    module.trainer = quiet_trainer(max_steps=5)
    optimizer = cast("Any", module.configure_optimizers())["optimizer"]
    decayed, others = (group["params"] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(parameter.dim() >= 2 for parameter in decayed)
    assert all(parameter.dim() == 1 for parameter in others)
    assert len(decayed) + len(others) == sum(parameter.requires_grad for parameter in module.parameters())


def test_validation_loss_is_logged(tiny_llama: Make) -> None:
    module = CausalLM(tiny_llama())
    (logged,) = quiet_trainer().validate(module, mapping_loader(16), verbose=False)
    with torch.no_grad():
        expected = [module.model(**batch).loss for batch in mapping_loader(16)]
    assert logged["val/loss"] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "`learning_rate`"),
        ({"warmup_steps": -1}, "`warmup_steps`"),
        ({"schedule": "linear"}, "'cosine', 'constant'"),
    ],
)
def test_arguments_out_of_range_are_refused(tiny_llama: Make, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLM(tiny_llama(), **arguments)
