import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import (
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicCache

from lightning_replay import sample_rows
from lightning_replay.models.cache import _preallocated
from lightning_replay.models.language_model import LanguageModel, evaluating, find_language_model
from lightning_replay.sampling.decoder import Decoder, rows_at_a_time
from tests.helpers.families import FAMILIES
from tests.helpers.modules import VOCABULARY, UserModule

Make = Callable[..., LlamaForCausalLM]


def of(module: nn.Module) -> LanguageModel:
    return find_language_model(UserModule(module), None)


def said_token_by_token(model: LanguageModel, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """What a decoder says after each token of rows that it reads as they grow."""
    with evaluating(model.module):
        decoder = Decoder(model, tokens.shape[1] + 1)
        return torch.stack([decoder.next_logits(tokens[:, :end]) for end in range(prompt, tokens.shape[1] + 1)], 1)


@pytest.mark.parametrize("prompt", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_growing_row_is_read_as_the_whole_row_is(family: str, prompt: int) -> None:
    if family == "RWKV" and prompt == 1:
        pytest.skip("transformers' RWKV says something else of one token alone than of the first of several")
    torch.manual_seed(0)
    module = FAMILIES[family]()
    for parameter in module.parameters():  # as initialised, some say next to nothing
        nn.init.normal_(parameter, std=0.3)
    model = of(module)
    # RWKV's way to go on from its state mixes up the rows of a batch, so it is not trusted.
    assert model.has_cache == (family not in ("hand-written", "RWKV"))
    tokens = torch.randint(3, VOCABULARY, (5, 12))
    with evaluating(module):
        expected = model.logits(tokens)[:, prompt - 1 :]
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(said_token_by_token(model, tokens, prompt), expected.float(), atol=1e-4, rtol=1e-4)


def test_an_adapted_model_is_read_token_by_token(tiny_llama: Make) -> None:
    module = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model = of(module)
    assert model.has_cache
    tokens = torch.randint(3, VOCABULARY, (5, 12))
    with evaluating(module):
        expected = model.logits(tokens)
    torch.testing.assert_close(said_token_by_token(model, tokens, 1), expected, atol=1e-5, rtol=1e-5)


def test_keys_and_values_stay_where_they_are_written(tiny_llama: Make) -> None:
    model, places = of(tiny_llama()), []
    tokens = torch.randint(3, VOCABULARY, (2, 10))
    with evaluating(model.module):
        decoder = Decoder(model, 10)
        for end in range(1, 10):
            decoder.next_logits(tokens[:, :end])
            assert decoder._reader is not None
            state = decoder._reader.state
            assert isinstance(state, DynamicCache)
            places.append([layer.keys.data_ptr() for layer in state.layers])
    assert places == [places[0]] * 9
    assert [layer.keys.shape[-2] for layer in state.layers] == [9, 9]


def test_a_head_gives_the_logits_of_one_position_however_long_the_prompt_is(tiny_llama: Make) -> None:
    module, shapes = tiny_llama(), []
    model = of(module)
    module.lm_head.register_forward_hook(lambda head, args, output: shapes.append(tuple(output.shape)))
    with evaluating(module):
        sample_rows(model, [[1] * 5] * 3, 8, torch.Generator().manual_seed(0))
    assert shapes == [(3, 1, VOCABULARY)] * 3


def prefixed(tiny_llama: Make, virtual: int = 6) -> Any:
    """With a prefix of keys and values that were trained a little."""
    module = get_peft_model(tiny_llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual))
    for name, parameter in module.named_parameters():
        if "prompt_encoder" in name:
            nn.init.normal_(parameter, std=1.0)
    return module


@pytest.mark.parametrize("prompt", [1, 3])
@pytest.mark.parametrize("virtual", [1, 6])
def test_a_prefix_that_stands_before_each_row_has_its_place_in_memory(
    tiny_llama: Make, virtual: int, prompt: int
) -> None:
    module = prefixed(tiny_llama, virtual)
    model = of(module)
    assert (model.has_cache, model.context) == (True, 32 - virtual)
    tokens = torch.randint(3, VOCABULARY, (5, 16))
    with evaluating(module):
        expected = model.logits(tokens)[:, prompt - 1 :]
        decoder = Decoder(model, 16)
        read = torch.stack([decoder.next_logits(tokens[:, :end]) for end in range(prompt, 17)], 1)
        assert rows_at_a_time(model, 16) == 256
    torch.testing.assert_close(read, expected, atol=1e-5, rtol=1e-5)
    bare = module.get_base_model()
    with evaluating(module):
        assert float((bare(tokens).logits[:, prompt - 1 :] - expected).abs().max()) > 1e-3


def test_a_prefix_is_computed_once_for_a_batch(tiny_llama: Make) -> None:
    module, calls = prefixed(tiny_llama), []
    model = of(module)
    module.prompt_encoder["default"].register_forward_hook(lambda *call: calls.append(call))
    with evaluating(module):
        sample_rows(model, [[1]] * 4, 8, torch.Generator().manual_seed(0))
    assert len(calls) == 1


def test_samples_of_a_prefix_tuned_model_have_the_plain_forward_s_log_probabilities(tiny_llama: Make) -> None:
    module = prefixed(tiny_llama)
    model = of(module)
    with evaluating(module):
        samples = sample_rows(model, [[1]] * 8, 16, torch.Generator().manual_seed(0))
        plain = model.logits(samples.tokens)[:, :-1].log_softmax(-1).gather(2, samples.tokens[:, 1:, None]).squeeze(2)
    assert samples.log_probs is not None
    torch.testing.assert_close(samples.log_probs[:, 1:], plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("more", [0, 1, 4, 9])
def test_no_write_of_keys_and_values_is_lost_however_many_places_a_token_takes(more: int) -> None:
    parts = [torch.randn(2, 1, places, 4, dtype=torch.float32) for places in (2, 1, 3, 2)]
    plain = DynamicCache()
    plain.update(parts[0], -parts[0], 0)
    ours = _preallocated(copy.deepcopy(plain), more)
    assert type(ours.layers[0]) is not type(plain.layers[0])
    for part in parts[1:]:
        for mine, expected in zip(ours.update(part, -part, 0), plain.update(part, -part, 0), strict=True):
            assert torch.equal(mine, expected)


def test_a_row_that_outgrows_its_reader_is_an_error(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    tokens = torch.randint(3, VOCABULARY, (2, 9))
    with evaluating(model.module):
        decoder = Decoder(model, 8)
        for end in range(1, 9):
            decoder.next_logits(tokens[:, :end])
        with pytest.raises(IndexError, match="rows of 8 tokens was given rows of 9"):
            decoder.next_logits(tokens)


class _Forgetful(LlamaForCausalLM):  # type: ignore[misc]
    """Gives back a cache and pays no heed to the one that it is given."""

    def forward(self, input_ids: torch.Tensor, cache: Any = None, use_cache: bool = False, **options: Any) -> Any:
        return super().forward(input_ids, use_cache=use_cache, **options)


def test_a_cache_that_the_model_does_not_heed_is_not_trusted(tiny_llama: Make) -> None:
    module = _Forgetful(tiny_llama().config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = of(module)
    assert not model.has_cache
    tokens = torch.randint(3, VOCABULARY, (5, 8))
    with evaluating(module):
        expected = model.logits(tokens)
    torch.testing.assert_close(said_token_by_token(model, tokens, 1), expected, atol=1e-5, rtol=1e-5)


def test_rows_decoded_together_fit_the_memory_that_is_meant_for_them(
    tiny_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of(tiny_llama())
    with evaluating(model.module):
        assert rows_at_a_time(model, 16) == 256
        # Keys and values of 2 layers of width 16 in 32 bits, for 20 tokens, and 16 bytes a token of the vocabulary.
        bytes_of_row = 2 * 2 * 16 * 4 * 20 + 16 * VOCABULARY
        monkeypatch.setattr("lightning_replay.sampling.decoder._MEMORY", {"share": 0.125, "cpu": 5 * bytes_of_row + 1})
        assert rows_at_a_time(model, 20) == 5
        monkeypatch.setattr("lightning_replay.sampling.decoder._MEMORY", {"share": 0.125, "cpu": 1})
        assert rows_at_a_time(model, 20) == 1
    prefix = of(prefixed(tiny_llama))
    with evaluating(prefix.module):
        bytes_of_row = 2 * 2 * 16 * 4 * (6 + 20) + 16 * VOCABULARY
        monkeypatch.setattr("lightning_replay.sampling.decoder._MEMORY", {"share": 0.125, "cpu": 5 * bytes_of_row + 1})
        assert rows_at_a_time(prefix, 20) == 5
