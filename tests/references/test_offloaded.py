"""A reference whose weights stay on another device than its forward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import LlamaForCausalLM

from lightning_replay import Copy, SelfGeneratedReplay, sample_rows
from lightning_replay.references.models import FrozenCopy
from lightning_replay.references.offloaded import OffloadedCopy, _plain_parts
from tests.helpers.modules import UserModule, mapping_loader, quiet_trainer
from tests.helpers.references import TOKENS, answer, of

Make = Callable[..., LlamaForCausalLM]


@pytest.mark.parametrize("tied", [False, True])
def test_it_answers_and_samples_as_a_copy_that_stays(tiny_llama: Make, tied: bool) -> None:
    model = of(tiny_llama(tie_word_embeddings=tied))
    stays, streamed = FrozenCopy(model), OffloadedCopy(model, device="cpu")
    for _ in range(2):  # the second time, weights are fetched ahead
        assert torch.equal(answer(stays), answer(streamed))
    with stays.active() as one, streamed.active() as other:
        samples = [sample_rows(each, [[1]] * 3, 12, torch.Generator().manual_seed(0)).tokens for each in (one, other)]
    assert torch.equal(*samples)


def test_only_two_modules_have_their_weights_where_it_computes(tiny_llama: Make) -> None:
    reference = OffloadedCopy(of(tiny_llama(num_hidden_layers=3)), device="cpu")
    answer(reference)
    with reference.active() as model:
        holders = [part for part in model.module.modules() if [*part.parameters(recurse=False)]]
        homes = {part: [weight.data_ptr() for weight in part.parameters(recurse=False)] for part in holders}
        largest = 0

        def look(part: nn.Module, args: Any) -> None:
            nonlocal largest
            away = [
                other
                for other in holders
                if [weight.data_ptr() for weight in other.parameters(recurse=False)] != homes[other]
            ]
            assert away == [part]
            largest = max(largest, len(reference._fetching._ahead))

        handles = [part.register_forward_pre_hook(look) for part in holders]
        model.logits(TOKENS)
        for handle in handles:
            handle.remove()
        assert homes == {part: [weight.data_ptr() for weight in part.parameters(recurse=False)] for part in holders}
    assert largest == 1
    assert not reference._fetching._ahead


def test_weights_are_back_at_home_after_a_call_that_failed(tiny_llama: Make) -> None:
    reference = OffloadedCopy(of(tiny_llama()), device="cpu")
    before = answer(reference)
    with reference.active() as model:
        homes = [weight.data_ptr() for weight in model.module.parameters()]

        def fail(*_: Any) -> None:
            raise RuntimeError("stopped")

        handle = model.module.get_submodule("model.layers.1.mlp").register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stopped"):
            model.logits(TOKENS)
        handle.remove()
        assert homes == [weight.data_ptr() for weight in model.module.parameters()]
    assert torch.equal(answer(reference), before)


def test_a_fit_with_it_is_that_with_a_copy_to_the_last_bit(tiny_llama: Make) -> None:
    weights = []
    for reference in (Copy(), Copy(device="cpu", offload=True), Copy(offload=True)):
        module = UserModule(tiny_llama())
        replay = SelfGeneratedReplay(reference=reference, replay_fraction=0.2, refill_rows=8, seed=0)
        quiet_trainer(max_steps=4, callbacks=[replay]).fit(module, mapping_loader())
        weights.append([weight.detach() for weight in module.parameters()])
    assert all(torch.equal(one, other) for some in weights[1:] for one, other in zip(weights[0], some, strict=True))


def test_its_state_is_that_of_a_copy_and_loading_it_drops_what_was_fetched(tiny_llama: Make) -> None:
    streamed, other = OffloadedCopy(of(tiny_llama()), device="cpu"), FrozenCopy(of(tiny_llama(seed=7)))
    answer(streamed)
    streamed.load_state_dict(other.state_dict())
    assert torch.equal(answer(streamed), answer(other))


def test_the_parts_of_a_weight_that_is_quantized_in_layers_are_plain() -> None:
    """Of a weight whose parts hold others in turn, as torchao's may."""
    first, second, third = (torch.full((2,), float(value)) for value in range(3))
    parts = _plain_parts(TwoTensor(TwoTensor(first, second), TwoTensor(third, first)))
    assert [id(part) for part in parts] == [id(each) for each in (first, second, third, first)]
