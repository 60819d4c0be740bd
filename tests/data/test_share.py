import pytest

from lightning_replay.data.share import ReplayShare


def test_what_a_batch_owes_in_fractions_is_carried_over() -> None:
    share = ReplayShare(0.25)
    dealt = [share.deal([4]).takers for _ in range(6)]  # a third of 4 new rows
    assert [len(takers) for takers in dealt] == [1, 1, 2, 1, 1, 2]
    assert share.replay_rows(24) == pytest.approx(8)


def test_replay_rows_are_dealt_to_the_ranks_in_turn() -> None:
    assert ReplayShare(0.5).deal([2, 1]) == ([2, 1], [0, 1, 0], 1)


def test_new_rows_give_way_and_one_stays_on_each_rank() -> None:
    share = ReplayShare(0.9, "replace")
    assert share.deal([4, 2]) == ([1, 1], [0, 1, 0, 0], 1)
    assert share.replay_rows(10) == pytest.approx(9)


def test_rows_held_join_later_in_whole_batches_worth() -> None:
    share = ReplayShare(0.2)  # 1.5 rows are owed for 6 new ones
    dealt = [share.deal([6], carriers) for carriers in (0, 0, 0, 3, 2, 1, 0, 1)]
    # 1, 2, 1 are held; then 2, 1 and 2 are owed while three batches divide the six.
    assert [(len(deal.takers), deal.batches) for deal in dealt] == [
        (0, 0),
        (0, 0),
        (0, 0),
        (3, 2),
        (3, 2),
        (3, 2),
        (0, 0),
        (3, 2),
    ]


def test_rows_are_the_share_of_the_batches_without_a_row_too() -> None:
    share = ReplayShare(0.2)  # half a row is owed for 2 new ones
    dealt = [share.deal([2], carriers) for carriers in (1, 1, 1, 0, 1, 0, 0, 0, 0, 2, 1)]
    expected = [(0, 0), (1, 2), (0, 0), (0, 0), (1, 2), (0, 0), (0, 0), (0, 0), (0, 0), (2, 4), (1, 2)]
    assert [(len(deal.takers), deal.batches) for deal in dealt] == expected


def test_a_row_of_many_small_batches_stands_for_all_of_them() -> None:
    share = ReplayShare(0.1)
    assert [share.deal([1]).batches for _ in range(20)] == [*[0] * 8, 9, *[0] * 8, 9, 0, 0]


def test_new_rows_give_way_for_the_batches_before_too() -> None:
    share = ReplayShare(0.25, "replace")
    assert [share.deal([2]).batches for _ in range(4)] == [0, 2, 0, 2]


@pytest.mark.parametrize(("before", "carriers", "first"), [(17, 1, 1), (12, 1, 6), (12, 0, 6)])
def test_a_row_does_not_stand_for_batches_of_a_fit_before(before: int, carriers: int, first: int) -> None:
    share = ReplayShare(0.1)  # a row for nine new ones
    for _ in range(before):
        share.deal([1], carriers)
    share.drop_held()
    dealt = [share.deal([1]).batches for _ in range(20)]
    assert [batches for batches in dealt if batches][:2] == [first, 9]


def test_a_share_goes_on_from_its_state() -> None:
    share, other = ReplayShare(0.3), ReplayShare(0.3)
    for size in (3, 5, 8):
        share.deal([size], carriers=0)
    other.load_state_dict(share.state_dict())
    assert [share.deal([7], 3) for _ in range(5)] == [other.deal([7], 3) for _ in range(5)]
