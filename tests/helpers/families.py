"""Tiny models of several families, each from its own package."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
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


_WIDTHS = ["hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size", "intermediate_size", "ffn_dim"]
_WIDTHS += ["n_inner", "d_ff", "ffn_hidden_size", "dff", "decoder_ffn_dim"]
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TINY: dict[str, Any] = {
    **dict.fromkeys(_WIDTHS, 32),
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys((*_HEADS, *_EXPERTS), 4),
    "vocab_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "n_positions": 64,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
"""One small size for each name that configurations have for a size."""
_TOO_LARGE = 3_000_000
CAUSAL_FAMILIES: list[str] = [config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING]


def tiny_causal(name: str, spread: float = 0.3) -> nn.Module:
    """A tiny causal language model of a family of transformers, by its model type, with weights that say something.

    Raises:
        Exception: Whatever the family raises if the sizes that all families share don't fit it.
    """
    kind = CONFIG_MAPPING[name]
    default = kind()
    sizes = {field: value for field, value in _TINY.items() if field in default.to_dict()}
    layers = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if layers and "layer_types" in default.to_dict():
        sizes["layer_types"] = (layers * 2)[:2]
    config = kind(**sizes)
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    model = model[0] if isinstance(model, tuple) else model
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in model(config).parameters())
    if parameters > _TOO_LARGE:
        raise ValueError(f"{name} has other names for its sizes: {parameters:,} parameters")
    torch.manual_seed(0)
    module: nn.Module = model(config).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=spread)
    with torch.no_grad():
        module(torch.tensor([[5, 6, 7]], dtype=torch.int64))
    return module
