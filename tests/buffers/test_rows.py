import torch

from lightning_replay import ReplayRows


def test_rows_without_targets_join_others_as_rows_of_targets() -> None:
    prior = ReplayRows(torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.tensor([[False, False, True]]))
    own = ReplayRows(torch.tensor([[4, 5], [6, 0]]), torch.tensor([2, 1]))
    joined = ReplayRows.cat([prior, own])
    assert joined.target_tokens.tolist() == [[False, False, True], [True, True, False], [True, False, False]]
    assert ReplayRows.cat([own, own]).targets is None
