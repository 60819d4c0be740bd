"""Adapters switched off, and which of them may be."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers import LlamaForCausalLM

from lightning_replay.models.language_model import LanguageModel, find_language_model
from lightning_replay.references.adapters import DisabledAdapter, adapter_is_idle
from lightning_replay.references.models import FrozenCopy
from tests.helpers.modules import VOCABULARY, UserModule

Make = Callable[..., LlamaForCausalLM]
TOKENS = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CAUSAL: Any = {"task_type": "CAUSAL_LM"}
BOTH: Any = {"target_modules": ["q_proj", "v_proj"]}

# Their fresh weights change nothing: what PEFT adds is zero, or what it multiplies with is one.
IDLE: dict[str, Any] = {
    "LoRA": LoraConfig(r=2, **BOTH),
    "LoRA with biases": LoraConfig(r=2, lora_bias=True, **BOTH),
    "LoRA of embeddings, and a head of its own": LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]
    ),
    "DoRA": LoraConfig(r=2, use_dora=True, **BOTH),
    "DoRA of embeddings": LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "embed_tokens"]),
    "AdaLoRA": AdaLoraConfig(init_r=4, target_r=2, total_step=10, **BOTH, **CAUSAL),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL),
    "LoHa": LoHaConfig(r=2, **BOTH),
    "LoKr": LoKrConfig(r=2, **BOTH),
    "VeRA": VeraConfig(target_modules=["q_proj"], r=2),
    "OFT": OFTConfig(r=2, oft_block_size=0, **BOTH),
    "BOFT": BOFTConfig(boft_block_size=4, **BOTH),
    "LayerNorm tuning": LNTuningConfig(target_modules=["input_layernorm"], **CAUSAL),
    "adaption prompt": AdaptionPromptConfig(adapter_layers=1, adapter_len=2, **CAUSAL),
}
# Their fresh weights are random, or cancel only up to rounding.
CONTRIBUTING: dict[str, Any] = {
    "PiSSA": LoraConfig(r=2, init_lora_weights="pissa", **BOTH),
    "LoRA with random weights": LoraConfig(r=2, init_lora_weights=False, **BOTH),
    "LoRA, orthogonal": LoraConfig(r=2, init_lora_weights="orthogonal", **BOTH),
    "FourierFT": FourierFTConfig(n_frequency=8, **BOTH),
    "VB-LoRA": VBLoRAConfig(target_modules=["q_proj"], num_vectors=16, vector_length=4, r=2),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=2, **CAUSAL),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=2, **CAUSAL),
}


def of(module: nn.Module) -> LanguageModel:
    return LanguageModel(module, VOCABULARY, 32, has_cache=True)


def lora(tiny_llama: Make) -> LanguageModel:
    return find_language_model(UserModule(get_peft_model(tiny_llama(), LoraConfig(r=2, **BOTH))), None)


def adapted(tiny_llama: Make, config: Any, dtype: torch.dtype, autocast: bool = True, **changes: Any) -> LanguageModel:
    return of(get_peft_model(tiny_llama(**changes).to(dtype), config, autocast_adapter_dtype=autocast))


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


def test_a_base_that_trains_and_a_model_without_an_adapter_are_not_idle(tiny_llama: Make) -> None:
    open_base = lora(tiny_llama)
    open_base.module.get_parameter("base_model.model.lm_head.weight").requires_grad_(True)
    assert not adapter_is_idle(open_base)
    assert not adapter_is_idle(of(tiny_llama()))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", IDLE)
def test_a_fresh_adapter_is_idle_in_every_precision(
    tiny_llama: Make, kind: str, dtype: torch.dtype, autocast: bool
) -> None:
    assert adapter_is_idle(adapted(tiny_llama, IDLE[kind], dtype, autocast))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CONTRIBUTING)
def test_an_adapter_that_contributes_when_fresh_is_not_idle(tiny_llama: Make, kind: str, dtype: torch.dtype) -> None:
    assert not adapter_is_idle(adapted(tiny_llama, CONTRIBUTING[kind], dtype))


def test_an_adapter_that_changes_nothing_but_by_rounding_is_not_idle(tiny_llama: Make) -> None:
    assert not adapter_is_idle(adapted(tiny_llama, HRAConfig(r=2, **BOTH), torch.float32))


@pytest.mark.parametrize("value", [1e-3, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["LoRA", "LoRA of embeddings, and a head of its own", "DoRA", "DoRA of embeddings"])
def test_a_lora_that_has_barely_trained_is_not_idle(
    tiny_llama: Make, kind: str, dtype: torch.dtype, value: float
) -> None:
    model = adapted(tiny_llama, IDLE[kind], dtype)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter[0, 0] = value
                break
    assert not adapter_is_idle(model)


def test_trained_magnitudes_and_biases_are_not_idle_beside_products_of_zero(tiny_llama: Make) -> None:
    for kind, part, dtype in [
        ("DoRA", "magnitude", torch.float32),
        ("DoRA", "magnitude", torch.bfloat16),
        ("LoRA with biases", "bias", torch.bfloat16),
    ]:
        model = adapted(tiny_llama, IDLE[kind], dtype)
        with torch.no_grad():
            for name, parameter in model.module.named_parameters():
                if part in name:
                    parameter.mul_(1.1) if part == "magnitude" else parameter.add_(1e-6)
        assert not adapter_is_idle(model), (kind, dtype)


@pytest.mark.parametrize("layers", [2, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rounding_of_dora_does_not_grow_with_depth_or_bias(
    tiny_llama: Make, dtype: torch.dtype, layers: int
) -> None:
    model = adapted(tiny_llama, IDLE["DoRA"], dtype, num_hidden_layers=layers, attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter))
    assert adapter_is_idle(model)
    # Norms of another device or library: off by the last bits, as sums in another order are.
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 4 * torch.finfo(torch.float32).eps)
    assert adapter_is_idle(model)


def test_an_adapter_that_is_merged_stays_so(tiny_llama: Make) -> None:
    """PEFT takes a merged adapter out of the weights to switch it off."""
    module: Any = get_peft_model(tiny_llama(), LoraConfig(r=2, init_lora_weights=False, **BOTH))
    module.add_adapter("fresh", LoraConfig(r=2, **BOTH))
    module.set_adapter("fresh")
    module.base_model.merge_adapter(["default"])
    with torch.no_grad():
        before = module(TOKENS).logits
        assert not adapter_is_idle(of(module))
        assert torch.equal(module(TOKENS).logits, before)


def test_asking_whether_an_adapter_is_idle_leaves_no_trace(tiny_llama: Make) -> None:
    model = adapted(tiny_llama, IDLE["DoRA"], torch.bfloat16)
    model.module.train()
    weights = {name: value.clone() for name, value in model.module.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.module.parameters()]
    state = torch.get_rng_state()
    adapter_is_idle(model)
    assert torch.equal(state, torch.get_rng_state())
    assert trained == [parameter.requires_grad for parameter in model.module.parameters()]
    assert all(module.training and not module._forward_hooks for module in model.module.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.module.state_dict().items())


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3", "LoHa", "VeRA"])
def test_every_adapter_that_can_be_disabled_gives_the_base_model_when_trained(tiny_llama: Make, kind: str) -> None:
    base = tiny_llama()(TOKENS).logits
    model = adapted(tiny_llama, IDLE[kind], torch.float32)
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
