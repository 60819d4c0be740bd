from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from lightning_replay import ReplayRows
from lightning_replay.data.batches import (
    crop_batch,
    inputs_and_targets,
    join_rows,
    nested_row_count,
    row_length,
    rows_of,
    token_count,
)

NEW = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
SHORT = ReplayRows(torch.tensor([[7, 8, 9], [5, 6, 0]]), torch.tensor([3, 2]))
LONG = ReplayRows(torch.tensor([[7, 8, 9, 10, 11]]), torch.tensor([5]))


def mapping() -> dict[str, torch.Tensor]:
    return {"input_ids": NEW, "attention_mask": torch.ones_like(NEW), "labels": NEW}


def test_a_mapping_is_padded_on_the_right_with_masks_and_labels() -> None:
    joined = join_rows(mapping(), SHORT, pad_token_id=99)
    assert joined["input_ids"][2:].tolist() == [[7, 8, 9, 99], [5, 6, 99, 99]]
    assert joined["attention_mask"][2:].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert joined["labels"][2:].tolist() == [[7, 8, 9, -100], [5, 6, -100, -100]]
    for key, value in mapping().items():
        assert torch.equal(joined[key][:2], value)


def test_a_mapping_is_padded_on_the_left_with_positions() -> None:
    batch = mapping() | {"position_ids": torch.arange(4).expand(2, -1)}
    joined = join_rows(batch, SHORT, padding_side="left")
    assert joined["input_ids"][2:].tolist() == [[0, 7, 8, 9], [0, 0, 5, 6]]
    assert joined["labels"][2:].tolist() == [[-100, 7, 8, 9], [-100, -100, 5, 6]]
    assert joined["position_ids"][3].tolist() == [0, 0, 0, 1]


def test_new_rows_are_padded_when_replay_rows_are_longer() -> None:
    joined = join_rows(mapping(), LONG)
    assert joined["input_ids"].tolist() == [[1, 2, 3, 4, 0], [5, 6, 7, 8, 0], [7, 8, 9, 10, 11]]
    assert joined["attention_mask"][:, 4].tolist() == [0, 0, 1]
    assert joined["labels"][:, 4].tolist() == [-100, -100, 11]


def test_a_pair_gets_rows_shifted_by_one() -> None:
    tokens, targets = join_rows((NEW, NEW + 1), SHORT)
    assert tokens[2:].tolist() == [[7, 8, 0, 0], [5, 0, 0, 0]]
    assert targets[2:].tolist() == [[8, 9, -100, -100], [6, -100, -100, -100]]
    assert isinstance(join_rows([NEW, NEW + 1], SHORT), list)


def test_a_bare_tensor_takes_rows_of_its_own_length_alone() -> None:
    rows = ReplayRows(torch.tensor([[9, 9, 9, 9]]), torch.tensor([4]))
    assert join_rows(NEW, rows).tolist() == [*NEW.tolist(), [9, 9, 9, 9]]
    with pytest.raises(ValueError, match="sequence_length=4"):
        join_rows(NEW, SHORT)


def test_the_kind_of_mapping_and_what_is_not_a_row_are_kept() -> None:
    batch = BatchEncoding(mapping() | {"source": "book", "weight": torch.tensor(2.0)})
    joined = join_rows(batch, LONG)
    assert isinstance(joined, BatchEncoding)
    assert (joined["source"], joined["weight"].item()) == ("book", 2.0)
    assert batch["input_ids"].shape == (2, 4)


def test_padding_that_nothing_would_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing in it would mark the padding"):
        join_rows({"input_ids": NEW}, SHORT)
    with pytest.raises(ValueError, match="on the left"):
        join_rows({"input_ids": NEW, "labels": NEW}, SHORT, padding_side="left")


def test_a_key_with_nothing_to_put_under_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'score' of shape \(2,\).*to_batch"):
        join_rows(mapping() | {"score": torch.zeros(2)}, LONG)


@pytest.mark.parametrize("batch", [{"tokens": NEW}, NEW.float(), NEW[0], "text", (NEW,), None])
def test_other_batches_are_refused_with_advice(batch: object) -> None:
    with pytest.raises(TypeError, match="`to_batch`"):
        join_rows(batch, LONG)


def test_cropping_keeps_the_first_rows_of_everything() -> None:
    cropped = crop_batch(mapping() | {"text": ["a", "b"], "epoch": 3}, 1)
    assert cropped["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert (cropped["text"], cropped["epoch"]) == (["a"], 3)
    assert [part.tolist() for part in crop_batch((NEW, NEW), 1)] == [[[1, 2, 3, 4]]] * 2


def test_targets_follow_their_tokens() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    tokens, attention_mask, targets, positions = inputs_and_targets({"input_ids": NEW, "attention_mask": mask})
    assert positions is None
    assert tokens is NEW
    assert attention_mask is mask
    assert targets.tolist() == [[2, 3, -100, -100], [6, 7, 8, -100]]
    assert inputs_and_targets((NEW, NEW + 1))[2].tolist() == (NEW + 1).tolist()


def test_rows_of_a_batch_keep_its_targets_and_lose_its_padding() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 4]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 5, 6], [-100, -100, 9, 4]]),
    }
    rows = rows_of(batch)
    assert rows.tokens.tolist() == [[5, 6, 0, 0], [7, 8, 9, 4]]
    assert rows.lengths.tolist() == [2, 4]
    assert rows.targets_mask.tolist() == [[True, False, False], [False, True, True]]
    pair = rows_of((torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[2, 3, 9], [5, -1, -1]])))
    assert pair.tokens[0].tolist() == [1, 2, 3, 9]
    assert pair.tokens[1, :3].tolist() == [4, 5, 6]
    assert pair.lengths.tolist() == [4, 3]
    assert pair.targets_mask.tolist() == [[True, True, True], [True, False, False]]
    assert rows_of(torch.tensor([[1, 2]])).targets_mask.tolist() == [[True]]


def test_labels_of_joined_rows_leave_out_what_is_no_target() -> None:
    rows = ReplayRows(torch.tensor([[7, 8, 9]]), torch.tensor([3]), torch.tensor([[False, False, True]]))
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}
    assert join_rows(batch, rows)["labels"].tolist() == [[1, 2, 3], [-100, -100, 9]]
    pair = join_rows((torch.tensor([[1, 2]]), torch.tensor([[2, 3]])), rows)
    assert pair[1].tolist() == [[2, 3], [-100, 9]]


class Pair(NamedTuple):
    tokens: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Held:
    inputs: Any
    names: list[str]
    scale: float = 2.0


def test_a_named_pair_stays_one() -> None:
    joined = join_rows(Pair(NEW, NEW + 1), SHORT)
    assert isinstance(joined, Pair)
    assert joined.tokens[2:].tolist() == [[7, 8, 0, 0], [5, 0, 0, 0]]
    cropped = crop_batch(joined, 1)
    assert isinstance(cropped, Pair)
    assert cropped.targets.tolist() == [[2, 3, 4, 5]]


@pytest.mark.parametrize("inputs", [mapping(), (NEW, NEW + 1), Pair(NEW, NEW + 1), NEW, {"deep": [mapping()]}])
def test_the_rows_of_a_dataclass_are_counted_and_cropped(inputs: Any) -> None:
    batch = Held(inputs, ["a", "b"])
    assert nested_row_count(batch) == nested_row_count({"inputs": inputs}) == 2
    cropped = crop_batch(batch, 1)
    assert (type(cropped), cropped.names, cropped.scale) == (Held, ["a"], 2.0)
    assert nested_row_count(cropped) == 1
    assert type(cropped.inputs) is type(inputs)
    assert nested_row_count(batch) == 2


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size"])
@pytest.mark.parametrize("kind", [dict, list])
def test_the_rows_of_a_combined_loader_are_those_of_all_its_batches(kind: type, mode: Any) -> None:
    batches: dict[str, Any] = {"mappings": [mapping()], "pairs": [(NEW[:1, :3], NEW[:1, :3] + 1)] * 2}
    loaders = {name: DataLoader(each, batch_size=None) for name, each in batches.items()}
    combined = CombinedLoader(loaders if kind is dict else list(loaders.values()), mode)
    counts = [(nested_row_count(batch), token_count(batch), row_length(batch)) for batch, _, _ in combined]
    assert counts == [(3, 11, 4), (3, 11, 4) if mode == "max_size_cycle" else (1, 3, 4)]
    first = next(iter(combined))[0]
    with pytest.raises(TypeError, match="holds 2 batches can't be cropped.*`mode='append'`"):
        crop_batch(first, 1)


def test_advice_for_a_batch_without_tokens_is_what_can_help() -> None:
    with pytest.raises(TypeError, match="Set `sequence_length`, the tokens in a replay row") as refused:
        row_length({"text": ["a", "b"]})
    assert "to_batch" not in str(refused.value)
    with pytest.raises(TypeError, match="no tensor in a dict. Put the tokens into a tensor"):
        nested_row_count({"text": ["a", "b"]})
