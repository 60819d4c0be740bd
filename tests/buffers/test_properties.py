"""What holds for any fraction, batch, capacity, policy and sequence of calls, against calculations written anew."""

import math
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_replay import ReplayBuffer, ReplayDataModule, ReplayRows
from lightning_replay.data.batches import crop_batch, join_rows, right_padded, row_count, rows_of
from tests.helpers.modules import UserModule, quiet_trainer

NEW, SAMPLED, REAL = 1, 2, 3


class Counter(UserModule):
    """Counts the rows of each kind in each batch."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(4, 1))
        self.counts: list[list[int]] = []

    def loss(self, batch: Tensor) -> Tensor:
        self.counts.append([int((batch[:, 0] == kind).sum()) for kind in (NEW, SAMPLED, REAL)])
        loss: Tensor = self.model(batch).mean()
        return loss


def rows_of_kind(kind: int, rows: int) -> Tensor:
    return torch.full((rows, 3), kind)


@settings(deadline=None, max_examples=25)
@given(
    fraction=st.fractions(min_value=0, max_value=Fraction(9, 10), max_denominator=50),
    share=st.fractions(min_value=Fraction(1, 20), max_value=1, max_denominator=20),
    mode=st.sampled_from(["append", "replace"]),
    sizes=st.lists(st.integers(min_value=2, max_value=20), min_size=1, max_size=30),
)
def test_shares_are_exact_over_any_run(fraction: Fraction, share: Fraction, mode: Any, sizes: list[int]) -> None:
    module, buffer = Counter(), ReplayBuffer(7, 3)
    buffer.add(rows_of_kind(SAMPLED, 7))
    batches: Any = [rows_of_kind(NEW, size) for size in sizes]
    data = ReplayDataModule(
        DataLoader(batches, batch_size=None),
        float(fraction),
        mode,
        buffer,
        prior=rows_of_kind(REAL, 5),
        prior_share=float(share),
    )
    quiet_trainer(max_epochs=1, max_steps=-1).fit(module, datamodule=data)
    new = replayed = real = 0
    for size, (kept, sampled, prior) in zip(sizes, module.counts, strict=True):
        before = new, replayed
        new, replayed, real = new + kept, replayed + sampled + prior, real + prior
        # Since replay : new = fraction : (1 - fraction), and no row can be cut in two.
        owed = math.floor(new * fraction / (1 - fraction))
        if mode == "append":
            assert (kept, replayed) == (size, owed)
        else:
            assert kept + sampled + prior == size
            full = math.floor((sum(before) + size) * fraction)
            assert replayed == min(full, before[1] + size - 1)
            assert fraction > 0.5 or replayed == full
        assert real == math.floor(replayed * share)


@st.composite
def calls(draw: Any) -> list[tuple[str, int]]:
    one = st.one_of(
        st.tuples(st.just("add"), st.integers(0, 12)),
        st.tuples(st.just("draw"), st.integers(0, 20)),
        st.tuples(st.just("restore"), st.sampled_from([0, 1, 2])),
    )
    return [("add", draw(st.integers(1, 12))), *draw(st.lists(one, max_size=12))]


@settings(deadline=None, max_examples=100)
@given(
    capacity=st.integers(1, 8),
    policy=st.sampled_from(["fifo", "reservoir"]),
    seed=st.integers(0, 2**32),
    sequence=calls(),
)
def test_a_buffer_keeps_its_word_in_any_sequence_of_calls(
    capacity: int, policy: Any, seed: int, sequence: list[tuple[str, int]]
) -> None:
    buffer = ReplayBuffer(capacity, 4, policy, seed)
    seen = 0
    held: list[int] = []  # each row is named by a number of its own
    waiting: set[int] = set()  # what the pass under way has yet to draw
    uses: dict[int, int] = {}
    added_at: dict[int, int] = {}
    for step, (call, number) in enumerate(sequence):
        if call == "add":
            new = list(range(seen, seen + number))
            tokens = torch.tensor(new, dtype=torch.int64).unsqueeze(1).expand(number, 4)
            buffer.add(tokens, 1 + torch.tensor(new, dtype=torch.int64) % 4, step)
            seen += number
            now = buffer.state_dict()["tokens"][:, 0].tolist()
            assert len(now) == len(set(now)) == len(buffer) == min(seen, capacity)
            if policy == "fifo":
                assert sorted(now) == list(range(seen))[-capacity:]
            else:
                assert set(now) <= {*held, *new}
                assert seen > capacity or len(now) == seen
            held, waiting = now, (waiting | set(new)) & set(now)
            uses |= dict.fromkeys(new, 0)
            added_at |= dict.fromkeys(new, step)
        elif call == "draw":
            rows = buffer.draw(number)
            assert rows.uses is not None
            assert rows.steps is not None
            names = rows.tokens[:, 0].tolist()
            assert len(names) == number
            for name in names:
                waiting = waiting or set(held)
                assert name in waiting
                waiting.remove(name)
                uses[name] += 1
            assert rows.uses.tolist() == [uses[name] for name in names]
            assert rows.steps.tolist() == [added_at[name] for name in names]
            assert rows.lengths.tolist() == [1 + name % 4 for name in names]
            assert all(row[: 1 + name % 4].eq(name).all() for row, name in zip(rows.tokens, names, strict=True))
        elif number == 0:
            buffer = ReplayBuffer.from_state_dict(buffer.state_dict())
        else:
            with TemporaryDirectory() as folder:
                path = Path(folder) / ("rows.parquet" if number == 1 else "rows.safetensors")
                buffer.save(path)
                buffer = ReplayBuffer.load(path)
        assert buffer.unused == len(waiting)
        assert buffer.max_token == max(held)


@st.composite
def ragged(draw: Any, length: int, rows: int, least: int = 1) -> ReplayRows:
    """Rows with lengths and targets, of tokens from 1 to 50."""
    seed, lengths = draw(st.integers(0, 999)), draw(st.lists(st.integers(least, length), min_size=rows, max_size=rows))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 51, (rows, length), generator=generator)
    given_rows = ReplayRows(tokens, torch.tensor(lengths), torch.rand(rows, length, generator=generator) > 0.4)
    return given_rows._replace(tokens=tokens * given_rows.mask)


sizes = st.integers(1, 5)
lengths = st.integers(2, 9)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), new=sizes, length=lengths, added=sizes, width=lengths, side=st.sampled_from(["left", "right"]))
def test_joined_rows_come_apart_again(data: Any, new: int, length: int, added: int, width: int, side: Any) -> None:
    tokens = torch.randint(1, 51, (new, length), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    batch: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    batch["source"] = "book"
    rows = data.draw(ragged(width, added))
    joined = join_rows(batch, rows, padding_side=side, pad_token_id=99)
    assert row_count(joined) == new + added
    first, wide = crop_batch(joined, new), max(length, width)
    places = slice(wide - length, wide) if side == "left" else slice(length)
    assert first["source"] == "book"
    for name in ("input_ids", "attention_mask", "labels"):
        assert joined[name].shape == (new + added, wide)
        assert torch.equal(first[name][:, places], batch[name])
    assert int(first["attention_mask"].sum()) == tokens.numel()  # and nothing but padding beside them
    assert (joined["input_ids"] == 99).equal(joined["attention_mask"] == 0)

    last = {name: joined[name][new:] for name in ("input_ids", "attention_mask", "labels")}
    again = rows_of(last)
    assert torch.equal(again.lengths, rows.lengths)
    assert torch.equal(again.tokens[:, :width] * rows.mask, rows.tokens)
    assert torch.equal(again.targets_mask[:, : width - 1], rows.targets_mask)
    assert not again.targets_mask[:, width - 1 :].any()

    # What a model is asked, row by row: each token that is a target, after all that stand before it.
    asked, answers = right_padded(last)
    assert rows.targets is not None
    for index, (row, count, is_target) in enumerate(zip(*map(Tensor.tolist, rows[:3]), strict=True)):
        expected = [(row[:place], row[place]) for place in range(1, count) if is_target[place]]
        found = [
            (asked[index, : place + 1].tolist(), answer)
            for place, answer in enumerate(answers[index].tolist())
            if answer >= 0
        ]
        assert found == expected


@settings(deadline=None, max_examples=100)
@given(data=st.data(), new=sizes, length=lengths, added=sizes, width=lengths)
def test_rows_joined_to_pairs_come_apart_again(data: Any, new: int, length: int, added: int, width: int) -> None:
    tokens = torch.randint(1, 51, (new, length + 1))
    rows = data.draw(ragged(width, added, least=2))
    inputs, targets = join_rows((tokens[:, :-1], tokens[:, 1:]), rows)
    assert torch.equal(inputs[:new, :length], tokens[:, :-1])
    assert torch.equal(targets[:new, :length], tokens[:, 1:])
    assert (targets[:new, length:] == -100).all()
    again = rows_of((inputs[new:], targets[new:]))
    assert torch.equal(again.targets_mask[:, : width - 1], rows.targets_mask)
    assert not again.targets_mask[:, width - 1 :].any()
    assert torch.equal(again.tokens[:, 1:width][rows.targets_mask], rows.tokens[:, 1:][rows.targets_mask])
    context = rows.mask[:, 1:]  # every token but a row's last one is context
    assert torch.equal(again.tokens[:, : width - 1][context], rows.tokens[:, :-1][context])


@given(new=sizes, added=sizes, length=lengths, kept=st.integers(0, 12))
def test_bare_tensors_are_joined_and_cropped(new: int, added: int, length: int, kept: int) -> None:
    tokens, more = torch.randint(50, (new, length)), torch.randint(50, (added, length))
    joined = join_rows(tokens, ReplayRows(more, torch.full((added,), length)))
    assert torch.equal(joined, torch.cat([tokens, more]))
    cropped = crop_batch(joined, kept)
    assert cropped.tolist() == [*tokens.tolist(), *more.tolist()][:kept]
    assert torch.equal(rows_of(joined).tokens, joined)
    assert rows_of(joined).targets_mask.all()
