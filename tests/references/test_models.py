"""References that hold weights: a frozen copy and a moving average."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from lightning_replay.references.models import FrozenCopy, LiveModel, MovingAverage
from tests.helpers.modules import VOCABULARY
from tests.helpers.references import TOKENS, of

Make = Callable[..., LlamaForCausalLM]


def test_a_frozen_copy_keeps_the_weights_it_was_made_from(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    before = model.logits(TOKENS).detach()
    copy = FrozenCopy(model)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(1)
    with copy.active() as frozen:
        assert torch.equal(frozen.logits(TOKENS), before)
        assert not any(parameter.requires_grad for parameter in frozen.module.parameters())


def test_a_copy_can_be_kept_in_fewer_bits(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    with FrozenCopy(model, dtype=torch.bfloat16, device="cpu").active() as reference:
        assert {parameter.dtype for parameter in reference.module.parameters()} == {torch.bfloat16}
        logits = reference.logits(TOKENS)
    assert logits.dtype == torch.bfloat16
    exact = model.logits(TOKENS).detach()
    assert float((logits - exact).norm() / exact.norm()) < 0.03
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}


def test_a_copy_in_fewer_bits_is_the_model_that_is_loaded_in_them(tiny_llama: Make, tmp_path: Path) -> None:
    """Frequencies of rotary positions stay exact: their error would grow with the position."""
    module = tiny_llama(max_position_embeddings=256)
    module.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    tokens = torch.arange(256).unsqueeze(0) % VOCABULARY
    with torch.no_grad(), FrozenCopy(of(module), dtype=torch.bfloat16).active() as reference:
        assert torch.equal(reference.logits(tokens), loaded(tokens).logits)


def test_a_moving_average_equals_its_closed_form(tiny_llama: Make) -> None:
    model, decay = of(tiny_llama()), 0.9
    average = MovingAverage(model, decay)
    start = model.module.lm_head.weight.detach().clone()  # type: ignore[union-attr,operator]
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.add_(1.0)
        average.follow(model)
        with average.active() as reference:
            # Weights w + t after step t: the average lags behind by the sum of the powers of the decay.
            lag = sum(decay**i for i in range(1, step + 1))
            expected = start + step - lag
            torch.testing.assert_close(reference.module.lm_head.weight, expected)  # type: ignore[union-attr]


def test_only_a_moving_average_follows_the_model(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    before = model.logits(TOKENS).detach()
    references = [FrozenCopy(model), MovingAverage(model, 0.5), LiveModel(model)]
    with torch.no_grad():
        model.module.lm_head.weight.mul_(3)  # type: ignore[union-attr,operator]
    answers = []
    for reference in references:
        reference.follow(model)
        with reference.active() as active:
            answers.append(active.logits(TOKENS))
    # The logits are linear in the head, whose average of 1 and 3 is 2.
    for answer, factor in zip(answers, (1, 2, 3), strict=True):
        torch.testing.assert_close(answer, factor * before)
