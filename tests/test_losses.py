import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

from lightning_replay import (
    divergence_from_top_k,
    forward_kl,
    jensen_shannon,
    next_token_loss,
    reverse_kl,
    top_k_log_probs,
)


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


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Torch's default type as Lightning sets it inside a step under a true precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def in_64_bits(kind: str, logits: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """Definitions of the divergences, computed on the same logits."""
    p, q = ((each.double() / temperature).softmax(-1) for each in (logits, reference))
    m = (p + q) / 2
    terms = {
        "forward": q * (q / p).log(),
        "reverse": p * (p / q).log(),
        "jensen_shannon": (q * (q / m).log() + p * (p / m).log()) / 2,
    }
    return terms[kind].sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
def test_losses_are_computed_in_32_bits_whatever_the_default_type(
    default_dtype: torch.dtype, kind: Any, temperature: float
) -> None:
    given, reference = (2 * torch.randn(2, 2, 3, 12, dtype=torch.float64)).to(default_dtype)
    logits, targets = given.clone().requires_grad_(), torch.randint(12, (2, 3))
    divergence = {"forward": forward_kl, "reverse": reverse_kl, "jensen_shannon": jensen_shannon}[kind]
    values = divergence(logits, reference, reduction="none", temperature=temperature)
    top_k = top_k_log_probs(reference, 12, temperature)
    cached = divergence_from_top_k(logits, *top_k, kind=kind, reduction="none", temperature=temperature)
    next_token = next_token_loss(logits, targets)
    assert values.dtype == cached.dtype == next_token.dtype == top_k[1].dtype == torch.float32
    expected = in_64_bits(kind, given, reference, temperature).float()
    torch.testing.assert_close(values.detach(), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(cached.detach(), expected, atol=2e-6, rtol=1e-5)
    by_torch = nn.functional.cross_entropy(given.double().mT, targets)
    torch.testing.assert_close(next_token.detach(), by_torch.float())
    values.mean().backward()
    hand = given.double().requires_grad_()
    in_64_bits(kind, hand, reference, temperature).mean().backward()
    assert logits.grad is not None
    assert hand.grad is not None
    # Computed in 32 bits and rounded once, to the type of the logits.
    torch.testing.assert_close(
        logits.grad.double(), hand.grad, atol=1e-7, rtol=max(torch.finfo(default_dtype).eps, 1e-4)
    )


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


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_equal_those_of_other_libraries(temperature: float) -> None:
    logits, reference = torch.randn(2, 3, 5, 7)
    ours = torch.distributions.Categorical(logits=logits / temperature)
    theirs = torch.distributions.Categorical(logits=reference / temperature)
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(forward_kl(logits, reference, temperature=temperature), kl(theirs, ours).mean())
    torch.testing.assert_close(reverse_kl(logits, reference, temperature=temperature), kl(ours, theirs).mean())
    # SciPy returns the square root of the divergence.
    distance = jensenshannon(ours.probs.double().numpy(), theirs.probs.double().numpy(), axis=-1)
    values = jensen_shannon(logits, reference, reduction="none", temperature=temperature)
    torch.testing.assert_close(values.double(), torch.from_numpy(distance**2), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jensen_shannon])
def test_gradients_of_divergences_are_those_of_their_definitions(divergence: Any) -> None:
    logits, reference = torch.randn(2, 2, 3, 7)
    ours, hand = logits.clone().requires_grad_(), logits.double().clone().requires_grad_()
    p, q = hand.softmax(-1), reference.double().softmax(-1)
    m = (p + q) / 2
    definition = {
        forward_kl: (q * (q / p).log()),
        reverse_kl: (p * (p / q).log()),
        jensen_shannon: 0.5 * (q * (q / m).log() + p * (p / m).log()),
    }[divergence]
    definition.sum(-1).mean().backward()
    divergence(ours, reference).backward()
    assert ours.grad is not None
    assert hand.grad is not None
    torch.testing.assert_close(ours.grad.double(), hand.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jensen_shannon])
def test_tokens_that_both_models_rule_out_change_nothing(divergence: Any) -> None:
    logits, reference = torch.randn(2, 2, 3, 7)
    without = divergence(logits, reference)
    impossible = torch.full((2, 3, 2), -torch.inf)
    padded = torch.cat([logits, impossible], -1).requires_grad_()
    value = divergence(padded, torch.cat([reference, impossible], -1))
    torch.testing.assert_close(value.detach(), without)
    value.backward()
    assert padded.grad is not None
    assert bool(padded.grad.isfinite().all())


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
@given(k=st.integers(1, 12), seed=st.integers(0, 1000), temperature=st.sampled_from([1.0, 0.5, 3.0]))
@settings(max_examples=25, deadline=None)
def test_a_top_k_divergence_is_a_lower_bound_and_exact_with_the_whole_vocabulary(
    kind: Any, k: int, seed: int, temperature: float
) -> None:
    logits, reference = 2 * torch.randn(2, 2, 3, 12, generator=torch.Generator().manual_seed(seed))
    full = {"forward": forward_kl, "reverse": reverse_kl, "jensen_shannon": jensen_shannon}[kind]
    exact = full(logits, reference, reduction="none", temperature=temperature)
    ids, log_probs = top_k_log_probs(reference, k, temperature)
    bound = divergence_from_top_k(logits, ids, log_probs, None, "none", kind, temperature)
    assert bool((bound <= exact + 1e-5).all())
    if k == 12:
        torch.testing.assert_close(bound, exact, atol=1e-5, rtol=1e-5)
    if kind == "forward":
        # What is missing is the divergence within the tail, weighted by the reference's probability of the tail.
        p, q = (logits / temperature).double().softmax(-1), (reference / temperature).double().softmax(-1)
        tail = torch.ones_like(p).scatter(-1, ids, 0.0)
        p_tail, q_tail = p * tail, q * tail
        inside = q_tail * ((q_tail / q_tail.sum(-1, keepdim=True)) / (p_tail / p_tail.sum(-1, keepdim=True))).log()
        missing = inside.nan_to_num(0.0).sum(-1)
        torch.testing.assert_close(bound.double() + missing, exact.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 5, 11, 12])
def test_the_gradient_of_a_top_k_divergence_is_that_of_its_definition(k: int) -> None:
    logits, reference = torch.randn(2, 2, 3, 12)
    ids, log_probs = top_k_log_probs(reference, k)
    ours, hand = logits.clone().requires_grad_(), logits.double().requires_grad_()
    in_buckets = []
    for probs in (hand.softmax(-1), reference.double().softmax(-1)):
        chosen = probs.gather(-1, ids)
        in_buckets.append(torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)[..., : k + (k < 12)])
    p, q = in_buckets
    (q * (q / p).log()).sum(-1).mean().backward()
    divergence_from_top_k(ours, ids, log_probs).backward()
    assert ours.grad is not None
    assert hand.grad is not None
    torch.testing.assert_close(ours.grad.double(), hand.grad, atol=1e-7, rtol=1e-4)


def test_a_top_k_divergence_of_equal_models_is_zero_even_from_16_bits() -> None:
    logits = 3 * torch.randn(4, 5, 50)
    ids, log_probs = top_k_log_probs(logits, 8)
    assert float(divergence_from_top_k(logits, ids, log_probs)) == pytest.approx(0.0, abs=1e-6)
    assert float(divergence_from_top_k(logits, ids.int(), log_probs.half())) == pytest.approx(0.0, abs=1e-5)


def test_top_k_of_a_vocabulary_in_which_the_tail_is_impossible_has_finite_gradients() -> None:
    reference = torch.tensor([[[0.0, 1.0, -torch.inf, -torch.inf]]])
    logits = torch.tensor([[[1.0, 0.0, -torch.inf, -torch.inf]]], requires_grad=True)
    value = divergence_from_top_k(logits, *top_k_log_probs(reference, 2))
    torch.testing.assert_close(value.detach(), forward_kl(logits.detach(), reference))
    value.backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forward_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), temperature=0.0), "`temperature`"),
        (lambda: top_k_log_probs(torch.zeros(1, 2, 3), 4), "from 1 to 3, the size of the vocabulary; got 4"),
        (lambda: top_k_log_probs(torch.zeros(1, 2, 3), 0), "got 0"),
        (
            lambda: divergence_from_top_k(
                torch.zeros(1, 2, 3), torch.zeros(1, 2, 1, dtype=torch.int64), torch.zeros(1, 2, 1)
            ),
            "k ids and k \\+ 1 log-probabilities",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
