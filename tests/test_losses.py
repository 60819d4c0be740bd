import math

import pytest
import torch
from torch import nn

from lightning_replay import forward_kl, next_token_loss


def test_forward_kl_equals_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 3, 5, 7, generator=generator)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=reference), torch.distributions.Categorical(logits=logits)
    )
    torch.testing.assert_close(forward_kl(logits, reference), expected.mean())
    torch.testing.assert_close(forward_kl(logits, reference, reduction="none"), expected)
    mask = torch.rand(3, 5, generator=generator) > 0.5
    torch.testing.assert_close(forward_kl(logits, reference, mask), expected[mask].mean())


def test_forward_kl_has_the_closed_form_gradient() -> None:
    logits = torch.randn(2, 3, 7, requires_grad=True)
    reference = torch.randn(2, 3, 7, requires_grad=True)
    forward_kl(logits, reference).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, (logits.softmax(-1) - reference.softmax(-1)).detach() / 6)
    assert reference.grad is None


def test_forward_kl_of_equal_models_is_zero_and_never_negative() -> None:
    logits = torch.randn(4, 5, 11)
    assert forward_kl(logits, logits).item() == 0
    assert (forward_kl(logits, torch.randn(4, 5, 11), reduction="none") > 0).all()


def test_bfloat16_logits_are_compared_in_32_bits() -> None:
    logits, reference = torch.randn(2, 2, 3, 7).bfloat16()
    torch.testing.assert_close(forward_kl(logits, reference), forward_kl(logits.float(), reference.float()))
    assert forward_kl(logits, reference).dtype == torch.float32


def test_next_token_loss_equals_torch_and_honours_the_mask() -> None:
    logits, targets = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    torch.testing.assert_close(next_token_loss(logits, targets), nn.CrossEntropyLoss()(logits.mT, targets))
    mask = torch.tensor([[True, False, False], [True, True, False]])
    ignored = targets.masked_fill(~mask, -100)
    torch.testing.assert_close(next_token_loss(logits, targets, mask), nn.CrossEntropyLoss()(logits.mT, ignored))


def test_an_empty_mask_gives_zero() -> None:
    logits, mask = torch.randn(2, 3, 7), torch.zeros(2, 3, dtype=torch.bool)
    assert forward_kl(logits, logits + 1, mask).item() == 0
    assert next_token_loss(logits, torch.zeros(2, 3, dtype=torch.int64), mask).item() == 0


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) and \(1, 2, 4\)"):
        forward_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match=r"targets of shape \(1, 2\); got \(1, 3\)"):
        next_token_loss(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.int64))


def test_a_uniform_model_loses_the_logarithm_of_the_vocabulary() -> None:
    assert next_token_loss(torch.zeros(1, 4, 50), torch.tensor([[3, 1, 4, 1]])).item() == pytest.approx(math.log(50))
