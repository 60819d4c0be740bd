"""Labels and targets: what is left out of them, and what is refused because it is not the row's own tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from lightning_replay import ReplayRows
from lightning_replay.data.batches import find_ignore_index, inputs_and_targets, join_rows, rows_of
from tests.helpers.chat import chat_tokenizer

ROWS = ReplayRows(torch.tensor([[7, 8, 9]]), torch.tensor([3]))
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 4], [6, 5, 9, 9, 8, 3]])
PADDED = torch.tensor([[5, 6, 7, 8, 0, 0], [6, 5, 9, 9, 8, 3]])
MASK = (PADDED != 0).long()
# What follows each token, by hand; -100 after a row's last token.
AFTER = [[6, 7, 8, 9, 4, -100], [5, 9, 9, 8, 3, -100]]


def masked_lm(tokens: Tensor) -> dict[str, Tensor]:
    tokenizer = chat_tokenizer()
    tokenizer.mask_token = "<system>"
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=1)
    return dict(collator([{"input_ids": row} for row in tokens.repeat(4, 1)]))


WRONG: dict[str, tuple[Any, str]] = {
    "labels already shifted": (
        {"input_ids": TOKENS, "labels": torch.tensor(AFTER)},
        "of 10 positions .* 100% the token after it.*already shifted: pass the pair",
    ),
    "labels shifted the other way": (
        {"input_ids": TOKENS, "labels": torch.cat([TOKENS[:, :1], TOKENS[:, :-1]], 1)},
        "100% the token before it.*Set `labels` to a copy of `input_ids`",
    ),
    "labels of a masked language model": (masked_lm(TOKENS), "Labels of masked language models.*can't be used"),
    "labels of inputs with one token changed": (
        {"input_ids": torch.tensor([[5, 6, 1, 8, 9, 4]]), "labels": TOKENS[:1]},
        "of 6 positions .* 83% have the token at the same position.*inputs that were changed",
    ),
    "labels shifted in rows with padding": (
        {"input_ids": PADDED, "attention_mask": MASK, "labels": torch.tensor([[6, 7, 8, -100, -100, -100], AFTER[1]])},
        "100% the token after it.*already shifted",
    ),
    "a mask in the place of targets": ((PADDED, MASK), "They look like a mask.*'attention_mask': mask"),
    "a mask without padding": ((TOKENS, torch.ones_like(TOKENS)), "They look like a mask"),
    "a mask in the place of labels": ({"input_ids": PADDED, "labels": MASK}, "They look like a mask"),
    "a pair that is not shifted": ((TOKENS, TOKENS), r"not shifted: pass \{'input_ids': tokens, 'labels': targets\}"),
    "a pair in the other order": ((TOKENS[:, 1:], TOKENS[:, :-1]), "in the wrong order: pass \\(tokens, targets\\)"),
    "classes of words": ({"input_ids": TOKENS, "labels": TOKENS % 3}, "Set `labels` to a copy of `input_ids`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_targets_that_are_not_the_tokens_are_refused_with_what_was_found(name: str) -> None:
    batch, message = WRONG[name]
    for read in (inputs_and_targets, rows_of):
        with pytest.raises(ValueError, match=f"{message}.*`collate_fn`"):
            read(batch)
    with pytest.raises(ValueError, match=f"{message}.*`to_batch`"):
        join_rows(batch, ROWS)


@pytest.mark.parametrize("mask", [MASK.bool(), MASK.float()])
def test_a_mask_of_another_type_in_the_place_of_targets_is_refused(mask: Tensor) -> None:
    with pytest.raises(TypeError, match="If that is a mask, pass {'input_ids': tokens, 'attention_mask': mask}"):
        rows_of((PADDED, mask))


@pytest.mark.parametrize("key", ["targets", "shift_labels", "completion_mask"])
def test_targets_under_another_key_are_not_overlooked(key: str) -> None:
    with pytest.raises(TypeError, match=rf"holds \['{key}'\] but no `labels`, so a loss would be taken on every token"):
        rows_of({"input_ids": TOKENS, key: torch.ones_like(TOKENS)})


OUTSIDE: dict[str, tuple[Any, int]] = {
    "-100": ({"input_ids": TOKENS, "labels": torch.tensor([[-100, -100, 7, 8, 9, 4], [6, 5, 9, 9, 8, 3]])}, -100),
    "-1": ({"input_ids": TOKENS, "labels": torch.tensor([[-1, -1, 7, 8, 9, 4], [6, 5, 9, 9, 8, 3]])}, -1),
    "the size of the vocabulary": (
        {"input_ids": TOKENS, "labels": torch.tensor([[20, 20, 7, 8, 9, 4], [6, 5, 9, 9, 8, 3]])},
        20,
    ),
    "the padding token, marked by a mask": (
        {
            "input_ids": torch.tensor([[5, 6, 7, 8, 9, 4, 0], [6, 5, 9, 9, 8, 3, 2]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]]),
            "labels": torch.tensor([[0, 0, 7, 8, 9, 4, 0], [6, 5, 9, 9, 8, 3, 2]]),
        },
        0,
    ),
    "the padding token, unmarked": (
        {
            "input_ids": torch.tensor([[5, 6, 7, 8, 9, 4, 0, 0], [6, 5, 9, 9, 8, 3, 2, 2]]),
            "labels": torch.tensor([[0, 0, 7, 8, 9, 4, 0, 0], [6, 5, 9, 9, 8, 3, 2, 2]]),
        },
        0,
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_label_that_is_left_out_is_found_and_given_to_replay_rows(name: str) -> None:
    batch, marker = OUTSIDE[name]
    assert find_ignore_index(batch, vocabulary=20) == marker
    targets = inputs_and_targets(batch, vocabulary=20).targets
    # The first two words of the first row are left out; all else is asked.
    assert targets[:, :5].tolist() == [[-100, 7, 8, 9, 4], AFTER[1][:5]]
    assert (targets[0, 5:] == -100).all()
    joined = join_rows(batch, ROWS, vocabulary=20)["labels"]
    missing = batch["input_ids"].shape[1] - 3
    assert joined[2].tolist() == [7, 8, 9] + [marker] * missing


def test_pairs_leave_out_what_is_negative_and_pad_replay_rows_with_it() -> None:
    tokens, targets = join_rows((TOKENS, torch.tensor([[-1, -1, 8, 9, 4, 2], [5, 9, 9, 8, 3, -1]])), ROWS)
    assert tokens[2].tolist() == [7, 8, 0, 0, 0, 0]
    assert targets[2].tolist() == [8, 9, -1, -1, -1, -1]
    assert inputs_and_targets((tokens, targets)).targets[2].tolist() == [8, 9, -100, -100, -100, -100]


@pytest.mark.parametrize("padding", [-100, 0])
def test_rows_that_were_shifted_before_they_were_padded_are_taken(padding: int) -> None:
    tokens = torch.tensor([[5, 6, 7, 0, 0], [6, 5, 9, 9, 8]])
    targets = torch.tensor([[6, 7, 8, padding, padding], [5, 9, 9, 8, 3]])
    assert inputs_and_targets((tokens, targets)).targets[0, :3].tolist() == [6, 7, 8]


def test_an_ignore_index_that_is_given_is_left_out_though_no_padding_shows_it() -> None:
    batch = {"input_ids": TOKENS, "labels": torch.tensor([[2, 2, 7, 8, 9, 4], [6, 5, 9, 9, 8, 3]])}
    with pytest.raises(ValueError, match="with -100 where no loss is taken"):
        inputs_and_targets(batch)
    assert inputs_and_targets(batch, ignore_index=2).targets[0].tolist() == [-100, 7, 8, 9, 4, -100]
    assert join_rows(batch, ROWS, ignore_index=2)["labels"][2].tolist() == [7, 8, 9, 2, 2, 2]


@pytest.mark.parametrize("batch", [TOKENS, {"input_ids": TOKENS}, (TOKENS[:, :-1], TOKENS[:, 1:])])
def test_a_batch_that_leaves_nothing_out_shows_no_ignore_index(batch: Any) -> None:
    assert find_ignore_index(batch) is None
