import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import IA3Config, LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lightning_replay.models.hooks import joint_forward
from lightning_replay.models.language_model import LanguageModel, evaluating, find_language_model
from lightning_replay.references.keeper import ReferenceKeeper
from lightning_replay.references.models import DisabledAdapter, FrozenCopy, MovingAverage, adapter_is_idle
from tests.helpers.modules import VOCABULARY, HandWritten, UserModule

Make = Callable[..., LlamaForCausalLM]
TOKENS = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
ROWS = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))


def of(module: nn.Module) -> LanguageModel:
    return find_language_model(UserModule(module), None)


def test_a_hugging_face_model_is_found_with_what_it_can_do(tiny_llama: Make) -> None:
    module = UserModule(nn.ModuleDict({"inner": tiny_llama()}))
    found = find_language_model(module, None)
    assert found.module is module.model["inner"]  # type: ignore[index]
    assert (found.vocabulary, found.context, found.has_cache) == (VOCABULARY, 32, True)


def test_a_hand_written_model_is_found_as_the_child_that_holds_all_parameters() -> None:
    module = UserModule(HandWritten())
    found = find_language_model(module, None)
    assert found.module is module.model
    assert (found.vocabulary, found.has_cache) == (VOCABULARY, False)


def test_a_module_that_is_the_model_itself_is_found() -> None:
    class Whole(UserModule):
        def __init__(self) -> None:
            super().__init__(nn.Embedding(VOCABULARY, 8))
            self.head = nn.Linear(8, VOCABULARY)

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.head(self.model(tokens))
            return logits

    module = Whole()
    assert find_language_model(module, None).module is module


def test_of_several_models_the_one_that_trains_is_meant(tiny_llama: Make) -> None:
    module = UserModule(tiny_llama())
    module.teacher = tiny_llama(seed=1)
    with pytest.raises(MisconfigurationException, match="several language models.*language_model='model'"):
        find_language_model(module, None)
    assert find_language_model(module, "teacher").module is module.teacher
    module.teacher.requires_grad_(False)
    assert find_language_model(module, None).module is module.model


def test_missing_logits_name_the_argument_that_says_where_they_are() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            pooled: Tensor = self.embedding(tokens).mean(1)
            return pooled

    with pytest.raises(MisconfigurationException, match="no logits of shape.*`language_model`"):
        of(Classifier())
    with pytest.raises(MisconfigurationException, match=r"names no module.*Its children are \['model'\]"):
        find_language_model(UserModule(Classifier()), "model.gpt")


def test_evaluating_gives_every_submodule_its_mode_back() -> None:
    model = HandWritten()
    model.train()
    model.block.eval()
    with evaluating(model):
        assert not any(child.training for child in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training
    assert model.head.training
    assert not model.block.training


@pytest.mark.parametrize("length", [8, 5, 11])
def test_rows_travel_with_the_forward_and_nobody_sees_them(tiny_llama: Make, length: int) -> None:
    model = of(tiny_llama().train())
    rows = torch.randint(3, VOCABULARY, (2, length))
    alone = model.module(input_ids=TOKENS, labels=TOKENS)
    expected = model.module(input_ids=rows).logits
    with joint_forward(model, rows) as joint:
        seen = model.module(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), labels=TOKENS)
    assert joint.logits is not None
    torch.testing.assert_close(joint.logits, expected)
    assert seen.logits.shape == alone.logits.shape
    torch.testing.assert_close(seen.logits, alone.logits)
    torch.testing.assert_close(seen.loss, alone.loss)


def test_gradients_of_a_joint_forward_are_those_of_two(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    with joint_forward(model, ROWS) as joint:
        loss = model.module(input_ids=TOKENS, labels=TOKENS).loss
    assert joint.logits is not None
    (loss + joint.logits.square().mean()).backward()
    joined = [parameter.grad for parameter in model.module.parameters()]
    model.module.zero_grad()
    model.module(input_ids=TOKENS, labels=TOKENS).loss.backward()
    model.module(input_ids=ROWS).logits.square().mean().backward()
    for ours, parameter in zip(joined, model.module.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


def test_only_the_first_call_with_gradients_carries_rows_and_hooks_go_even_on_errors(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    sizes: list[int] = []
    handle = model.module.model.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with pytest.raises(RuntimeError, match="stop"), joint_forward(model, ROWS):
        with torch.no_grad():
            model.module(TOKENS)
        model.module(TOKENS)
        model.module(TOKENS)
        raise RuntimeError("stop")
    model.module(TOKENS)
    handle.remove()
    assert sizes == [3, 5, 3, 3]
    assert not model.module._forward_hooks
    assert not model.module._forward_pre_hooks


def test_an_argument_that_rows_cannot_be_joined_to_is_refused(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    with joint_forward(model, ROWS), pytest.raises(TypeError, match="`inputs_embeds`|no such tokens"):
        model.module(inputs_embeds=torch.zeros(3, 8, 16))


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


def lora(tiny_llama: Make) -> LanguageModel:
    return of(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2)))


def test_a_fresh_adapter_switched_off_is_the_base_model_exactly(tiny_llama: Make) -> None:
    base, model = tiny_llama()(TOKENS).logits, lora(tiny_llama)
    assert adapter_is_idle(model)
    trained = [name for name, parameter in model.module.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    assert not torch.allclose(model.logits(TOKENS), base)
    with DisabledAdapter(model).active() as reference:
        assert torch.equal(reference.logits(TOKENS), base)
    assert trained == [name for name, parameter in model.module.named_parameters() if parameter.requires_grad]


def test_an_adapter_that_was_trained_before_or_a_base_that_trains_is_not_idle(tiny_llama: Make) -> None:
    trained, open_base = lora(tiny_llama), lora(tiny_llama)
    with torch.no_grad():
        for name, parameter in trained.module.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    assert not adapter_is_idle(trained)
    open_base.module.get_parameter("base_model.model.lm_head.weight").requires_grad_(True)
    assert not adapter_is_idle(open_base)
    assert not adapter_is_idle(of(tiny_llama()))


ADAPTERS: dict[str, Any] = {
    "LoRA": LoraConfig(target_modules=["q_proj"], r=2),
    "DoRA": LoraConfig(target_modules=["q_proj"], r=2, use_dora=True),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "LoHa": LoHaConfig(target_modules=["q_proj"], r=2),
    "VeRA": VeraConfig(target_modules=["q_proj"], r=2),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_adapter_that_can_be_disabled_gives_the_base_model_when_trained(tiny_llama: Make, kind: str) -> None:
    base = tiny_llama()(TOKENS).logits
    model = of(get_peft_model(tiny_llama(), ADAPTERS[kind]))
    assert adapter_is_idle(model)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    assert not torch.allclose(model.logits(TOKENS), base, atol=1e-3)
    assert not adapter_is_idle(model)
    with DisabledAdapter(model).active() as reference:
        torch.testing.assert_close(reference.logits(TOKENS), base)


def test_a_disabled_adapter_holds_no_memory_and_a_copy_holds_the_model_s(tiny_llama: Make) -> None:
    model = lora(tiny_llama)

    def held() -> int:
        gc.collect()
        # A test that compiles leaves tensors without memory behind.
        tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, nn.Parameter)]
        return sum({value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}.values())

    size = sum(parameter.nbytes for parameter in model.module.parameters())
    before = held()
    disabled = DisabledAdapter(model)
    with disabled.active():
        assert held() == before
    copy = FrozenCopy(model)
    assert held() - before >= size
    del copy


def test_a_copy_can_be_kept_in_fewer_bits(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    with FrozenCopy(model, dtype=torch.bfloat16, device="cpu").active() as reference:
        assert {parameter.dtype for parameter in reference.module.parameters()} == {torch.bfloat16}
        logits = reference.logits(TOKENS)
    assert logits.dtype == torch.bfloat16
    exact = model.logits(TOKENS).detach()
    assert float((logits - exact).norm() / exact.norm()) < 0.03
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}


def test_a_moving_average_equals_its_closed_form(tiny_llama: Make) -> None:
    model, decay = of(tiny_llama()), 0.9
    average = MovingAverage(model, decay)
    start = model.module.lm_head.weight.detach().clone()  # type: ignore[union-attr,operator]
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.add_(1.0)
        average.update(model)
        with average.active() as reference:
            # Weights w + t after step t: the average lags behind by the sum of the powers of the decay.
            lag = sum(decay**i for i in range(1, step + 1))
            expected = start + step - lag
            torch.testing.assert_close(reference.module.lm_head.weight, expected)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "teacher"}, "'auto', 'copy', 'adapter', 'cached', 'ema'"),
        ({"since": "last"}, "'fit' or 'first'"),
        ({"ema_decay": 1.0}, "below 1; got 1.0"),
    ],
)
def test_arguments_of_the_reference_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReferenceKeeper(**arguments)
