"""A reference whose weights are kept in 8 bits."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lightning_replay import Copy, SelfGeneratedReplay, forward_kl
from lightning_replay.linear_losses import divergence_of_heads
from lightning_replay.models.head import OutputHeads
from lightning_replay.references.models import FrozenCopy, MovingAverage
from lightning_replay.references.quantized import plain_state, quantize_to_int8
from tests.helpers.modules import VOCABULARY, UserModule, mapping_loader, quiet_trainer
from tests.helpers.references import TOKENS, answer, of

pytest.importorskip("torchao", reason="torchao is an extra")

Make = Callable[..., LlamaForCausalLM]


def rounded_by_hand(module: nn.Module) -> nn.Module:
    """A copy in which each row of a matrix is rounded to 255 steps between its largest values."""
    copy = deepcopy(module)
    with torch.no_grad():
        for weight in copy.parameters():
            if weight.dim() == 2:
                scale = weight.abs().amax(1, keepdim=True) / 127.5
                # The largest weight of a row lies between two steps: rounded as torchao multiplies.
                weight.copy_((weight * (1 / scale)).round().clamp(-128, 127) * scale)
    return copy


@pytest.mark.parametrize("tied", [False, True])
def test_the_copy_answers_as_the_model_with_weights_rounded_by_hand(tiny_llama: Make, tied: bool) -> None:
    module = tiny_llama(tie_word_embeddings=tied)
    expected = rounded_by_hand(module)(TOKENS).logits
    torch.testing.assert_close(answer(FrozenCopy(of(module), quantize="int8")), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, module(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_an_average_is_taken_of_the_weights_that_are_not_quantized(tiny_llama: Make) -> None:
    module: Any = tiny_llama()
    quantize_to_int8(module.requires_grad_(False))
    average = MovingAverage(of(module), 0.75)
    before = module.model.norm.weight.detach().clone()
    with torch.no_grad():
        module.model.norm.weight.add_(1)
    average.follow(of(module))
    with average.active() as reference:
        found: Any = reference.module
        assert torch.equal(found.model.norm.weight, before + 0.25)
        assert torch.equal(found.lm_head.weight.qdata, module.lm_head.weight.qdata)


def test_it_takes_a_quarter_of_the_memory_and_ties_stay(tiny_llama: Make) -> None:
    module = tiny_llama(tie_word_embeddings=True, hidden_size=64, intermediate_size=128)
    with FrozenCopy(of(module), quantize="int8").active() as model:
        assert model.module.lm_head.weight is model.module.model.embed_tokens.weight  # type: ignore[union-attr]
        held = {part.data_ptr(): part.nbytes for part in plain_state(model.module).values()}
    exact = sum(weight.nbytes for weight in module.parameters())
    matrices = [weight for weight in module.parameters() if weight.dim() == 2]
    assert {part.dtype for part in module.parameters()} == {torch.float32}
    # A byte a weight, and 4 for the scale and 1 for the zero of each row.
    small = sum(weight.nbytes for weight in module.parameters() if weight.dim() == 1)
    assert sum(held.values()) <= small + sum(weight.numel() + 5 * len(weight) for weight in matrices) + exact // 100
    assert sum(held.values()) < 0.4 * exact


def test_the_loss_in_chunks_is_that_of_whole_logits(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    with torch.no_grad():
        reference = FrozenCopy(model, quantize="int8")
        model.module.lm_head.weight.mul_(1.3)  # type: ignore[union-attr,operator]
    heads = OutputHeads()
    with reference.active() as active:
        kept = heads.run(active, lambda asked: asked.logits(TOKENS), lambda given: given.kept(copy=False))
    assert kept is not None  # the head of quantized weights was found
    chunks = heads.run(
        model,
        lambda asked: asked.logits(TOKENS),
        lambda given: divergence_of_heads(*given, *kept, None, "forward", 1.0),
    )
    whole = forward_kl(model.logits(TOKENS), answer(reference))
    assert chunks is not None
    gradients = [torch.autograd.grad(loss, [*model.module.parameters()]) for loss in (chunks, whole)]
    torch.testing.assert_close(chunks, whole)
    torch.testing.assert_close(*gradients)


class Losses(SelfGeneratedReplay):
    """Keeps the replay loss of each step and the rows of the first."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        assert self.step.last_loss is not None
        assert self.drawn is not None
        self.__dict__.setdefault("losses", []).append(float(self.step.last_loss))
        self.__dict__.setdefault("seen", self.drawn.tokens)


@pytest.mark.parametrize("save", ["inside", "beside"])
def test_a_fit_begins_with_the_divergence_of_the_rounding_and_resumes_bit_for_bit(
    tiny_llama: Make, tmp_path: Path, save: Any
) -> None:
    def fit(checkpoint: Path | None = None) -> tuple[Losses, nn.Module]:
        replay = Losses(reference=Copy(quantize="int8", save=save), replay_fraction=0.2, refill_rows=8, seed=0)
        saver = ModelCheckpoint(tmp_path / str(checkpoint is None), "{step}", every_n_train_steps=2)
        trainer = quiet_trainer(max_steps=3, callbacks=[replay, saver], enable_checkpointing=True)
        module = UserModule(tiny_llama())
        trainer.fit(module, mapping_loader(rows=8), ckpt_path=checkpoint, weights_only=True)
        return replay, module

    whole, ended = fit()
    exact, rounded = tiny_llama(), rounded_by_hand(tiny_llama())
    tokens = whole.__dict__["seen"][:, :-1]
    with torch.no_grad():
        expected = forward_kl(exact(tokens).logits, rounded(tokens).logits)
    assert whole.__dict__["losses"][0] == pytest.approx(float(expected), rel=1e-3)
    assert float(expected) > 0
    resumed, ended_too = fit(tmp_path / "True" / "step=2.ckpt")
    assert resumed.__dict__["losses"] == whole.__dict__["losses"][2:]
    for one, other in zip(ended.parameters(), ended_too.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_resumes_only_with_the_kind_of_copy_that_it_began_with(tiny_llama: Make) -> None:
    exact, small = FrozenCopy(of(tiny_llama())), FrozenCopy(of(tiny_llama()), quantize="int8")
    for reference, state in ((exact, small.state_dict()), (small, exact.state_dict())):
        with pytest.raises(MisconfigurationException, match=r"another kind.*Resume with the `reference` that the run"):
            reference.load_state_dict(state)


def test_a_model_without_layers_to_quantize_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table[tokens]

    with pytest.raises(MisconfigurationException, match=r"Bare holds no weight in an `nn.Linear`.*dtype='bfloat16'"):
        FrozenCopy(of(Bare()), quantize="int8")


def test_layers_of_other_classes_stay_exact() -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    with FrozenCopy(of(GPT2LMHeadModel(config)), quantize="int8").active() as model:
        kinds = {name: value.dtype for name, value in plain_state(model.module).items()}
    assert kinds["transformer.h.0.mlp.c_fc.weight"] == torch.float32  # a Conv1D of transformers
    assert kinds["lm_head.weight.qdata"] == torch.int8
