from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from transformers import LlamaForCausalLM

from lightning_replay import LanguageModel, sample_rows
from lightning_replay.language_model import evaluating, find_language_model
from lightning_replay.sampling import start_token
from tests.modules import HandWritten, UserModule

Make = Callable[..., LlamaForCausalLM]


def of(module: nn.Module) -> LanguageModel:
    return find_language_model(UserModule(module), None)


def samples(model: LanguageModel, rows: int, length: int, temperature: float = 1.0, seed: int = 0) -> torch.Tensor:
    prompts = torch.ones(rows, 1, dtype=torch.int64)
    with evaluating(model.module):
        return sample_rows(model, prompts, length, torch.Generator().manual_seed(seed), temperature=temperature).tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["cached", "uncached"])
def test_rows_come_from_exactly_the_model_s_distribution(tiny_llama: Make, kind: str, temperature: float) -> None:
    vocabulary = 6
    torch.manual_seed(0)
    model = of(tiny_llama(vocab_size=vocabulary) if kind == "cached" else HandWritten(vocabulary))
    rows = samples(model, 20_000, 3, temperature)
    # The exact probability of each pair of tokens after the prompt, from two teacher-forced forwards.
    pairs = torch.cartesian_prod(torch.arange(vocabulary), torch.arange(vocabulary))
    with evaluating(model.module):
        every = torch.cat([torch.ones(len(pairs), 1, dtype=torch.int64), pairs], 1)
        probabilities = (model.logits(every).double() / temperature).softmax(-1)
    exact = probabilities[:, :2].gather(2, every[:, 1:, None]).squeeze(2).prod(1)
    counts = torch.bincount(rows[:, 1] * vocabulary + rows[:, 2], minlength=vocabulary**2)
    likely = exact * len(rows) >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum(0, keepdim=True)]).double()
    expected = torch.cat([exact[likely], exact[~likely].sum(0, keepdim=True)]) * len(rows)
    assert chisquare(observed[expected > 0].numpy(), expected[expected > 0].numpy(), sum_check=False).pvalue > 1e-3


def test_the_cache_changes_nothing(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    without = LanguageModel(model.module, model.vocabulary, model.context, has_cache=False)
    assert torch.equal(samples(model, 32, 16), samples(without, 32, 16))


def test_a_token_without_probability_is_never_drawn() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(*tokens.shape, -1)

    drawn = samples(of(Fixed()), 2_000, 8)[:, 1:]
    assert set(drawn.unique().tolist()) == {1, 3}
    assert float((drawn == 3).float().mean()) == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()), abs=0.02)


def test_prompts_are_kept_and_the_end_token_does_not_stop_a_row(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    prompts = torch.tensor([[1, 5], [1, 6]]).repeat(100, 1)
    with evaluating(model.module):
        rows = sample_rows(model, prompts, 20, torch.Generator().manual_seed(0)).tokens
    assert torch.equal(rows[:, :2], prompts)
    ended = rows[(rows[:, 2:-1] == 2).any(1)]
    assert len(ended)
    assert len(ended.unique(dim=1).unique(dim=0)) > 1


def test_samples_depend_on_their_generator_alone(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    first = samples(model, 8, 12, seed=4)
    before = torch.get_rng_state()
    assert torch.equal(samples(model, 8, 12, seed=4), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(samples(model, 8, 12, seed=5), first)


def test_nan_logits_are_refused(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    with torch.no_grad():
        next(model.module.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite logits"):
        samples(model, 2, 4)


def test_rows_begin_with_the_beginning_token_else_the_end_token(tiny_llama: Make) -> None:
    assert start_token(of(tiny_llama())) == 1
    assert start_token(of(tiny_llama(bos_token_id=None))) == 2
    assert start_token(of(tiny_llama(bos_token_id=None, eos_token_id=[7, 8]))) == 7
    assert start_token(of(HandWritten())) is None
    assert start_token(of(HandWritten()), SimpleNamespace(bos_token_id=None, eos_token_id=9)) == 9


@pytest.mark.slow
def test_samples_of_a_pretrained_model_are_as_likely_as_its_entropy_says(real_data: object) -> None:
    from transformers import AutoModelForCausalLM

    model = of(AutoModelForCausalLM.from_pretrained(f"{real_data}/tinystories-656k"))
    rows = samples(model, 256, 64)
    with evaluating(model.module):
        log_probs = model.logits(rows[:, :-1]).log_softmax(-1)
    surprise = -log_probs.gather(2, rows[:, 1:, None]).squeeze(2)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    # At every position the mean of (surprise - entropy) is zero; 256 × 63 draws, spread as they are.
    difference = surprise - entropy
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / difference.numel() ** 0.5
