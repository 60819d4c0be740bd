"""Runs that meet a fault: `python -m tests.helpers.fault_run KIND FOLDER [NUMBER]`, in a process of their own."""

import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_replay import ReplayDataModule, Sampling, SelfGeneratedReplay
from tests.helpers.modules import UserModule, mapping_loader, quiet_trainer
from tests.helpers.resume_run import tiny_model


class Slow:
    """A filter that keeps all samples, and takes its time in the third refill, of which it leaves word."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = 0

    def __call__(self, samples: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            (self.folder / "sampling").touch()
            time.sleep(3)
        return torch.ones(len(samples.tokens), dtype=torch.bool)


class Before(L.Callback):
    """Keeps the buffer as it was after the last step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        (replay,) = (callback for callback in trainer.callbacks if isinstance(callback, SelfGeneratedReplay))  # type: ignore[attr-defined]
        buffer = replay.rows.buffer
        assert buffer is not None
        torch.save({"step": trainer.global_step} | buffer.state_dict(), self.folder / "before.pt")


def meet_a_signal(folder: Path) -> None:
    """Be interrupted while rows are sampled."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in a shell's background
    replay = SelfGeneratedReplay(refill_rows=4, seed=5, sampling=Sampling(filters=[Slow(folder)]))
    callbacks = [replay, Before(folder), OnExceptionCheckpoint(folder, "interrupted")]
    data = ReplayDataModule(mapping_loader(64), 0.2)
    trainer = quiet_trainer(callbacks=callbacks, max_steps=40, enable_checkpointing=True)
    trainer.fit(UserModule(tiny_model(False)), datamodule=data)


def run_out_of_memory(folder: Path, megabytes: int, vocabulary: int) -> None:
    """Sample from a model with a large vocabulary, with so much more memory than the process has already."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=1,
        initializer_range=0.5,
    )

    class Limit(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        def on_train_epoch_start(self, *args: Any) -> None:
            if megabytes:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * resource.getpagesize() + megabytes * 2**20
                resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    replay = SelfGeneratedReplay("ntp", source="live", refill_rows=256, seed=5)
    data = ReplayDataModule(mapping_loader(8, batch_size=2), 0.5)
    trainer = quiet_trainer(callbacks=[replay, Limit()], max_steps=1)
    trainer.fit(UserModule(LlamaForCausalLM(config)), datamodule=data)
    assert replay.rows.buffer is not None
    state = replay.rows.buffer.state_dict() | {"batch_size": replay.rows.generator.batch_size}
    torch.save(state, folder / "buffer.pt")


if __name__ == "__main__":
    if sys.argv[1] == "signal":
        meet_a_signal(Path(sys.argv[2]))
    else:
        run_out_of_memory(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
