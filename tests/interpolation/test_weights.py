from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lightning_replay.interpolation.weights import set_weights, weights_of


class Small(nn.Module):
    steps: Tensor
    scale: Tensor
    left_out: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64, dtype=torch.bfloat16)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("scale", torch.rand(3))
        self.register_buffer("left_out", torch.rand(3), persistent=False)


def test_each_weight_is_the_average_in_32_bits_and_keeps_its_type() -> None:
    module, before, after = Small(), Small(), Small()
    left_out = module.left_out.clone()
    set_weights(module, weights_of(before), weights_of(after), 0.3)
    for name, weight in weights_of(module).items():
        if name == "steps":
            continue
        exact = 0.7 * weights_of(before)[name].double() + 0.3 * weights_of(after)[name].double()
        unit = torch.finfo(weight.dtype).eps / 2 * 1.001
        assert bool(((weight.double() - exact).abs() <= unit * exact.abs() + 1e-7).all())
    assert module.layer.weight.dtype == torch.bfloat16
    assert int(module.steps) == 7
    assert torch.equal(module.left_out, left_out)


def test_the_ends_are_the_given_weights_bit_for_bit_and_ties_stay(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    models = [tiny_llama(seed=seed, tie_word_embeddings=True) for seed in range(3)]
    module, before, after = models
    assert "lm_head.weight" not in weights_of(module)
    for share, expected in ((0.0, before), (1.0, after)):
        set_weights(module, weights_of(before), weights_of(after), share)
        state = expected.state_dict()
        assert all(torch.equal(weight, state[name]) for name, weight in module.state_dict().items())
    assert module.lm_head.weight is module.model.embed_tokens.weight
