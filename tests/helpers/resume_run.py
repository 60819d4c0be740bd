"""Runs that get killed: `python -m tests.helpers.resume_run JOBS.json` trains each job in a process of its own."""

import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from peft import LoraConfig, get_peft_model
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_replay import (
    EMA,
    Cached,
    Copy,
    ForgettingBudget,
    ForgettingMonitor,
    ReplayDataModule,
    Sampling,
    SelfGeneratedReplay,
)
from tests.helpers.modules import VOCABULARY, Rows, UserModule, mapping_loader, quiet_trainer

STEPS = 10


class JsonLines(Logger):
    """Appends whatever is logged to a file, at once and to the last bit."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "lines"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps([step, key, float(value)]) + "\n" for key, value in metrics.items())


class Witness(L.Callback):
    """Writes down which rows travel with each step; kills its own process at the hook and the step it is told."""

    def __init__(self, path: Path, kill: tuple[str, int] | None, slow: float) -> None:
        self.path = path
        self.kill = kill
        self.slow = slow

    def _at(self, hook: str, trainer: L.Trainer) -> None:
        if self.kill is not None and self.kill[0] == hook and trainer.global_step >= self.kill[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        time.sleep(self.slow)
        self._at("batch start", trainer)
        self._write(trainer, getattr(trainer.datamodule, "drawn", None))  # type: ignore[attr-defined]

    def _write(self, trainer: L.Trainer, drawn: Any) -> None:
        if drawn is not None:
            digest = int(hashlib.sha256(drawn.tokens.numpy().tobytes()).hexdigest()[:12], 16)
            batch = trainer.fit_loop.total_batch_idx
            with self.path.open("a") as file:
                file.write(json.dumps([batch, "rows drawn", digest]) + "\n")

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        self._at("optimizer step", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.datamodule is None:  # type: ignore[attr-defined]
            (replay,) = (one for one in trainer.callbacks if isinstance(one, SelfGeneratedReplay))  # type: ignore[attr-defined]
            self._write(trainer, replay.drawn)
        self._at("batch end", trainer)


class KilledWhileSampling:
    """A filter that keeps all samples, and kills its process in the refill that it is told, if any."""

    def __init__(self, refill: int | None) -> None:
        self.refill = refill
        self.refills = 0

    def __call__(self, samples: Any) -> torch.Tensor:
        self.refills += 1
        if self.refills == self.refill:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(len(samples.tokens), dtype=torch.bool)


def kill_at_checkpoint(folder: Path, step: int) -> None:
    """Kill this process when it has written a step's checkpoint, and not yet moved it to its place."""
    tempfile.tempdir = str(folder)  # what is left lying about

    def kill(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "shutil.move" and str(arguments[1]).endswith(f"={step}.ckpt"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)


def tiny_model(lora: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
    )
    model: torch.nn.Module = LlamaForCausalLM(config)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if lora else model


def run(job: dict[str, Any]) -> None:
    """Train once, as the job says, from the last checkpoint in its folder if it is to resume."""
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "logged.jsonl"
    options = {"seed": 5} | ({"replay_fraction": 0.2} if job.get("alone") else {}) | job["replay"]
    kill = job.get("kill")
    if kill and kill[0] == "checkpoint":
        kill_at_checkpoint(folder, kill[1])
    filters = [KilledWhileSampling(kill[1] if kill and kill[0] == "sampling" else None)]
    module = UserModule(tiny_model(job.get("lora", False)))
    if isinstance(options.get("reference"), list):
        kind, settings = options["reference"]
        options["reference"] = {"Copy": Copy, "Cached": Cached, "EMA": EMA}[kind](**settings)
    if isinstance(options.get("coefficient"), list):
        options["coefficient"] = ForgettingBudget(*options["coefficient"])
    if options.get("loss") != "lwf":  # which samples nothing
        options = {"refill_rows": 4, "sampling": Sampling(filters=filters)} | options
    replay = SelfGeneratedReplay(**options)
    monitor = ForgettingMonitor({"prior": mapping_loader(8)}, every_n_steps=2, max_batches=1)
    loader: Any = StatefulDataLoader(Rows(32), batch_size=8, shuffle=True, num_workers=job.get("workers", 0))
    data = None if job.get("alone") else ReplayDataModule(loader, **{"replay_fraction": 0.2} | job.get("data", {}))
    accumulate = job.get("accumulate", 1)
    trainer = quiet_trainer(
        callbacks=[
            Witness(lines, kill, job.get("slow", 0.0)),
            replay,
            monitor,
            ModelCheckpoint(folder, "steps-{step}", every_n_train_steps=3, save_top_k=-1),
            ModelCheckpoint(folder, "epoch-{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True),
        ],
        logger=JsonLines(lines),
        log_every_n_steps=1,
        enable_checkpointing=True,
        accumulate_grad_batches=accumulate,
        max_steps=job.get("steps", STEPS),
    )
    torch.manual_seed(1)
    checkpoint = last_checkpoint(folder) if job.get("resume") else None
    given = {"train_dataloaders": loader} if data is None else {"datamodule": data}
    trainer.fit(module, **given, ckpt_path=checkpoint, weights_only=None if checkpoint is None else True)
    result = {
        "weights": module.state_dict(),
        "buffer": None if replay.rows.buffer is None else replay.rows.buffer.state_dict(),
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items() if "seconds" not in key},
    }
    torch.save(result, folder / "result.pt")


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("*.ckpt"), key=lambda path: (int(path.stem.split("=")[1]), path.stem))


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    if len(jobs) == 1:
        run(jobs[0])
        return
    # A process for each job; what takes long to import has been.
    for job in jobs:
        child = os.fork()
        if not child:
            try:
                run(job)
            except BaseException as error:
                print(job["folder"], type(error).__name__, error, file=sys.stderr, flush=True)
                raise
            finally:
                sys.stderr.flush()
                os._exit(0 if (Path(job["folder"]) / "result.pt").exists() else 1)
        _, status = os.waitpid(child, 0)
        ended = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        with Path(job["folder"], "ends.jsonl").open("a") as file:
            file.write(f"{ended}\n")


if __name__ == "__main__":
    main()
