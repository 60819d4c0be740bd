"""Replay without a `ReplayDataModule`: the callback alone, with the user's own loaders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_replay import ForgettingMonitor, ReplayDataModule, Sampling, SelfGeneratedReplay
from tests.helpers.by_hand import weights
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

Make = Callable[..., LlamaForCausalLM]


class Watch(L.Callback):
    """Keeps the replay rows of each step and what was logged by then."""

    def __init__(self, replay: SelfGeneratedReplay) -> None:
        self.replay = replay
        self.rows: list[Tensor] = []
        self.figures: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self.replay.drawn is not None:
            self.rows.append(self.replay.drawn.tokens)
        metrics = trainer.callback_metrics.items()
        self.figures.append({key: float(value) for key, value in metrics if not key.endswith("seconds")})


class UserData(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return mapping_loader()

    def val_dataloader(self) -> Any:
        return mapping_loader(16)


def run(
    model: Any, data: Any, replay: SelfGeneratedReplay, *callbacks: L.Callback, **options: Any
) -> tuple[Tensor, Watch]:
    torch.manual_seed(0)
    module, watch, checkpoint = UserModule(model), Watch(replay), options.pop("ckpt_path", None)
    trainer = quiet_trainer(callbacks=[replay, *callbacks, watch], **{"max_steps": 8} | options)
    where = {"datamodule": data} if isinstance(data, L.LightningDataModule) else {"train_dataloaders": data}
    trainer.fit(module, **where, ckpt_path=checkpoint)
    return weights(module), watch


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "ntp"},
        {"loss": "ntp", "source": "live"},
        {"reference": "cached"},
        {"reference": "ema"},
        {"background": True, "uses_per_sample": 2},
        {"lora": True},
        {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items()) or "default",
)
def test_the_callback_alone_trains_as_with_the_datamodule_to_the_last_bit(
    tiny_llama: Make, options: dict[str, Any]
) -> None:
    results = []
    for alone in (False, True):
        settings = dict(options)
        trainer, lora = settings.pop("trainer", {}), settings.pop("lora", False)
        model: Any = tiny_llama()
        torch.manual_seed(1)
        if lora:
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
        replay = SelfGeneratedReplay(refill_rows=6, seed=3, replay_fraction=0.2 if alone else None, **settings)
        loader = mapping_loader(64)
        results.append(run(model, loader if alone else ReplayDataModule(loader, 0.2), replay, **trainer))
    (theirs, there), (ours, here) = results
    assert torch.equal(ours, theirs)
    assert len(here.rows) == 8 * options.get("trainer", {}).get("accumulate_grad_batches", 1)
    assert torch.equal(torch.cat(here.rows), torch.cat(there.rows))
    assert here.figures == there.figures


def test_shares_add_up_when_a_batch_owes_a_part_of_a_row(tiny_llama: Make) -> None:
    replay = SelfGeneratedReplay("ntp", replay_fraction=0.1, refill_rows=4)
    _, watch = run(tiny_llama(), mapping_loader(72), replay, max_steps=9)
    # 8 new rows owe 8/9 of a row: none for the first batch, one for each of the others.
    assert [len(rows) for rows in watch.rows] == [1] * 8
    assert watch.figures[-1]["replay/rows_sampled"] == 8


def test_by_default_one_row_in_ten_is_replayed(tiny_llama: Make) -> None:
    for data in (mapping_loader(72, batch_size=18), ReplayDataModule(mapping_loader(72, batch_size=18))):
        _, watch = run(tiny_llama(), data, SelfGeneratedReplay(), max_steps=4)
        assert [len(rows) for rows in watch.rows] == [2] * 4


@pytest.mark.parametrize("kind", ["datamodule", "pairs", "tokens", "custom"])
def test_any_data_will_do(tiny_llama: Make, kind: str) -> None:
    class Custom(UserModule):
        def loss(self, batch: Any) -> Tensor:
            output: Tensor = self.model(batch["question"]).square().mean()
            return output

    questions: Any = [{"question": Rows().tokens[:8]}] * 4
    cases: dict[str, Callable[[], tuple[UserModule, Any, dict[str, Any]]]] = {
        "datamodule": lambda: (UserModule(tiny_llama()), UserData(), {}),
        "pairs": lambda: (PairModule(HandWritten()), pair_loader(), {"sampling": Sampling(prompts=[[1]])}),
        "tokens": lambda: (TokensModule(HandWritten()), tensor_loader(), {"sampling": Sampling(prompts=[[1]])}),
        "custom": lambda: (
            Custom(HandWritten()),
            DataLoader(questions, batch_size=None),
            {"sampling": Sampling(prompts=[[1]]), "sequence_length": 12},
        ),
    }
    module, data, options = cases[kind]()
    replay = SelfGeneratedReplay(replay_fraction=0.2, refill_rows=8, **options)
    watch = Watch(replay)
    quiet_trainer(callbacks=[replay, watch], max_steps=4).fit(module, data)
    assert [len(rows) for rows in watch.rows] == [2] * 4
    assert watch.figures[-1]["replay/loss"] > 0
    seen = module.batches[0]
    tokens = next(iter(seen.values())) if isinstance(seen, dict) else seen[0] if isinstance(seen, list) else seen
    assert len(tokens) == 8


@pytest.mark.parametrize("options", [{}, {"loss": "ntp", "source": "live"}, {"reference": "cached"}])
def test_a_resumed_run_ends_as_the_uninterrupted_one(tiny_llama: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    def replay() -> SelfGeneratedReplay:
        return SelfGeneratedReplay(replay_fraction=0.15, refill_rows=3, seed=3, **options)

    # Four steps are an epoch; by then two rows of the second refill have been drawn.
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    straight, all_of_it = run(
        tiny_llama(), mapping_loader(32), replay(), saver, max_steps=10, enable_checkpointing=True
    )
    checkpoint = tmp_path / "step=4.ckpt"
    resumed, rest = run(tiny_llama(), mapping_loader(32), replay(), max_steps=10, ckpt_path=checkpoint)
    assert torch.equal(straight, resumed)
    assert torch.equal(torch.cat(all_of_it.rows)[-len(torch.cat(rest.rows)) :], torch.cat(rest.rows))
    assert rest.figures[-1].items() <= all_of_it.figures[-1].items()  # those of a refill are logged at refills only
    state = torch.load(checkpoint, weights_only=True)
    assert state["lightning_replay_rows"]["buffer"]["seen"] > 0


def test_a_fraction_of_zero_changes_no_bit(tiny_llama: Make) -> None:
    plain = UserModule(tiny_llama())
    torch.manual_seed(0)
    quiet_trainer(max_steps=8).fit(plain, mapping_loader())
    ours, watch = run(tiny_llama(), mapping_loader(), SelfGeneratedReplay(replay_fraction=0))
    assert torch.equal(ours, weights(plain))
    assert not watch.rows


def test_several_fits_begin_with_rows_of_their_own_reference(tiny_llama: Make) -> None:
    module = UserModule(tiny_llama(), learning_rate=0.1)
    replay = SelfGeneratedReplay(replay_fraction=0.2, refill_rows=8, seed=3)
    rows = []
    for _ in range(2):
        watch = Watch(replay)
        quiet_trainer(callbacks=[replay, watch], max_steps=2).fit(module, mapping_loader())
        rows.append(torch.cat(watch.rows))
    assert not torch.equal(*rows)
    assert replay.rows.generator.rows == 16
    assert replay.drawn is None


def test_arguments_are_logged_beside_the_user_s(tiny_llama: Make, tmp_path: Path) -> None:
    class Theirs(UserModule):
        def __init__(self, model: Any, temper: float) -> None:
            super().__init__(model)
            self.save_hyperparameters("temper")

    logger = CSVLogger(tmp_path)
    replay = SelfGeneratedReplay(
        coefficient=3.0, replay_fraction=0.2, refill_rows=4, sampling=Sampling(temperature=0.5)
    )
    quiet_trainer(callbacks=[replay], logger=logger, max_steps=1).fit(Theirs(tiny_llama(), 7.0), mapping_loader())
    logger.save()
    written = (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert "temper: 7.0" in written
    assert "temperature: 0.5" in written
    assert "coefficient: 3.0" in written


def test_the_monitor_shares_the_reference(tiny_llama: Make) -> None:
    monitor = ForgettingMonitor({"prior": mapping_loader(8)}, every_n_steps=2)
    _, watch = run(tiny_llama(), mapping_loader(), SelfGeneratedReplay(refill_rows=8), monitor)
    assert watch.figures[-1]["prior_kl/prior"] > 0
    assert monitor._own_reference.taken is None
