"""Finding a model's output head and what follows it, and calling the model with a loss in its place."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_utilities.core import rank_zero
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from lightning_replay.head_chunks import CalledHead, LinearHead, LogitTransform
from lightning_replay.linear_losses import divergence_of_heads, next_token_loss_of_head
from lightning_replay.losses import forward_kl, next_token_loss
from lightning_replay.models.head import HiddenStates, OutputHeads
from lightning_replay.models.language_model import LanguageModel, find_language_model
from tests.helpers.families import ATTENTION, FAMILIES, SIZES, litgpt
from tests.helpers.modules import VOCABULARY, HandWritten, UserModule

Make = Callable[..., Any]


class After(nn.Module):
    """A plain model whose head's outputs go through a function."""

    def __init__(self, function: Callable[[Tensor], Tensor], outputs: int = VOCABULARY, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.body = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, outputs, bias=bias)
        self.function = function

    def forward(self, tokens: Tensor) -> Tensor:
        return self.function(self.head(self.body(self.embedding(tokens))[0]))


class MayScale(After):
    """A scale that is there and may be None, as in configurations that serve several families."""

    def __init__(self, scale: float | None) -> None:
        super().__init__(lambda outputs: outputs if self.scale is None else outputs * self.scale)
        self.scale = scale


def cohere(kind: Any, config: Any, scale: float) -> nn.Module:
    module: nn.Module = kind(config(logit_scale=scale, **SIZES, **ATTENTION))
    return module


def granite(scale: float) -> nn.Module:
    module: nn.Module = GraniteForCausalLM(GraniteConfig(logits_scaling=scale, **SIZES, **ATTENTION))
    return module


FOUND: dict[str, tuple[Callable[[], nn.Module], LogitTransform]] = {
    **{name: (make, LogitTransform()) for name, make in FAMILIES.items()},
    "Gemma 2": (
        lambda: Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=3.0, **SIZES, **ATTENTION)),
        LogitTransform(softcap=3.0),
    ),
    "Gemma 2 without": (
        lambda: Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=None, **SIZES, **ATTENTION)),
        LogitTransform(),
    ),
    "Cohere": (lambda: cohere(CohereForCausalLM, CohereConfig, 0.0625), LogitTransform(0.0625)),
    "Cohere 2": (lambda: cohere(Cohere2ForCausalLM, Cohere2Config, 0.3), LogitTransform(0.3)),
    "Granite": (lambda: granite(8.0), LogitTransform(0.125)),
    "Granite, 1": (lambda: granite(1.0), LogitTransform()),
    "scale None": (lambda: MayScale(None), LogitTransform()),
    "scale 3": (lambda: MayScale(3.0), LogitTransform(3.0)),
    "scale and softcap": (lambda: After(lambda x: 5 * torch.tanh(x * 0.7 / 5)), LogitTransform(0.7, 5.0)),
    "padded": (lambda: After(lambda x: x[..., :VOCABULARY], 48), LogitTransform(vocabulary=VOCABULARY)),
    "in 32 bits": (lambda: After(lambda x: x.float()), LogitTransform()),
    "no bias": (lambda: After(lambda x: x, bias=False), LogitTransform()),
}


def made(family: str) -> LanguageModel:
    torch.manual_seed(0)
    module = FOUND[family][0]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return described(module)


def described(module: nn.Module) -> LanguageModel:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return find_language_model(UserModule(module), None)


def rows() -> Tensor:
    return torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))


def logits_of(tokens: Tensor) -> Callable[[LanguageModel], Tensor]:
    return lambda model: model.logits(tokens)


def compared(model: LanguageModel, kind: type = LinearHead, atol: float = 1e-5) -> None:
    """The loss in the head's place and that of whole logits: value and every gradient."""
    heads, tokens = OutputHeads(), rows()
    reference = model.on(copy.deepcopy(model.module))
    with torch.no_grad():
        for parameter in reference.module.parameters():
            parameter.mul_(1.1)
    kept = heads.run(reference, logits_of(tokens), lambda given: given.kept(copy=False))
    assert kept is not None

    def inside(given: HiddenStates) -> Tensor:
        assert isinstance(given.head, kind)
        return divergence_of_heads(*given, *kept, None, "forward", 1.0)

    ours = heads.run(model, logits_of(tokens), inside)
    assert ours is not None
    (3 * ours).backward()
    found = gradients(model.module)
    theirs = forward_kl(model.logits(tokens), reference.logits(tokens))
    (3 * theirs).backward()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    expected = gradients(model.module)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].shape == gradient.shape
        torch.testing.assert_close(found[name], gradient, atol=atol, rtol=1e-4)
    assert not any(parameter.grad is not None for parameter in reference.module.parameters())


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: part.grad for name, part in module.named_parameters() if part.grad is not None}
    for part in module.parameters():
        part.grad = None
    return found


@pytest.mark.parametrize("family", FOUND)
def test_what_follows_the_head_is_found_and_the_loss_is_that_of_whole_logits(family: str) -> None:
    model = made(family)
    head = OutputHeads().of(model)
    assert head is not None
    expected = FOUND[family][1]
    assert (head.transform.softcap, head.transform.vocabulary) == pytest.approx((expected.softcap, expected.vocabulary))
    assert head.transform.scale == pytest.approx(expected.scale, rel=1e-6)
    compared(model)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_own_head_weights_get_the_gradients_of_whole_logits(tied: bool, tiny_llama: Make) -> None:
    compared(described(tiny_llama(tie_word_embeddings=tied)))


@pytest.mark.integration
def test_litgpt(tiny_llama: Make) -> None:
    compared(described(litgpt()))


@pytest.mark.parametrize("trained", [False, True])
def test_lora_on_the_head_is_differentiated_by_its_own_forward(trained: bool, tiny_llama: Make) -> None:
    module: Any = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    if trained:
        for name, parameter in module.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter, std=0.3)
    model = described(module)
    compared(model, CalledHead)
    heads = OutputHeads()
    with module.disable_adapter():
        plain = heads.run(model, logits_of(rows()), lambda given: given.head)
    assert isinstance(plain, LinearHead)
    assert plain.weight is module.base_model.model.lm_head.base_layer.weight


def test_a_head_that_is_a_module_to_save_is_the_copy_that_is_active(tiny_llama: Make) -> None:
    module: Any = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"]))
    nn.init.normal_(module.base_model.model.lm_head.modules_to_save["default"].weight, std=0.3)
    model, heads = described(module), OutputHeads()
    compared(model)
    with module.disable_adapter():
        plain = heads.run(model, logits_of(rows()), lambda given: given.head)
    assert isinstance(plain, LinearHead)
    assert plain.weight is module.base_model.model.lm_head.original_module.weight


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_16_bits_gradients_are_as_near_to_those_of_32_bits_as_with_whole_logits(
    precision: str, tiny_llama: Make
) -> None:
    module = tiny_llama(vocab_size=200, tie_word_embeddings=True)
    heads, tokens = OutputHeads(), rows()
    module.bfloat16()
    exact = copy.deepcopy(module).float()
    next_token_loss(described(exact).logits(tokens), tokens).backward()
    truth = gradients(exact)
    if precision == "bf16-mixed":
        module.float()
    model = described(module)
    assert heads.of(model) is not None

    def off(whole: bool) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss: Any = (
                next_token_loss(model.logits(tokens), tokens)
                if whole
                else heads.run(model, logits_of(tokens), lambda given: next_token_loss_of_head(*given, tokens, None))
            )
        loss.backward()
        found = gradients(module)
        assert {name: part.dtype for name, part in module.named_parameters() if name in found} == {
            name: part.dtype for name, part in found.items()
        }
        return {name: float((found[name].float() - part).norm() / part.norm()) for name, part in truth.items()}

    ours, theirs = off(whole=False), off(whole=True)
    assert 0 < max(theirs.values()) < 0.1
    for name, distance in theirs.items():
        assert ours[name] < 1.5 * distance, name


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda outputs: outputs.log_softmax(-1), "no scale and no bound"),
        (lambda outputs: outputs + torch.arange(VOCABULARY), "raised"),
        (lambda outputs: outputs.relu(), "no scale and no bound"),
        (lambda outputs: outputs.index_fill(-1, torch.tensor([5]), -1e4), "raised"),
        (lambda outputs: outputs.flip(-1), "off by"),
    ],
    ids=["log-softmax", "another bias", "relu", "a token left out", "flipped"],
)
def test_what_is_not_understood_takes_whole_logits_and_says_so_once(
    function: Callable[[Tensor], Tensor], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, heads = described(After(function)), OutputHeads()
    with caplog.at_level("INFO", logger=rank_zero.log.name):
        assert heads.of(model) is None
        assert heads.of(model) is None
    said = [record.getMessage() for record in caplog.records if "whole logits" in record.getMessage()]
    assert len(said) == 1
    assert reason in said[0]


class Learned(After):
    """A scale that is learned."""

    def __init__(self) -> None:
        super().__init__(lambda outputs: outputs * self.scale)
        self.scale = nn.Parameter(torch.tensor(2.0))


def test_a_scale_that_trains_takes_whole_logits_and_one_that_is_frozen_does_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = Learned()
    with caplog.at_level("INFO", logger=rank_zero.log.name):
        assert OutputHeads().of(described(module)) is None
    assert "has weights that train" in caplog.text
    module.scale.requires_grad_(False)
    head = OutputHeads().of(described(module))
    assert head is not None
    assert head.transform == LogitTransform(2.0)


def test_a_head_that_is_no_module_takes_whole_logits() -> None:
    class Functional(After):
        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(self.body(self.embedding(tokens))[0], self.embedding.weight)

    assert OutputHeads().of(described(Functional(lambda outputs: outputs))) is None


def test_the_model_is_as_it_was_and_hooks_on_it_run() -> None:
    module = HandWritten()
    model, heads, seen = described(module), OutputHeads(), []
    module.register_forward_hook(lambda *_: seen.append("module"))
    module.head.register_forward_pre_hook(lambda *_: seen.append("head"))
    module.train()
    state = torch.get_rng_state()
    assert heads.of(model) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in module.modules())
    seen.clear()
    heads.run(model, logits_of(rows()), lambda given: None)
    assert seen == ["head", "module"]
    assert "forward" not in vars(module.head)
    assert model.logits(rows()).shape == (3, 6, VOCABULARY)


def test_a_compiled_model_is_compiled_for_the_loss_once() -> None:
    torch._dynamo.reset()
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    plain = After(lambda outputs: outputs * 2)
    plain.body = nn.Identity()  # type: ignore[assignment]
    plain.forward = lambda tokens: plain.head(plain.embedding(tokens)) * 2  # type: ignore[method-assign]
    model = described(torch.compile(plain, backend=backend))  # type: ignore[arg-type]
    heads, tokens = OutputHeads(), rows()
    expected = next_token_loss(model.logits(tokens), tokens)
    counts = []
    for _ in range(3):
        ours = heads.run(model, logits_of(tokens), lambda given: next_token_loss_of_head(*given, tokens, None))
        torch.testing.assert_close(ours, expected)
        model.logits(tokens)
        counts.append(len(compiled))
    assert counts[0] == counts[-1]
