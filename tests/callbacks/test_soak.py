"""A long run, to see that nothing grows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaForCausalLM

from lightning_replay import Copy, ForgettingMonitor, ReplayDataModule, SelfGeneratedReplay
from tests.helpers.modules import PlainDescent, mapping_loader, quiet_trainer
from tests.helpers.resume_run import JsonLines

STEPS = 20_000


class Forgetful(PlainDescent):
    """Keeps nothing of what its step saw, for once."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class Watch(L.Callback):
    """Takes the process's measures, and sees that the buffer's figures agree with each other."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.memory: list[float] = []
        self.files: list[int] = []
        self.threads: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        step, data = trainer.global_step, trainer.datamodule  # type: ignore[attr-defined]
        (replay,) = (callback for callback in trainer.callbacks if isinstance(callback, SelfGeneratedReplay))  # type: ignore[attr-defined]
        buffer, drawn = replay.rows.buffer, data.drawn
        assert buffer is not None
        assert len(buffer) == buffer.capacity == 64
        # Each row once: what is left of a refill and what the steps since have drawn make it up.
        assert buffer.unused == -2 * step % 64
        assert drawn.uses.tolist() == [1, 1]
        assert step - 32 <= int(drawn.steps.min()) == int(drawn.steps.max()) == (step - 1) // 32 * 32
        if step % 500 == 0:
            self.memory.append(self.process.memory_info().rss / 2**20)
            self.files.append(self.process.num_fds())
            self.threads.append(self.process.num_threads())


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_nothing_grows_in_many_steps(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    watch, data = Watch(), ReplayDataModule(mapping_loader(64), 0.2)
    replay = SelfGeneratedReplay(
        reference=Copy(save="beside"), refill_rows=64, uses_per_sample=1, background=True, seed=3
    )
    trainer = quiet_trainer(
        max_steps=STEPS,
        logger=JsonLines(tmp_path / "logged.jsonl"),
        enable_checkpointing=True,
        callbacks=[
            replay,
            ForgettingMonitor({"prior": mapping_loader(8)}, every_n_steps=100),
            watch,
            ModelCheckpoint(tmp_path, every_n_train_steps=500),
        ],
    )
    trainer.fit(Forgetful(tiny_llama(num_hidden_layers=1), 1e-3), datamodule=data)
    assert trainer.global_step == STEPS
    assert trainer.callback_metrics["replay/rows_sampled"] == 2 * STEPS
    warm = len(watch.memory) // 4
    with capsys.disabled():
        print(
            f"\nMiB at steps 500, {500 * (warm + 1)} and {STEPS}:",
            watch.memory[0],
            watch.memory[warm],
            watch.memory[-1],
        )
        print("open files:", set(watch.files[warm:]), "threads:", set(watch.threads[warm:]))
    assert max(watch.memory[warm:]) - watch.memory[warm] < 16
    assert len(set(watch.files[warm:])) == 1
    assert max(watch.threads[warm:]) == min(watch.threads[warm:])
    assert len(list(tmp_path.glob("*.ckpt"))) == len(list(tmp_path.glob("reference-*"))) == 1
