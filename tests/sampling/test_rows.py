from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_replay import LanguageModel, ReplayRows, Sampling, top_k_log_probs
from lightning_replay.filters import Duplicates, Length
from lightning_replay.models.language_model import evaluating, find_language_model
from lightning_replay.references.cached import cache_reference
from lightning_replay.sampling.rows import RowGenerator
from lightning_replay.sampling.samples import Samples
from tests.helpers.modules import UserModule
from tests.helpers.prompts import chat_tokenizer

Make = Callable[..., LlamaForCausalLM]


def of(module: Any) -> LanguageModel:
    return find_language_model(UserModule(module), None)


def rows_of(
    model: LanguageModel, rows: int, row_length: int, tokenizer: Any = None, **options: Any
) -> tuple[ReplayRows, dict[str, float], RowGenerator]:
    generator = RowGenerator(Sampling(**options))
    generator.bind(model, tokenizer)
    generator.check_length(row_length, model)
    with evaluating(model.module):
        made, quality = generator.generate(model, rows, row_length, 0, lambda tokens: None)
    return made, quality, generator


def test_texts_that_end_by_themselves_are_packed_as_documents_are(tiny_llama: Make) -> None:
    kept: list[Samples] = []

    def spy(samples: Samples) -> Tensor:
        kept.append(samples)
        return torch.ones(len(samples.tokens), dtype=torch.bool)

    made, quality, _ = rows_of(of(tiny_llama()), 20, 12, stop_at_eos=True, filters=[spy])
    assert made.tokens.shape == (20, 12)
    assert bool((made.lengths == 12).all())
    samples = kept[-1]
    stream = [row[:length] for row, length in zip(samples.tokens.tolist(), samples.lengths.tolist(), strict=True)]
    flat = [token for row in stream for token in row]
    assert made.tokens.flatten().tolist() == flat[: 20 * 12]
    # The start token of each sample was given, all others were drawn.
    given = [place == 0 for row in stream for place in range(len(row))][: 20 * 12]
    assert made.targets is not None
    assert made.targets.flatten().tolist() == [not token for token in given]
    assert quality["ended"] == sum(row[-1] == 2 or 2 in row[1:] for row in stream) / len(stream)
    assert quality["length"] == len(flat) / len(stream)


def test_the_last_row_of_a_short_supply_is_padded_and_masked(tiny_llama: Make) -> None:
    def short(model: LanguageModel, prompts: Any, length: int, generator: torch.Generator) -> Samples:
        tokens = torch.full((len(prompts), length), 5)
        drawn = torch.arange(length).expand(len(prompts), -1) < 3
        return Samples(tokens * drawn, torch.full((len(prompts),), 3), drawn)

    def first_five(samples: Samples) -> Tensor:
        return torch.arange(len(samples.tokens)) < 5

    with pytest.warns(UserWarning, match="only"):
        made, _, _ = rows_of(of(tiny_llama()), 4, 10, sampler=short, length=10, filters=[first_five])
    # Five samples of three tokens: a row of ten and a row of five.
    assert made.lengths.tolist() == [10, 5]
    assert made.mask.sum(1).tolist() == [10, 5]
    assert made.targets is not None
    assert int(made.targets.sum()) == 15


def test_each_prompt_begins_an_even_share_over_refills(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    generator = RowGenerator(Sampling(prompts=[[5], [6], [7], [8]]))
    generator.bind(model, None)
    starts = []
    with evaluating(model.module):
        for _ in range(6):
            made, _ = generator.generate(model, 6, 8, 3, lambda tokens: None)
            starts += made.tokens[:, 0].tolist()
    assert torch.tensor(starts).bincount()[5:].tolist() == [9, 9, 9, 9]
    assert len({tuple(starts[i : i + 4]) for i in range(0, 36, 4)}) > 1  # in another order each time


def test_prompts_of_a_dataset_s_column_are_continued(tiny_llama: Make) -> None:
    from datasets import Dataset

    column = Dataset.from_dict({"question": ["one two", "two", "the user says one two one two one two"]})["question"]
    with pytest.warns(UserWarning, match="1 of 3 prompts are left out"):
        made, _, _ = rows_of(of(tiny_llama()), 8, 8, chat_tokenizer(), prompts=column)
    starts = sorted(row[:3].tolist()[: 2 if row[1] == 10 else 3] for row in made.tokens)
    assert starts == [[1, 9, 10]] * 4 + [[1, 10]] * 4
    assert made.targets is not None
    assert made.targets.sum(1).sort().values.tolist() == [5] * 4 + [6] * 4


@pytest.mark.parametrize("which", ["all", "answer"])
def test_the_model_writes_instruction_and_answer(tiny_llama: Make, which: Any) -> None:
    made, quality, generator = rows_of(of(tiny_llama()), 16, 24, chat_tokenizer(), prompts="chat", targets=which)
    assert generator.dropped["unanswered"] > 0
    assert made.targets is not None
    assert len(made.tokens) == 16
    for row, length, targets in zip(made.tokens.tolist(), made.lengths.tolist(), made.targets.tolist(), strict=True):
        assert row[:2] == [1, 3]  # <s> <user>
        turn = row.index(2, 2)
        assert row[turn : turn + 2] == [2, 4]  # <end> <assistant>
        assert length == 24 or row[length - 1] == 2
        instruction = set(range(2, turn + 1)) if which == "all" else set()
        assert {place for place in range(24) if targets[place]} == instruction | set(range(turn + 2, length))
    assert quality["ended"] > 0


def test_filters_drop_count_and_are_made_up_for(tiny_llama: Make) -> None:
    def even(samples: Samples) -> Tensor:
        return samples.tokens[:, -1] % 2 == 0

    made, _, generator = rows_of(of(tiny_llama()), 40, 6, length=6, filters=[even, Duplicates(), Length(1)])
    assert len(made.tokens) == 40
    assert bool((made.tokens[:, -1] % 2 == 0).all())
    assert generator.dropped["even"] > 0
    assert generator.dropped["length"] == 0
    assert generator.samples_drawn >= 40 + generator.dropped["even"]
    assert generator.rows == 40


def test_filters_that_drop_everything_end_with_an_error(tiny_llama: Make) -> None:
    with pytest.raises(RuntimeError, match=r"of 80 drawn, length dropped 80\. Loosen the filters"):
        rows_of(of(tiny_llama()), 8, 6, length=6, filters=[Length(7)])


def test_filters_that_drop_nearly_everything_end_with_what_there_is(tiny_llama: Make) -> None:
    def one_in_two_hundred(samples: Samples) -> Tensor:
        return torch.arange(len(samples.tokens)) % 200 == 0

    with pytest.warns(UserWarning, match=r"only \d+ of \d+ samples passed \(one_in_two_hundred dropped"):
        made, _, _ = rows_of(of(tiny_llama()), 8, 6, length=6, filters=[one_in_two_hundred])
    assert 1 <= len(made.tokens) < 8


@pytest.mark.parametrize("verdict", [None, torch.ones(3), torch.ones(8), [True] * 8])
def test_a_filter_that_returns_the_wrong_thing_is_named(tiny_llama: Make, verdict: Any) -> None:
    with pytest.raises(TypeError, match="The filter 'lambda' returned"):
        rows_of(of(tiny_llama()), 8, 6, length=6, filters=[lambda samples: verdict])


@pytest.mark.parametrize("returned", [None, torch.ones(8, 5, dtype=torch.int64), torch.ones(8, 6)])
def test_a_sampler_that_returns_the_wrong_thing_is_told(tiny_llama: Make, returned: Any) -> None:
    with pytest.raises(TypeError, match=r"for 8 samples of 6 tokens it returns token ids of shape \(8, 6\)"):
        rows_of(of(tiny_llama()), 8, 6, length=6, sampler=lambda *given: returned)


def test_samples_that_do_not_fit_together_are_told(tiny_llama: Make) -> None:
    def sampled(error: type[Exception], message: str, sampling: dict[str, Any], **changes: Any) -> None:
        tokens = torch.ones(8, 6, dtype=torch.int64)
        samples = Samples(tokens, torch.full((8,), 6), tokens > 0)._replace(**changes)
        with pytest.raises(error, match=message):
            rows_of(of(tiny_llama()), 8, 6, chat_tokenizer(), length=6, sampler=lambda *_: samples, **sampling)

    for name in ("log_probs", "replies"):
        sampled(TypeError, f"`{name}` do not have the shape", {}, **{name: torch.ones(8, 5)})
    for lengths in (torch.full((8,), 7), torch.arange(8) % 6):
        sampled(ValueError, "`lengths` are not 1 to 6", {}, lengths=lengths)
    sampled(MisconfigurationException, "have no `replies`", {"prompts": "chat", "targets": "answer"})


def test_cached_log_probabilities_are_those_of_the_row_itself(tiny_llama: Make) -> None:
    model = of(tiny_llama())
    made, _, _ = rows_of(model, 10, 12)  # cut from samples of 24: the second half's own context is shorter
    with evaluating(model.module):
        cached = cache_reference(model, made, 5, 1.5, batch_size=3)
        ids, log_probs = top_k_log_probs(model.logits(made.tokens[:, :-1]), 5, 1.5)
    assert cached.top_ids is not None
    assert cached.top_log_probs is not None
    assert torch.equal(cached.top_ids, ids)
    torch.testing.assert_close(cached.top_log_probs.float(), log_probs, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"stop_at_eos": True}, 8, "needs to know the end token"),
        ({"prompts": [[1] * 8]}, 8, "leave nothing to sample"),
        ({"prompts": [[40]]}, 8, "token id 40"),
        ({"length": 20}, 8, "not a multiple of the 8"),
    ],
)
def test_what_cannot_work_is_refused(tiny_llama: Make, options: dict[str, Any], length: int, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        rows_of(of(tiny_llama(eos_token_id=None)), 4, length, **options)
