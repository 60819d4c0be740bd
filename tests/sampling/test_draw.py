from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from transformers import LlamaForCausalLM

from lightning_replay import LanguageModel, sample_rows
from lightning_replay.models.language_model import evaluating, find_language_model
from lightning_replay.sampling.draw import start_token, stop_tokens
from lightning_replay.sampling.samples import Samples
from tests.helpers.modules import HandWritten, UserModule

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


def truncated(logits: torch.Tensor, settings: dict[str, float]) -> torch.Tensor:
    """Probabilities after the truncations, from their definitions, one token at a time."""
    probabilities = []
    for row in (logits.double() / settings.get("temperature", 1.0)).flatten(0, -2):
        p = row.softmax(0)
        ranked = p.argsort(descending=True).tolist()
        if "top_k" in settings:
            ranked = ranked[: int(settings["top_k"])]
        if "top_p" in settings:
            share, reached, kept = sum(float(p[token]) for token in ranked), 0.0, []
            for token in ranked:
                kept.append(token)
                reached += float(p[token]) / share
                if reached >= settings["top_p"]:
                    break
            ranked = kept
        if "min_p" in settings:
            ranked = [token for token in ranked if p[token] >= settings["min_p"] * p.max()]
        allowed = torch.zeros_like(p)
        allowed[ranked] = p[ranked]
        probabilities.append(allowed / allowed.sum())
    return torch.stack(probabilities).view(logits.shape)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.6},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_each_setting_draws_from_exactly_its_distribution(tiny_llama: Make, settings: dict[str, Any]) -> None:
    vocabulary = 7
    model = of(tiny_llama(vocab_size=vocabulary, seed=1))
    prompts = torch.ones(20_000, 1, dtype=torch.int64)
    with evaluating(model.module):
        rows = sample_rows(model, prompts, 3, torch.Generator().manual_seed(0), **settings).tokens
        pairs = torch.cartesian_prod(torch.arange(vocabulary), torch.arange(vocabulary))
        every = torch.cat([torch.ones(len(pairs), 1, dtype=torch.int64), pairs], 1)
        probabilities = truncated(model.logits(every)[:, :2], settings)
    exact = probabilities.gather(2, every[:, 1:, None]).squeeze(2).prod(1)
    counts = torch.bincount(rows[:, 1] * vocabulary + rows[:, 2], minlength=vocabulary**2)
    assert int(counts[exact == 0].sum()) == 0
    likely = exact * len(rows) >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum(0, keepdim=True)]).double()
    expected = torch.cat([exact[likely], exact[~likely].sum(0, keepdim=True)]) * len(rows)
    assert chisquare(observed[expected > 0].numpy(), expected[expected > 0].numpy(), sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("settings", [{"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 6, "top_p": 0.9}])
def test_truncations_allow_the_tokens_that_transformers_allows(tiny_llama: Make, settings: dict[str, Any]) -> None:
    model = of(tiny_llama(eos_token_id=None))
    prompts = torch.arange(3, 19).unsqueeze(1).repeat_interleave(500, 0)
    with evaluating(model.module):
        ours = sample_rows(model, prompts, 2, torch.Generator().manual_seed(0), **settings).tokens
        torch.manual_seed(0)
        everything = {"top_k": 0, "top_p": 1.0}
        theirs: Any = model.module.generate(  # type: ignore[operator]
            prompts, max_new_tokens=1, do_sample=True, pad_token_id=0, **everything | settings
        )
    for start in range(3, 19):
        seen = [set(rows[rows[:, 0] == start][:, 1].tolist()) for rows in (ours, theirs)]
        # 500 draws see all but the least likely of the tokens that are allowed.
        likely = model.module(torch.tensor([[start]])).logits[0, -1].softmax(0) > 0.03
        frequent = set(likely.nonzero().flatten().tolist())
        assert seen[0] & frequent == seen[1] & frequent


def drawn_with(model: LanguageModel, prompts: Any, length: int, **options: Any) -> Samples:
    with evaluating(model.module):
        return sample_rows(model, prompts, length, torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("cached", [True, False])
def test_log_probabilities_are_those_of_a_teacher_forced_forward(tiny_llama: Make, cached: bool) -> None:
    full = of(tiny_llama())
    model = LanguageModel(full.module, full.vocabulary, full.context, has_cache=cached)
    samples = drawn_with(model, [[1], [1, 5, 6]] * 8, 12, temperature=1.5, top_k=8)
    with evaluating(model.module):
        log_probs = full.logits(samples.tokens)[:, :-1].log_softmax(-1)
    expected = log_probs.gather(2, samples.tokens[:, 1:, None]).squeeze(2) * samples.drawn[:, 1:]
    assert samples.log_probs is not None
    torch.testing.assert_close(samples.log_probs[:, 1:], expected, atol=1e-4, rtol=1e-4)
    assert samples.drawn.sum(1).tolist() == [11, 9] * 8


def test_prompts_of_different_lengths_are_continued_as_each_would_be_alone(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    prompts = [[1], [1, 5, 6, 7], [4, 9]]
    together = drawn_with(model, prompts, 10).tokens
    assert [row[: len(prompt)].tolist() for row, prompt in zip(together, prompts, strict=True)] == prompts
    # The same uniform numbers, position by position, give the same tokens.
    uniforms = torch.rand(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, prompt in enumerate(prompts):
        tokens = torch.tensor([prompt])
        while tokens.shape[1] < 10:
            with evaluating(model.module):
                cumulative = model.logits(tokens)[0, -1].softmax(0).cumsum(0, dtype=torch.float64)
            uniform = uniforms[row, tokens.shape[1] - 1] * cumulative[-1]
            tokens = torch.cat([tokens, (cumulative > uniform).nonzero()[0].view(1, 1)], 1)
        assert torch.equal(together[row], tokens[0])


def test_samples_are_the_same_in_batches_of_any_size(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    whole = drawn_with(model, [[1], [1, 7]] * 5, 14, stop=[2])
    for size in (1, 3, 10):
        parts = drawn_with(model, [[1], [1, 7]] * 5, 14, stop=[2], batch_size=size)
        assert torch.equal(parts.tokens, whole.tokens)
        assert torch.equal(parts.lengths, whole.lengths)


@pytest.mark.parametrize("stop", [(2, 9), tuple(range(32))], ids=["some", "all at once"])
def test_a_stop_token_ends_a_sample_and_changes_nothing_before(tiny_llama: Make, stop: tuple[int, ...]) -> None:
    model = of(tiny_llama())
    endless, stopped = (drawn_with(model, [[1, 2]] * 200, 30, stop=stop) for stop in ((), stop))
    lengths = []
    for row in endless.tokens.tolist():
        ends = [place for place in range(2, 30) if row[place] in stop]
        lengths.append(ends[0] + 1 if ends else 30)
    assert stopped.lengths.tolist() == lengths
    assert min(lengths) < 30
    real = torch.arange(30) < stopped.lengths.unsqueeze(1)
    assert torch.equal(stopped.tokens, endless.tokens * real)
    assert torch.equal(stopped.drawn, endless.drawn & real)


def test_a_reply_is_opened_where_the_first_turn_ends_and_ends_at_the_next_stop_token(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    opening = [9, 20, 21]
    samples = drawn_with(model, [[1, 5]] * 300, 32, stop=[2, 9], reply=opening)
    assert samples.replies is not None
    answered = 0
    for row, length, reply, drawn in zip(
        samples.tokens.tolist(),
        samples.lengths.tolist(),
        samples.replies.tolist(),
        samples.drawn.tolist(),
        strict=True,
    ):
        turn = row[2:length]
        first = next((place for place, token in enumerate(turn, 2) if token in (2, 9)), 32)
        if first == 32 or row[first] == 2 or first + 3 > 32:  # never ended, ended for good, or no room for a reply
            assert reply == 32
            continue
        assert row[first : first + 3] == opening
        assert reply == first + 3
        assert [place for place in range(length) if not drawn[place]] == [0, 1, first + 1, first + 2]
        assert all(token not in (2, 9) for token in row[reply : length - 1])
        assert length == 32 or row[length - 1] in (2, 9)
        answered += 1
    assert answered > 50


def test_stop_tokens_are_those_of_tokenizer_and_configurations(tiny_llama: Make) -> None:
    assert stop_tokens(of(tiny_llama())) == [2]
    assert stop_tokens(of(tiny_llama()), SimpleNamespace(eos_token_id=7)) == [2, 7]
    assert stop_tokens(of(HandWritten())) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "`temperature`"),
        ({"top_k": 0}, "`top_k`"),
        ({"top_p": 0.0}, "`top_p`"),
        ({"min_p": 1.5}, "`min_p`"),
        ({"prompts": [[]]}, "got 0 to 0"),
        ({"prompts": [[1] * 9]}, "got 9 to 9"),
    ],
)
def test_numbers_out_of_range_are_refused(tiny_llama: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawn_with(of(tiny_llama()), options.pop("prompts", [[1]]), 8, **options)
