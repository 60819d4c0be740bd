"""Each family of models, from its own package: the same fit, compared with one written by hand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_replay import ReplayDataModule, Sampling, SelfGeneratedReplay, sample_rows
from lightning_replay.models.language_model import evaluating, find_language_model
from tests.helpers.by_hand import kl_by_hand, weights
from tests.helpers.families import FAMILIES, litgpt
from tests.helpers.modules import (
    DrawnRows,
    PlainDescent,
    TokensModule,
    UserModule,
    mapping_loader,
    quiet_trainer,
    tensor_loader,
)

Make = Callable[..., Any]
WITHOUT_CACHE = {"RWKV", "hand-written", "LitGPT"}
"""Sampled by reading the whole prefix for each token. RWKV has a state, but mixes up the rows of a batch in it."""
EVERY: list[Any] = ["Llama", "GPT-2", "Qwen", "Mamba", "RWKV", "LoRA", "hand-written"]
EVERY.append(pytest.param("LitGPT", marks=pytest.mark.integration))


class TokensDescent(TokensModule, PlainDescent):
    """For models that map tokens to logits."""


def made(family: str, tiny_llama: Make) -> nn.Module:
    """A tiny model with weights that say something, and without dropout."""
    torch.manual_seed(0)
    others: dict[str, Callable[[], nn.Module]] = {
        "Llama": tiny_llama,
        "LoRA": lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2)),
        "LitGPT": litgpt,
    }
    module = (FAMILIES | others)[family]()
    if family != "LoRA":
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return module


def logits(module: nn.Module, tokens: Tensor) -> Tensor:
    output: Any = module(tokens)
    found: Tensor = getattr(output, "logits", output)
    return found


@pytest.mark.parametrize("family", EVERY)
def test_a_fit_ends_in_the_weights_of_one_written_by_hand(family: str, tiny_llama: Make) -> None:
    plain = family in ("LitGPT", "hand-written")
    kind: type[UserModule] = TokensDescent if plain else PlainDescent
    ours = kind(made(family, tiny_llama))
    theirs, reference = kind(copy.deepcopy(ours.model)), copy.deepcopy(ours.model).eval()
    loader = (tensor_loader if plain else mapping_loader)(48)
    drawn = DrawnRows()
    replay = SelfGeneratedReplay(coefficient=2.0, seed=0, sampling=Sampling(prompts=[[1]]))
    quiet_trainer(callbacks=[replay, drawn]).fit(ours, datamodule=ReplayDataModule(loader, 0.2))

    optimizer: Any = theirs.configure_optimizers()
    for batch, rows in zip(loader, drawn.rows, strict=True):
        with torch.no_grad():
            before = logits(reference, rows[:, :-1])
        loss = theirs.loss(batch) + 2.0 * kl_by_hand(before, logits(theirs.model, rows[:, :-1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), atol=2e-5, rtol=1e-4)
    assert float((weights(theirs.model) - weights(reference)).abs().max()) > 1e-3


@pytest.mark.parametrize("family", EVERY)
def test_samples_are_those_of_a_plain_loop_over_the_whole_prefix(family: str, tiny_llama: Make) -> None:
    module = made(family, tiny_llama)
    model = find_language_model(UserModule(module), None)
    assert model.has_cache == (family not in WITHOUT_CACHE)
    with evaluating(module):
        ours = sample_rows(model, [[1, 5, 9]] * 8, 12, torch.Generator().manual_seed(0))
        # The same random numbers: the token at which the cumulative probability passes each of them.
        uniforms = torch.rand(8, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        tokens = torch.tensor([[1, 5, 9]] * 8)
        for position in range(9):
            cumulative = logits(module, tokens)[:, -1].double().softmax(-1).cumsum(-1)
            token = torch.searchsorted(cumulative, uniforms[:, position, None], right=True)
            tokens = torch.cat([tokens, token], 1)
        log_probs = logits(module, tokens)[:, 2:-1].log_softmax(-1).gather(2, tokens[:, 3:, None]).squeeze(2)
    assert torch.equal(ours.tokens, tokens)
    assert len(tokens[:, 3:].unique()) > 8
    assert ours.log_probs is not None
    torch.testing.assert_close(ours.log_probs[:, 3:], log_probs.float(), atol=1e-4, rtol=1e-4)
