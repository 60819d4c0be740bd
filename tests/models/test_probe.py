"""The trial of a model's cache: right ones are used and wrong ones are not, in every type and depth."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_replay.models.calls import find_state
from lightning_replay.models.language_model import LanguageModel, evaluating, find_language_model
from lightning_replay.models.widened import can_widen, widened
from tests.helpers.families import ATTENTION, SIZES
from tests.helpers.modules import VOCABULARY, HandWritten, UserModule

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def of(module: nn.Module) -> LanguageModel:
    return find_language_model(UserModule(module), None)


def llama(layers: int = 2, spread: float = 0.02, width: int = 16, kind: Any = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    sizes = ATTENTION | {"num_hidden_layers": layers, "hidden_size": width, "head_dim": width // 2}
    return kind(LlamaConfig(initializer_range=spread, max_position_embeddings=64, **SIZES, **sizes))


class _Wrong(LlamaForCausalLM):  # type: ignore[misc]
    """A Llama whose cache is spoiled after each call."""

    spoil: Callable[[list[Any]], None]
    offset = 0

    def forward(self, input_ids: Tensor, use_cache: bool = False, **options: Any) -> Any:
        state = next((options[name] for name in ("cache", "past_key_values") if options.get(name) is not None), None)
        if state is not None and self.offset:
            positions = torch.arange(input_ids.shape[1]) + state.get_seq_length() + self.offset
            options["position_ids"] = positions.expand(input_ids.shape)
        output = super().forward(input_ids, use_cache=use_cache, **options)
        if use_cache:
            found = find_state(self, output)
            assert found is not None
            self.spoil([layer for layer in found[1].layers if layer.keys.shape[-2] > 1])
        return output


def one_behind(layers: list[Any]) -> None:
    """The newest token's keys and values are those of the one before."""
    for layer in layers:
        for part in (layer.keys, layer.values):
            part[..., -1, :] = part[..., -2, :]


def rows_mixed_up(layers: list[Any]) -> None:
    for layer in layers:
        layer.values[..., -1, :] = layer.values[..., -1, :].roll(1, 0)


WRONG: dict[str, tuple[Callable[[list[Any]], None], int]] = {
    "one position ahead": (lambda layers: None, 1),
    "one position behind": (lambda layers: None, -1),
    "the last token ignored": (one_behind, 0),
    "the first layer stale": (lambda layers: one_behind(layers[:1]), 0),
    "the last layer stale": (lambda layers: one_behind(layers[-1:]), 0),
    "rows mixed up": (rows_mixed_up, 0),
    "rows mixed up in the last layer": (lambda layers: rows_mixed_up(layers[-1:]), 0),
}


DEPTHS = [(2, 0.02), (2, 0.5), (30, 0.02), (30, 0.3)]
SOME = [(2, 0.02, torch.float16), (2, 0.5, torch.bfloat16), (30, 0.02, torch.bfloat16), (30, 0.3, torch.float32)]
CASES: list[Any] = [
    case if case in SOME else pytest.param(*case, marks=pytest.mark.long)
    for case in ((*depth, dtype) for depth in DEPTHS for dtype in DTYPES)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layers", "spread"), DEPTHS)
def test_a_right_cache_is_never_refused(layers: int, spread: float, dtype: torch.dtype) -> None:
    assert of(llama(layers, spread).to(dtype)).has_cache


@pytest.mark.parametrize(("layers", "spread", "dtype"), CASES)
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_cache_is_never_used(kind: str, layers: int, spread: float, dtype: torch.dtype) -> None:
    module = llama(layers, spread, kind=_Wrong).to(dtype)
    module.spoil, module.offset = WRONG[kind]
    with pytest.warns(UserWarning, match=r"cache of _Wrong is not used.*rounding explains.* ms for 32 tokens"):
        assert not of(module).has_cache


class _KeepsTheFirst(LlamaForCausalLM):  # type: ignore[misc]
    """Asked for the logits of the last positions alone, it gives those of the first."""

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **options: Any) -> Any:
        output = super().forward(input_ids, **options)
        if logits_to_keep:
            output.logits = output.logits[:, :logits_to_keep]
        return output


def test_logits_of_the_last_position_alone_have_to_be_right() -> None:
    with pytest.warns(UserWarning, match="cache of _KeepsTheFirst is not used"):
        assert not of(llama(kind=_KeepsTheFirst)).has_cache


def test_a_refused_cache_is_told_of_once_with_what_it_costs() -> None:
    module = llama(kind=_Wrong)
    module.spoil = one_behind
    with pytest.warns(UserWarning, match="is not used"):
        of(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        of(module)


def test_nothing_of_a_trial_stays() -> None:
    module = llama(3).to(torch.bfloat16)
    module.model.layers[1].eval()
    modes = [part.training for part in module.modules()]
    weights = {name: (value, value.data_ptr(), value.dtype) for name, value in module.state_dict().items()}
    values = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(3)
    of(module)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert [part.training for part in module.modules()] == modes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    for name, value in module.state_dict().items():
        assert (value.data_ptr(), value.dtype) == weights[name][1:]
        assert torch.equal(value, values[name])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())


def test_a_widened_model_computes_what_its_32_bit_copy_does_and_holds_one_layer_at_a_time() -> None:
    module = llama(4).to(torch.bfloat16).eval()
    tokens = torch.randint(3, VOCABULARY, (2, 6))
    wide: list[int] = []
    for layer in module.model.layers:
        layer.mlp.register_forward_pre_hook(
            lambda *_: wide.append(sum(p.dtype == torch.float32 for p in module.model.layers.parameters()))
        )
    with torch.no_grad(), widened(module):
        logits = module(tokens).logits
    of_a_layer = len(list(module.model.layers[0].parameters()))
    assert wide == [of_a_layer] * 4
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        torch.testing.assert_close(logits, module.float()(tokens).logits, atol=0, rtol=0)


def test_what_is_put_back_is_put_back_even_on_errors() -> None:
    module = llama(2).to(torch.float16)
    with pytest.raises(IndexError), widened(module):
        module(torch.tensor([[VOCABULARY]]))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}
    assert not can_widen(module.float())


def bert(kind: Any, **options: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(BertConfig(max_position_embeddings=32, **SIZES, **sizes, **options))


def bart() -> Any:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends = {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    return BartForConditionalGeneration(
        BartConfig(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **SIZES, **sizes, **ends)
    )


class _LooksAhead(HandWritten):
    """By one position."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        return logits + 1e-3 * nn.functional.pad(self.head(self.embedding(tokens)), (0, 0, 0, 1))[:, 1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [lambda: bert(BertForMaskedLM), lambda: bert(BertLMHeadModel), bart, _LooksAhead],
    ids=["BERT", "BERT with a language head", "BART", "one position"],
)
def test_a_model_that_looks_ahead_is_refused(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with pytest.raises(MisconfigurationException, match="no causal language model: tokens after a position change"):
        of(make().to(dtype))


def test_the_same_family_as_a_decoder_is_taken() -> None:
    assert of(bert(BertLMHeadModel, is_decoder=True)).has_cache


def test_a_cache_that_the_signature_does_not_name_is_found() -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    sizes = {name: value for name, value in ATTENTION.items() if name != "head_dim"}
    assert of(GraniteMoeForCausalLM(GraniteMoeConfig(**SIZES, **sizes, **experts))).has_cache

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, *args: Any, **options: Any) -> Any:
            return self.inner(*args, **options)

    module = Wrapper()
    assert find_language_model(UserModule(module), "model").has_cache


class _Pair(HandWritten):
    """Returns hidden states and logits, of the same form."""

    def __init__(self, width: int = 16, order: int = 1) -> None:
        super().__init__(width=width)
        self.order = order

    def forward(self, tokens: Tensor) -> Any:
        logits = super().forward(tokens)
        return (self.embedding(tokens), logits)[:: self.order]


@pytest.mark.parametrize("order", [1, -1])
def test_logits_in_a_tuple_are_known_by_their_size(order: int) -> None:
    module = _Pair(order=order)
    model = of(module)
    assert model.vocabulary == VOCABULARY
    tokens = torch.randint(VOCABULARY, (2, 5))
    with evaluating(module):
        assert torch.equal(model.logits(tokens), module(tokens)[1 if order == 1 else 0])


def test_logits_that_cannot_be_told_from_hidden_states_are_refused_with_a_remedy_that_works() -> None:
    with pytest.raises(MisconfigurationException, match=r"under the name `logits`"):
        of(_Pair(width=VOCABULARY))

    class Named(_Pair):
        def forward(self, tokens: Tensor) -> Any:
            hidden, logits = super().forward(tokens)
            return {"hidden": hidden, "logits": logits}

    assert of(Named(width=VOCABULARY)).vocabulary == VOCABULARY

    class Backbone(HandWritten):
        def forward(self, tokens: Tensor) -> Any:
            return self.embedding(tokens)

    with pytest.raises(MisconfigurationException, match=r"none end in the size of its embedding, \[32\]"):
        of(Backbone())


def test_logits_of_the_last_position_alone_are_refused_with_a_remedy_that_works() -> None:
    class LastOnly(HandWritten):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens)[:, [-1]]

    with pytest.raises(MisconfigurationException, match="the last position alone. Have its `forward` return") as told:
        of(LastOnly())
    assert "language_model=" not in str(told.value)
    assert of(HandWritten()).vocabulary == VOCABULARY


def test_positions_that_are_no_tokens_are_refused_with_a_remedy_that_works() -> None:
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(MisconfigurationException, match=r"\(4, 15, 32\).*use prefix tuning or LoRA"):
        of(get_peft_model(llama(), prompts))
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert of(get_peft_model(llama(), prefix)).has_cache


def test_a_module_without_parameters_and_an_error_without_a_message_are_named() -> None:
    class Nothing(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens[..., None].float()

    with pytest.raises(MisconfigurationException, match="a Nothing, holds no parameters"):
        find_language_model(UserModule(Nothing()), "model")

    class Silent(HandWritten):
        def forward(self, tokens: Tensor) -> Tensor:
            raise NotImplementedError

    with pytest.raises(MisconfigurationException, match=r"raised NotImplementedError\. Replay"):
        of(Silent())


@pytest.mark.parametrize(("given", "expected"), [(-1, None), (0, None), (48, 48)])
def test_a_context_that_is_no_length_is_unknown(given: int, expected: int | None) -> None:
    module = llama()
    module.config.max_position_embeddings = given
    assert of(module).context == expected


def test_the_default_type_does_not_change_what_is_found() -> None:
    found = of(llama(2, 0.3))
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = of(llama(2, 0.3).float())
    finally:
        torch.set_default_dtype(torch.float32)
    assert (again.vocabulary, again.context, again.has_cache) == (found.vocabulary, found.context, found.has_cache)
