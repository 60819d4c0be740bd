from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_replay import ReplayBuffer, ReplayDataModule, ReplayRows
from lightning_replay.data.share import ReplayShare
from tests.helpers.modules import (
    HandWritten,
    PairModule,
    Rows,
    TokensModule,
    UserModule,
    mapping_loader,
    pair_loader,
    quiet_trainer,
    tensor_loader,
)

REPLAYED = 31


def filled(rows: int = 16, length: int = 12) -> ReplayBuffer:
    """A buffer whose rows can be told from the new ones."""
    buffer = ReplayBuffer(rows, length)
    buffer.add(torch.full((rows, length), REPLAYED))
    return buffer


class Recorder(UserModule):
    """Keeps the batches of every stage."""

    def __init__(self) -> None:
        super().__init__(HandWritten())
        self.seen: dict[str, list[Any]] = {"fit": [], "validate": [], "test": [], "predict": []}

    def loss(self, batch: Any) -> Tensor:
        self.seen["fit"].append(batch)
        return self.model(batch["input_ids"]).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["validate"].append(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["test"].append(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["predict"].append(batch)


class UserData(L.LightningDataModule):
    """Has every hook that a datamodule can have."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"corpus": "notes"})
        self.calls: list[str] = []
        self.topic = "cooking"

    def prepare_data(self) -> None:
        assert self.trainer is not None
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")

    def train_dataloader(self) -> DataLoader[Any]:
        return mapping_loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return mapping_loader(16)

    test_dataloader = predict_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("before")
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("after")
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"place": 7}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls.append(f"place {state_dict['place']}")


def replayed(batch: Any) -> int:
    tokens = batch["input_ids"] if isinstance(batch, dict) else batch[0] if isinstance(batch, (list, tuple)) else batch
    return int((tokens == REPLAYED).all(1).sum())


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = Rows()
        return iter([rows[i] for i in range(len(rows))])


LOADERS = {
    "map-style": lambda: mapping_loader(),
    "shuffled": lambda: mapping_loader(shuffle=True),
    "workers": lambda: mapping_loader(num_workers=2, persistent_workers=True),
    "iterable": lambda: DataLoader(Stream(), batch_size=8),
    "iterable with workers": lambda: DataLoader(Stream(), batch_size=8, num_workers=1),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_any_loader_gets_its_share_of_replay_rows(kind: str) -> None:
    module = Recorder()
    quiet_trainer(max_epochs=1, max_steps=-1).fit(
        module, datamodule=ReplayDataModule(LOADERS[kind](), 0.2, buffer=filled())
    )
    assert [len(batch["input_ids"]) for batch in module.seen["fit"]] == [10] * 8
    assert [replayed(batch) for batch in module.seen["fit"]] == [2] * 8


def test_pairs_and_bare_tensors_are_mixed_as_well() -> None:
    for module, loader, length in (
        (PairModule(HandWritten()), pair_loader(), 13),
        (TokensModule(HandWritten()), tensor_loader(), 12),
    ):
        quiet_trainer(max_steps=3).fit(module, datamodule=ReplayDataModule(loader, 0.2, buffer=filled(length=length)))
        assert [replayed(batch) for batch in module.batches] == [2] * 3


def test_validation_test_and_predict_batches_are_never_touched() -> None:
    module, data = Recorder(), ReplayDataModule(UserData(), 0.5, buffer=filled())
    trainer = quiet_trainer(max_epochs=1, max_steps=-1, val_check_interval=2, num_sanity_val_steps=2)
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.test(module, datamodule=data, verbose=False)
    trainer.predict(module, datamodule=data)
    assert all(replayed(batch) == 8 for batch in module.seen["fit"])
    for stage in ("validate", "test", "predict"):
        assert module.seen[stage]
        assert all(len(batch["input_ids"]) == 8 and not replayed(batch) for batch in module.seen[stage])


def test_the_wrapped_datamodule_is_called_as_if_it_were_alone() -> None:
    alone, wrapped = UserData(), UserData()
    for data in (alone, ReplayDataModule(wrapped, 0.2, buffer=filled())):
        quiet_trainer(max_steps=3).fit(Recorder(), datamodule=data)
    assert wrapped.calls == alone.calls
    assert wrapped.calls.count("before") == wrapped.calls.count("after")


def test_the_module_s_own_transfer_hooks_still_run() -> None:
    class WithHooks(Recorder):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch | {"before": "seen"}

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch | {"after": len(batch["input_ids"])}

    module = WithHooks()
    quiet_trainer(max_steps=1).fit(module, datamodule=ReplayDataModule(mapping_loader(), 0.2, buffer=filled()))
    (batch,) = module.seen["fit"]
    assert (batch["before"], batch["after"], len(batch["input_ids"])) == ("seen", 8, 10)


def test_attributes_and_hyperparameters_of_the_wrapped_datamodule_show_through() -> None:
    data = ReplayDataModule(UserData(), 0.25)
    assert data.topic == "cooking"
    assert dict(data.hparams) == {"corpus": "notes", "replay_fraction": 0.25, "replay_mode": "append"}
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = data.nothing_such


def test_an_empty_buffer_leaves_batches_alone() -> None:
    module, data = Recorder(), ReplayDataModule(mapping_loader(), 0.2, buffer=ReplayBuffer(4, 12))
    quiet_trainer(max_steps=2).fit(module, datamodule=data)
    assert [len(batch["input_ids"]) for batch in module.seen["fit"]] == [8, 8]


def test_replacing_keeps_the_batch_size_and_the_first_new_rows() -> None:
    module = Recorder()
    quiet_trainer(max_steps=4).fit(
        module, datamodule=ReplayDataModule(mapping_loader(), 0.25, mode="replace", buffer=filled())
    )
    for batch, original in zip(module.seen["fit"], mapping_loader(), strict=False):
        assert len(batch["input_ids"]) == 8
        assert replayed(batch) == 2
        assert torch.equal(batch["input_ids"][:6], original["input_ids"][:6])


def test_replacing_in_batches_of_one_is_refused() -> None:
    data = ReplayDataModule(mapping_loader(batch_size=1), 0.5, mode="replace", buffer=filled())
    with pytest.raises(MisconfigurationException, match="single row"):
        quiet_trainer().fit(Recorder(), datamodule=data)


@settings(deadline=None, max_examples=60)
@given(
    fraction=st.fractions(min_value=0, max_value=Fraction(95, 100), max_denominator=200),
    mode=st.sampled_from(["append", "replace"]),
    sizes=st.lists(st.lists(st.integers(min_value=2, max_value=33), min_size=1, max_size=4), min_size=1, max_size=60),
)
def test_the_share_is_exact_in_the_long_run_whatever_the_processes(
    fraction: Fraction, mode: Any, sizes: list[list[int]]
) -> None:
    share = ReplayShare(float(fraction), mode)
    new = replay = 0
    for batches in sizes:
        kept, takers, _ = share.deal(batches)
        added = [takers.count(rank) for rank in range(len(batches))]
        assert sum(added) == len(takers)
        for size, stays, joins in zip(batches, kept, added, strict=True):
            assert stays >= 1
            assert stays == size if mode == "append" else stays + joins == size
        # Evenly, what is over to the first processes, where there is room.
        room = [rank for rank, stays in enumerate(kept) if mode == "append" or stays > 1]
        evenly = [added[rank] for rank in room]
        assert evenly == sorted(evenly, reverse=True)
        assert max(evenly, default=0) - min(evenly, default=0) <= 1
        new, replay = new + sum(kept), replay + sum(added)
        # Never more than the share, and short of it by less than a row, unless a batch had no more room.
        assert replay <= fraction * (new + replay)
        if mode == "append":
            assert new * fraction / (1 - fraction) - replay < 1


def test_a_custom_batch_is_mixed_by_the_user_s_function() -> None:
    class Custom(UserModule):
        def loss(self, batch: Any) -> Tensor:
            return self.model(batch["question"]).square().mean()  # type: ignore[no-any-return]

    batches: Any = [{"question": Rows().tokens[:8]}] * 4
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)

    def mixed(batch: Any, rows: ReplayRows) -> Any:
        return {"question": torch.cat([batch["question"], rows.tokens])}

    data = ReplayDataModule(loader, 0.2, buffer=filled(), to_batch=mixed)
    module = Custom(HandWritten())
    quiet_trainer(max_steps=2).fit(module, datamodule=data)
    assert [len(batch["question"]) for batch in module.batches] == [10, 10]
    with pytest.raises(TypeError, match="`to_batch`"):
        quiet_trainer().fit(Custom(HandWritten()), datamodule=ReplayDataModule(loader, 0.2, buffer=filled()))


def test_state_goes_through_a_checkpoint(tmp_path: Any) -> None:
    data = ReplayDataModule(UserData(), 0.3, buffer=filled())
    trainer = quiet_trainer(max_steps=3, default_root_dir=tmp_path)
    trainer.fit(Recorder(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["ReplayDataModule"]
    restored = ReplayDataModule(UserData(), 0.3)
    restored.load_state_dict(state)
    assert restored.buffer is not None
    assert data.buffer is not None
    assert restored.buffer.unused == data.buffer.unused
    assert restored.feed.share.deal([8]) == data.feed.share.deal([8])
    assert restored.calls == ["place 7"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"replay_fraction": 1.0}, ValueError, "from 0 to below 1; got 1.0"),
        ({"replay_fraction": -0.1}, ValueError, "from 0 to below 1; got -0.1"),
        ({"replay_fraction": float("nan")}, ValueError, "got nan"),
        ({"mode": "swap"}, ValueError, "'append', 'replace'"),
        ({"padding_side": "top"}, ValueError, "'left', 'right'"),
        ({"data": 3}, TypeError, "got int"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ReplayDataModule(**({"data": mapping_loader()} | arguments))


def marked(token: int, rows: int = 10, length: int = 12) -> Tensor:
    return torch.full((rows, length), token)


@pytest.mark.parametrize("share", [0.25, 1 / 3, 1.0])
def test_real_and_sampled_rows_come_in_exactly_their_shares(share: float) -> None:
    module = Recorder()
    data = ReplayDataModule(mapping_loader(), 0.5, buffer=filled(), prior=marked(30), prior_share=share)
    quiet_trainer(max_steps=6).fit(module, datamodule=data)
    replayed = torch.cat([batch["input_ids"][8:, 0] for batch in module.seen["fit"]])
    assert len(replayed) == 48
    assert int((replayed == 30).sum()) == 48 * Fraction(share).limit_denominator(100)
    assert int((replayed == REPLAYED).sum()) == 48 - int((replayed == 30).sum())


def test_real_rows_alone_need_no_callback_and_each_is_drawn_before_any_is_again() -> None:
    module = Recorder()
    rows = 20 + torch.arange(10).unsqueeze(1).expand(-1, 12)
    data = ReplayDataModule(mapping_loader(), 0.2, prior=DataLoader(rows, batch_size=4))  # type: ignore[arg-type]
    quiet_trainer(max_steps=5).fit(module, datamodule=data)
    replayed = [batch["input_ids"][8:, 0] for batch in module.seen["fit"]]
    assert sorted(torch.cat(replayed).tolist()) == list(range(20, 30))


def test_real_rows_of_another_length_are_padded_beside_sampled_ones() -> None:
    module = Recorder()
    data = ReplayDataModule(mapping_loader(), 0.5, buffer=filled(), prior=marked(30, length=6))
    quiet_trainer(max_steps=1).fit(module, datamodule=data)
    batch = module.seen["fit"][0]
    short = batch["input_ids"][:, 0] == 30
    assert batch["attention_mask"][short].sum(1).unique().tolist() == [6]
    assert (batch["labels"][short][:, 6:] == -100).all()


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_of_real_rows_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="`prior_share`"):
        ReplayDataModule(mapping_loader(), prior_share=share)


def test_a_prior_without_rows_is_refused_before_the_first_step() -> None:
    module = Recorder()
    with pytest.raises(ValueError, match="`prior` holds no row"):
        quiet_trainer().fit(module, datamodule=ReplayDataModule(mapping_loader(), prior=[]))
    assert not module.seen["fit"]
