"""Tiny models of several families, each from its own package."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from tests.helpers.modules import VOCABULARY, HandWritten

SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


ATTENTION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **SIZES)),
    "Qwen": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **ATTENTION)),
    "Gemma, sliding window": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(sliding_window=4, layer_types=["sliding_attention", "full_attention"], **SIZES, **ATTENTION)
    ),
    "Mamba": lambda: MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **SIZES)),
    "RWKV": lambda: RwkvForCausalLM(
        RwkvConfig(hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, intermediate_size=32, **SIZES)
    ),
    "hand-written": HandWritten,
}


def litgpt() -> nn.Module:
    model = pytest.importorskip("litgpt.model", reason="LitGPT is not installed")
    size = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "bias": False}
    module: nn.Module = model.GPT(model.Config(vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY, **size))
    return module
