"""Copies of models on whose instances functions were stored."""

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lightning_replay import ReplayDataModule, SelfGeneratedReplay
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.independence import check_independent, independent_copy
from lightning_replay.references.models import FrozenCopy, MovingAverage
from tests.helpers.families import FAMILIES
from tests.helpers.modules import VOCABULARY, HandWritten, UserModule, mapping_loader, quiet_trainer
from tests.helpers.references import TOKENS, of

Make = Callable[..., LlamaForCausalLM]


def add_to_weights(model: LanguageModel, value: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(value * torch.randn_like(parameter))


def compiled(module: Any) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


def compiled_by_layer(module: Any) -> None:
    for layer in module.model.layers:
        layer.forward = torch.compile(layer.forward, backend="eager")


def compiled_linear(module: Any) -> None:
    # torch.compile wraps the forward of torch's own modules once more.
    head = module.lm_head
    head.forward = torch.compile(head.forward, backend="eager")


def compiled_method(module: Any) -> None:
    module.compile(backend="eager")


def wrapped(module: Any) -> None:
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    module.forward = forward


def wrapped_twice_in_a_layer(module: Any) -> None:
    wrapped(module.model.layers[1].mlp)
    compiled(module.model.layers[1].mlp)
    wrapped(module.model.layers[1].mlp)


def default_argument(module: Any) -> None:
    mlp = module.model.layers[0].mlp

    def forward(x: Tensor, *, mlp: Any = mlp) -> Tensor:
        projected: Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        return projected

    mlp.forward = forward


def lambda_of_a_weight(module: Any) -> None:
    norm = module.model.norm
    weight = norm.weight
    norm.forward = lambda x: weight * x


def hook(module: Any) -> None:
    head = module.lm_head
    head.register_forward_hook(lambda _, args, output: output + head.weight.sum())


def bound_methods(module: Any) -> None:
    head = module.lm_head
    head.forward = types.MethodType(lambda self, x: x @ self.weight.T, head)
    module.model.norm.forward = functools.partial(type(module.model.norm).forward, module.model.norm)


PATCHES: dict[str, Callable[[Any], None]] = {
    patch.__name__: patch
    for patch in (
        compiled,
        compiled_by_layer,
        compiled_linear,
        compiled_method,
        wrapped,
        wrapped_twice_in_a_layer,
        default_argument,
        lambda_of_a_weight,
        hook,
        bound_methods,
    )
}


@pytest.mark.parametrize("patch", PATCHES)
def test_the_reference_stays_as_it_was_whatever_was_patched_on_the_model(tiny_llama: Make, patch: str) -> None:
    model = of(tiny_llama())
    PATCHES[patch](model.module)
    before = model.logits(TOKENS).detach()
    references = [FrozenCopy(model), MovingAverage(model, decay=0.9)]
    assert torch.equal(model.logits(TOKENS), before)
    add_to_weights(model)
    assert not torch.allclose(model.logits(TOKENS), before)
    for reference in references:
        with reference.active() as active:
            torch.testing.assert_close(active.logits(TOKENS), before)


@pytest.mark.parametrize("patch", PATCHES)
def test_an_average_of_a_patched_model_is_that_of_the_model_without_patches(tiny_llama: Make, patch: str) -> None:
    plain, patched = of(tiny_llama()), of(tiny_llama())
    PATCHES[patch](patched.module)
    before = patched.logits(TOKENS).detach()
    averages = [MovingAverage(model, decay=0.5) for model in (plain, patched)]
    for model, average in zip((plain, patched), averages, strict=True):
        torch.manual_seed(1)
        add_to_weights(model)
        average.follow(model)
    weights = [[*average._model.module.parameters()] for average in averages]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    with averages[1].active() as active:
        seen = active.logits(TOKENS)
    # The live model with the average's weights has to agree.
    with torch.no_grad():
        for weight, value in zip(patched.module.parameters(), weights[0], strict=True):
            weight.copy_(value)
    torch.testing.assert_close(seen, patched.logits(TOKENS).detach())
    assert not torch.allclose(seen, before)


@pytest.mark.slow
@pytest.mark.parametrize("patch", ["compiled", "wrapped"])
def test_a_patched_model_is_trained_with_the_replay_loss_of_the_model_without_patches(
    tiny_llama: Make, patch: str
) -> None:
    def losses(patch: Callable[[Any], None] | None) -> list[float]:
        module = UserModule(tiny_llama())
        if patch is not None:
            patch(module.model)
        seen: list[float] = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
                seen.append(float(trainer.callback_metrics["replay/loss"]))

        replay = SelfGeneratedReplay(reference="copy", refill_rows=8, seed=1)
        trainer = quiet_trainer(callbacks=[replay, Watch()], max_steps=4)
        trainer.fit(module, datamodule=ReplayDataModule(mapping_loader(32, shuffle=False), 0.25))
        return seen

    plain, patched = losses(None), losses(PATCHES[patch])
    assert plain[-1] > 1e-3
    assert patched == pytest.approx(plain, rel=1e-4, abs=1e-6)


class Holder:
    """Not a module, so `deepcopy` of a function that holds it leaves it alone."""

    def __init__(self, module: nn.Module) -> None:
        self.original = module.forward

    def __deepcopy__(self, memo: Any) -> "Holder":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


def test_what_can_not_be_bound_to_the_copy_is_refused_by_name(tiny_llama: Make) -> None:
    for path in ("", "model", "model.layers.1", "model.layers.0.self_attn.q_proj"):
        model = of(tiny_llama())
        patched: Any = model.module.get_submodule(path)
        kind = type(patched).__name__
        patched.forward = Holder(patched)
        named = f"`{path}`" if path else r"`\(the model itself\)`"
        with pytest.raises(MisconfigurationException, match=rf"the reference computes with .* in {named} \({kind}\)"):
            FrozenCopy(model)
        with pytest.raises(MisconfigurationException, match=named):
            MovingAverage(model, 0.9)
    model = of(tiny_llama())
    layers: Any = model.module.get_submodule("model.layers")
    for layer in layers:
        layer.forward = Holder(layer)
    with pytest.raises(MisconfigurationException, match=r"`model.layers.0` \(LlamaDecoderLayer\), `model.layers.1`"):
        FrozenCopy(model)


def test_a_shared_submodule_is_refused(tiny_llama: Make) -> None:
    class Shared(nn.Linear):
        def __deepcopy__(self, memo: Any) -> "Shared":
            return self

    module = tiny_llama()
    module.lm_head = Shared(16, VOCABULARY)
    with pytest.raises(MisconfigurationException, match=r"`lm_head` \(Shared\)"):
        FrozenCopy(of(module))


def test_a_model_that_uses_its_copy_is_refused(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    copy = independent_copy(model)
    other: Any = copy.module
    model.module.forward = lambda *args, **kwargs: type(other).forward(other, *args, **kwargs)
    with pytest.raises(MisconfigurationException, match="The model computes with the weights of the copy"):
        check_independent(copy, model)


def test_a_copy_that_computes_something_else_is_refused(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    other = tiny_llama(seed=1)
    with pytest.raises(MisconfigurationException, match="gives other logits than the model"):
        check_independent(model.on(other), model)


class Noisy(HandWritten):
    generator: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        logits: Tensor = super().forward(*args, **kwargs)
        return logits + 1e-6 * torch.randn(logits.shape, generator=self.generator)


def test_a_model_whose_answers_differ_from_call_to_call_is_not_taken_for_dependent() -> None:
    model = of(HandWritten())
    model.module.__class__ = Noisy
    model.module.generator = torch.Generator().manual_seed(0)  # type: ignore[assignment]
    copy = model.on(HandWritten())
    copy.module.load_state_dict(model.module.state_dict())
    copy.module.__class__ = Noisy
    copy.module.generator = torch.Generator().manual_seed(1)  # type: ignore[assignment]
    check_independent(copy, model)  # in one forward after the other, the noise differs
    copy.module.load_state_dict(model.module.state_dict(), assign=True)  # the same memory
    with pytest.raises(MisconfigurationException, match="computes with the weights"):
        check_independent(copy, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_all_families_have_independent_copies(family: str) -> None:
    model = of(FAMILIES[family]().eval())
    before = model.logits(TOKENS).detach()
    copy = FrozenCopy(model)
    add_to_weights(model)
    with copy.active() as active:
        torch.testing.assert_close(active.logits(TOKENS), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_copying_leaves_the_model_and_the_random_state_bit_for_bit_as_they_were(
    tiny_llama: Make, dtype: torch.dtype, lora: bool, fails: bool
) -> None:
    module: Any = tiny_llama(tie_word_embeddings=True).to(dtype)
    if lora:
        module = get_peft_model(module, LoraConfig(r=2, target_modules=["q_proj"]))
    model = of(module)
    layer = next(child for name, child in module.named_modules() if name.endswith("layers.0"))
    layer.register_buffer("expanded", torch.ones(1, dtype=dtype).expand(3))
    with torch.no_grad():
        # Weights that arithmetic would not restore.
        special = torch.tensor([0.0, -0.0, 1e-45, float("inf"), float("-inf"), float("nan"), 6.0])
        layer.register_buffer("special", special.to(dtype))
    if fails:
        layer.forward = Holder(layer)
    module.train()
    layer.eval()

    def bits(tensor: Tensor) -> bytes:
        return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()

    def state() -> Any:
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        return {name: (bits(value), value.requires_grad, value._version, value.data_ptr()) for name, value in named}, [
            child.training for child in module.modules()
        ]

    before, random_state, default = state(), torch.get_rng_state(), torch.get_default_dtype()
    if fails:
        with pytest.raises(MisconfigurationException, match="computes with the weights"):
            FrozenCopy(model)
    else:
        FrozenCopy(model)
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_default_dtype() is default


def test_a_graph_that_was_built_before_the_copy_still_goes_backward(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    loss = model.logits(TOKENS).square().mean()
    FrozenCopy(model)
    loss.backward()
    graded = [parameter.grad.clone() for parameter in model.module.parameters() if parameter.grad is not None]
    model.module.zero_grad()
    model.logits(TOKENS).square().mean().backward()
    again = [parameter.grad for parameter in model.module.parameters() if parameter.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(graded, again, strict=True))


def test_making_a_copy_takes_four_forwards(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    calls: list[torch.Size] = []
    model.module.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    FrozenCopy(model)
    assert calls == [torch.Size([1, 16])] * 4


def test_nothing_is_compiled_for_the_probe(tiny_llama: Make) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model = of(tiny_llama())
    module: Any = model.module
    module.forward = torch.compile(module.forward, backend=backend)
    FrozenCopy(model)
    whole: Any = torch.compile(tiny_llama(), backend=backend)
    FrozenCopy(model.on(whole))
    assert not graphs
