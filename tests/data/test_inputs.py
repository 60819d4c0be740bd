"""What a model is given of packed rows: their positions, or a refusal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening, LlamaForCausalLM

from lightning_replay import ReplayRows
from lightning_replay.data.batches import inputs_and_targets, join_rows, right_padded, rows_of

ROWS = ReplayRows(torch.tensor([[7, 8, 9, 4, 3]]), torch.tensor([5]))
DOCUMENTS = [[5, 6, 7], [9, 8, 4, 3], [11, 12]]


def packed(**options: Any) -> dict[str, Any]:
    """Documents in one row, as Hugging Face packs them."""
    documents: Any = [{"input_ids": document} for document in DOCUMENTS]
    return dict(DataCollatorWithFlattening(return_tensors="pt", **options)(documents))


def test_packed_rows_are_measured_as_the_user_s_loss_measures_them(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model, batch = tiny_llama().eval(), packed()
    inputs = inputs_and_targets(batch).right_padded()
    assert inputs.has_own_positions
    with torch.no_grad():
        # With a cache, models of Hugging Face do not look for documents in the positions.
        given = {"attention_mask": inputs.attention_mask, "position_ids": inputs.position_ids, "use_cache": False}
        logits = model(inputs.tokens, **given).logits
        alone = [
            F.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum")
            for ids in DOCUMENTS
        ]
    # A document's first token has no label, so the sum is that of the documents one by one.
    assert (inputs.targets != -100).sum() == sum(len(ids) - 1 for ids in DOCUMENTS)
    ours = F.cross_entropy(logits[0], inputs.targets[0], ignore_index=-100, reduction="sum")
    torch.testing.assert_close(ours, torch.stack(alone).sum())


@pytest.mark.parametrize("read", [rows_of, right_padded, lambda batch: join_rows(batch, ROWS)])
@pytest.mark.parametrize(
    "batch",
    [
        packed(),
        packed(return_position_ids=False, return_flash_attn_kwargs=True),
        packed(return_position_ids=False, return_seq_idx=True),
        {"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": torch.tensor([[3, 4, 5]])},
    ],
    ids=["positions", "lengths", "numbers of documents", "an offset"],
)
def test_what_cannot_be_passed_on_is_refused(batch: dict[str, Any], read: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="position_ids.*[Gg]ive each document a row of its own"):
        read(batch)


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        (torch.tensor([[0, 1, 2], [0, 1, 2]]), None),
        (torch.tensor([[0, 1, 2]]), None),
        (torch.tensor([[1, 0, 1], [0, 1, 2]]), torch.tensor([[0, 1, 1], [1, 1, 1]])),
    ],
    ids=["counted", "for all rows", "from the first real token"],
)
def test_positions_that_a_model_would_count_itself_are_dropped(positions: Any, mask: Any) -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 4]]), "position_ids": positions}
    inputs = inputs_and_targets(batch if mask is None else batch | {"attention_mask": mask})
    assert inputs.position_ids is not None
    assert inputs.right_padded().position_ids is None
    assert rows_of(batch if mask is None else batch | {"attention_mask": mask}).tokens[1].tolist() == [8, 9, 4]


def test_positions_of_another_shape_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"`position_ids` have one value for each.*got torch.int64 of shape \(3, 1, 2\)"
    ):
        inputs_and_targets({"input_ids": torch.tensor([[5, 6]]), "position_ids": torch.zeros(3, 1, 2).long()})
