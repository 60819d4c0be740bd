"""Losses of hidden states and a head against the same losses of whole logits, and what they keep in memory."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lightning_replay import head_chunks
from lightning_replay.head_chunks import CalledHead, LinearHead, LogitTransform
from lightning_replay.linear_losses import (
    divergence_of_heads,
    linear_divergence,
    linear_divergence_from_top_k,
    linear_next_token_loss,
    linear_top_k_log_probs,
)
from lightning_replay.losses import (
    Divergence,
    divergence_from_top_k,
    forward_kl,
    jensen_shannon,
    next_token_loss,
    reverse_kl,
    top_k_log_probs,
)

ROWS, POSITIONS, WIDTH, VOCABULARY = 3, 7, 16, 50
WHOLE: dict[Divergence, Callable[..., Tensor]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jensen_shannon": jensen_shannon,
}
TRANSFORMS = [LogitTransform(), LogitTransform(0.25), LogitTransform(2.0, 3.0), LogitTransform(1.0, 30.0, 44)]


@pytest.fixture(params=[1, 4, 21, 1000], ids=lambda positions: f"{positions} positions a chunk")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one position, with a remainder, of all positions, and larger."""
    monkeypatch.setitem(head_chunks._CHUNK, "cpu", (request.param * VOCABULARY, 1))


class Given:
    """Hidden states and heads of a model and a reference, with leaves to differentiate."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(ROWS, POSITIONS, WIDTH).to(dtype).requires_grad_()
        self.weight = (torch.randn(VOCABULARY, WIDTH) / 2).to(dtype).requires_grad_()
        self.bias = torch.randn(VOCABULARY).to(dtype).requires_grad_()
        self.reference_hidden = torch.randn(ROWS, POSITIONS, 8).to(dtype)
        # As in a module whose parameters were not frozen.
        self.reference_weight = (torch.randn(VOCABULARY, 8) / 2).to(dtype).requires_grad_()
        self.mask = torch.rand(ROWS, POSITIONS) < 0.7
        self.targets = torch.randint(44, (ROWS, POSITIONS))

    def logits(self, transform: LogitTransform = TRANSFORMS[0]) -> Tensor:
        return transform(F.linear(self.hidden, self.weight, self.bias))

    def reference_logits(self, transform: LogitTransform = TRANSFORMS[0]) -> Tensor:
        return transform(F.linear(self.reference_hidden, self.reference_weight))

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Of three times the loss, as of a loss with a coefficient."""
        (3 * loss).backward()
        assert self.reference_weight.grad is None
        found = []
        for leaf in (self.hidden, self.weight, self.bias):
            assert leaf.grad is not None
            assert leaf.grad.dtype == leaf.dtype
            found.append(leaf.grad)
            leaf.grad = None
        return found

    def compare(self, ours: Tensor, theirs: Tensor) -> None:
        """Both compute divergences in 32 bits, with sums over 50 outcomes: 50 * 6e-8 = 3e-6."""
        torch.testing.assert_close(ours.float(), theirs.float(), atol=3e-6, rtol=3e-6)
        for our_gradient, gradient in zip(self.gradients(ours), self.gradients(theirs), strict=True):
            torch.testing.assert_close(our_gradient, gradient, atol=3e-6 * float(gradient.abs().max()), rtol=1e-5)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradients_of_divergences_are_those_of_whole_logits(
    kind: Divergence, transform: LogitTransform, masked: bool, temperature: float
) -> None:
    given = Given()
    mask = given.mask if masked else None
    ours = linear_divergence(
        given.hidden,
        given.weight,
        given.reference_hidden,
        given.reference_weight,
        bias=given.bias,
        mask=mask,
        kind=kind,
        temperature=temperature,
        transform=transform,
    )
    reference = given.reference_logits(transform).detach()
    given.compare(ours, WHOLE[kind](given.logits(transform), reference, mask, temperature=temperature))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradients_of_the_next_token_loss_are_those_of_whole_logits(
    transform: LogitTransform, masked: bool
) -> None:
    given = Given()
    given.targets[0, 2] = -100  # which `F.cross_entropy` ignores
    mask = given.mask if masked else None
    ours = linear_next_token_loss(given.hidden, given.weight, given.targets, given.bias, mask, transform)
    given.compare(ours, next_token_loss(given.logits(transform), given.targets, mask))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("k", [5, 50])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cached_reference_is_made_and_compared_as_with_whole_logits(
    kind: Divergence, k: int, temperature: float
) -> None:
    given = Given(torch.float32)
    cached = linear_top_k_log_probs(given.reference_hidden, given.reference_weight, k, temperature=temperature)
    expected = top_k_log_probs(given.reference_logits(), k, temperature)
    assert torch.equal(cached[0], expected[0])
    torch.testing.assert_close(cached[1], expected[1])
    assert not cached[1].requires_grad
    ours = linear_divergence_from_top_k(
        given.hidden, given.weight, *cached, given.bias, given.mask, kind=kind, temperature=temperature
    )
    theirs = divergence_from_top_k(given.logits(), *cached, given.mask, kind=kind, temperature=temperature)
    given.compare(ours, theirs)


@pytest.mark.usefixtures("chunk")
def test_a_head_that_is_called_has_the_gradients_of_its_parameters() -> None:
    given = Given()

    def function(hidden: Tensor) -> Tensor:
        return F.linear(torch.tanh(hidden), given.weight, given.bias)

    head = CalledHead(function, VOCABULARY, (given.weight, given.bias), LogitTransform(2.0, 3.0))
    reference = LinearHead(given.reference_weight)
    ours = divergence_of_heads(
        given.hidden, head, given.reference_hidden, reference, given.mask, kind="reverse", temperature=1.0
    )
    logits = LogitTransform(2.0, 3.0)(function(given.hidden))
    given.compare(ours, reverse_kl(logits, given.reference_logits().detach(), given.mask))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("kind", WHOLE)
def test_16_bit_gradients_are_as_near_to_the_exact_ones_as_those_of_whole_logits(kind: Divergence) -> None:
    rounded = Given(torch.bfloat16)
    exact = Given(torch.bfloat16)
    for name in ("hidden", "weight", "bias", "reference_hidden", "reference_weight"):
        setattr(exact, name, getattr(exact, name).detach().double().requires_grad_("reference" not in name))
    truth = exact.gradients(WHOLE[kind](exact.logits(), exact.reference_logits(), exact.mask))
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does inside a step under bf16-true
    try:
        ours = linear_divergence(
            rounded.hidden,
            rounded.weight,
            rounded.reference_hidden,
            rounded.reference_weight,
            rounded.bias,
            mask=rounded.mask,
            kind=kind,
        )
        assert ours.dtype == torch.float32
        found = rounded.gradients(ours)
    finally:
        torch.set_default_dtype(torch.float32)
    theirs = rounded.gradients(WHOLE[kind](rounded.logits(), rounded.reference_logits().detach(), rounded.mask))
    for our_gradient, their_gradient, exact_gradient in zip(found, theirs, truth, strict=True):
        our_error, their_error = (
            float((part.double() - exact_gradient).norm() / exact_gradient.norm())
            for part in (our_gradient, their_gradient)
        )
        assert our_error < 1.5 * their_error + 2**-9


def test_a_mask_that_selects_nothing_gives_zero_and_gradients_of_zero() -> None:
    given = Given()
    mask = torch.zeros_like(given.mask)
    loss = linear_divergence(
        given.hidden, given.weight, given.reference_hidden, given.reference_weight, given.bias, mask=mask
    )
    assert float(loss.detach()) == 0
    assert all(not gradient.any() for gradient in given.gradients(loss))


def test_positions_that_the_mask_leaves_out_take_no_work() -> None:
    seen: list[int] = []

    def function(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return hidden @ given.weight.t()

    given = Given()
    head = CalledHead(function, VOCABULARY, (given.weight,))
    divergence_of_heads(given.hidden, head, given.hidden.detach(), head, given.mask, "forward", 1.0)
    assert sum(seen) == 2 * int(given.mask.sum())


def test_only_what_needs_a_gradient_gets_one() -> None:
    given = Given()
    given.weight.requires_grad_(False)
    loss = linear_next_token_loss(given.hidden, given.weight, given.targets)
    loss.backward()
    assert given.weight.grad is None
    assert given.hidden.grad is not None
    with torch.no_grad():
        assert not linear_next_token_loss(given.hidden, given.weight, given.targets).requires_grad


def test_the_gradient_of_the_weight_is_handed_over_so_that_a_tied_embedding_adds_to_it_in_place() -> None:
    given = Given(torch.float32)
    loss = linear_next_token_loss(given.hidden, given.weight, given.targets)
    (gradient,) = torch.autograd.grad(loss, given.weight)
    assert gradient._base is None  # autograd copies a view before it adds to it


def test_a_loss_that_is_differentiated_twice_is_refused() -> None:
    given = Given()
    loss = linear_next_token_loss(given.hidden, given.weight, given.targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Compute the loss again"):
        loss.backward()


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [
            part.untyped_storage().size() // part.element_size()
            for part in tree_flatten(output)[0]
            if isinstance(part, Tensor)
        ]
        self.numbers = max([self.numbers, *sizes])
        return output


@pytest.mark.parametrize("loss", ["divergence", "next token", "top k"])
def test_nothing_of_the_size_of_positions_times_vocabulary_is_made(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    positions, vocabulary, width = 512, 1000, 8
    monkeypatch.setitem(head_chunks._CHUNK, "cpu", (16 * vocabulary, 1))
    hidden = torch.randn(1, positions, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    with Largest() as largest:
        if loss == "divergence":
            value = linear_divergence(hidden, weight, hidden.detach(), weight.detach() * 1.1)
        elif loss == "next token":
            value = linear_next_token_loss(hidden, weight, torch.randint(vocabulary, (1, positions)))
        else:
            cached = linear_top_k_log_probs(hidden, weight, 4)
            value = linear_divergence_from_top_k(hidden, weight, *cached)
        value.backward()
    assert largest.numbers <= 2 * 16 * vocabulary
    assert hidden.grad is not None
    assert math.isfinite(float(hidden.grad.norm()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: linear_divergence(g.hidden, g.weight, g.hidden[:, 1:], g.weight), "same positions"),
        (lambda g: linear_divergence(g.hidden, g.weight, g.hidden, g.weight[1:]), "same vocabulary"),
        (lambda g: linear_divergence(g.hidden, g.weight, g.hidden, g.weight, temperature=0.0), "temperature"),
        (lambda g: linear_divergence(g.hidden, g.weight, g.hidden, g.weight, mask=g.mask[1:]), "`mask` is True"),
        (lambda g: linear_divergence(g.hidden, g.weight, g.hidden, g.weight, mask=g.mask.float()), "`mask` is True"),
        (lambda g: linear_next_token_loss(g.hidden, g.weight, g.targets[:, 1:]), "targets of shape"),
        (lambda g: linear_divergence_from_top_k(g.hidden, g.weight, g.targets[..., None], g.hidden), "k ids"),
        (lambda g: linear_top_k_log_probs(g.hidden, g.weight, 51), "from 1 to 50"),
        (lambda g: LogitTransform(softcap=0.0), "softcap"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[Given], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Given())
