"""Fits for one process or several: `python -m tests.helpers.process_runs FOLDER NAME...` runs some of them.

Each process writes what it saw to `FOLDER/NAME-RANK.pt`.
"""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM
from typing_extensions import override

from lightning_replay import (
    BenchmarkMonitor,
    Cached,
    ForgettingBudget,
    ForgettingMonitor,
    LanguageModel,
    ReplayDataModule,
    ReplayShards,
    Sampling,
    SelfGeneratedReplay,
    generate_rows,
)
from lightning_replay.data.batches import rows_in
from lightning_replay.data.feed import RowFeed
from lightning_replay.sampling.draw import sample_rows
from tests.helpers.modules import VOCABULARY, PlainDescent, Rows, mapping_loader, quiet_trainer
from tests.helpers.tasks import TASKS, number_tokenizer, write_tasks

GLOBAL_BATCH = 8
TIMEOUT = int(os.environ.get("TEST_TIMEOUT", 60))
"""Seconds that a process waits for another."""


RANK, WORLD = (int(os.environ.get(name, default)) for name, default in {"LOCAL_RANK": 0, "WORLD_SIZE": 1}.items())
"""Read at once: Lightning clears them after a fit."""


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


class Watch(L.Callback):
    """Keeps what each step drew and lost, and the state of the buffer after it."""

    def __init__(self, replay: SelfGeneratedReplay | None) -> None:
        self.replay = replay
        self.seen: list[dict[str, Any]] = []

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data: ReplayDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
        loss = None if self.replay is None else self.replay.step.last_loss
        feed, buffer = _feed(data, self.replay), None
        if data is not None:
            buffer = data.buffer if data.shards is None else data.shards.buffer
        if self.replay is not None and self.replay.rows.buffer is not None:
            buffer = self.replay.rows.buffer
        self.seen.append(
            {
                "loss": float(outputs["loss"]),
                "replay_loss": 0.0 if loss is None or feed.drawn is None else float(loss) * feed.weight,
                "new": rows_in(batch),
                "drawn": [] if feed.drawn is None else _rows(feed.drawn),
                "weight": feed.weight,
                "buffer": None if buffer is None else buffer.state_dict(),
            }
        )


def _feed(data: ReplayDataModule | None, replay: SelfGeneratedReplay | None) -> RowFeed:
    """What draws the rows of a fit: the datamodule's, or that of the callback alone."""
    if data is not None:
        return data.feed
    assert replay is not None
    return replay.feed


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _rows(rows: Any) -> list[list[int]]:
    return [row[:length] for row, length in zip(rows.tokens.tolist(), rows.lengths.tolist(), strict=True)]


class Momentum(PlainDescent):
    """Lightning 2.6 can't restore an optimizer without a state of its own under ModelParallelStrategy."""

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=self.learning_rate, momentum=0.5)


class Sharded(Momentum):
    """FSDP2, as Lightning wants it."""

    @override
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for layer in self.model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def trainer_of(sharded: bool, **options: Any) -> L.Trainer:
    if sharded:
        options["strategy"] = ModelParallelStrategy(
            data_parallel_size=WORLD,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend="gloo",
            timeout=timedelta(seconds=TIMEOUT),
        )
        options["devices"] = WORLD
    elif WORLD > 1:
        options["strategy"] = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=TIMEOUT))
        options["devices"] = WORLD
    return quiet_trainer(**options)


def fit(
    replay: SelfGeneratedReplay | None,
    fraction: float = 0.3,
    data: dict[str, Any] | None = None,
    loader: Any = None,
    rows: int = 64,
    callbacks: Sequence[L.Callback] = (),
    ckpt_path: str | None = None,
    sharded: bool = False,
    alone: bool = False,
    **options: Any,
) -> dict[str, Any]:
    torch.manual_seed(100 + RANK)  # where chance should be the same in all processes, the library has to see to it
    watch = Watch(replay)
    kind = PlainDescent if not sharded else Sharded if WORLD > 1 else Momentum
    module = kind(tiny_llama(), learning_rate=0.02)
    if loader is None:  # a batch of all processes holds the rows of a single process's batch
        sampler: Any = DistributedSampler(Rows(rows), WORLD, RANK, shuffle=False)
        loader = mapping_loader(rows, batch_size=GLOBAL_BATCH // WORLD, sampler=sampler)
    trainer = trainer_of(
        sharded and WORLD > 1, callbacks=[*([] if replay is None else [replay]), watch, *callbacks], **options
    )
    module_data = None if alone else ReplayDataModule(loader, fraction, **data or {})
    given = {"train_dataloaders": loader} if module_data is None else {"datamodule": module_data}
    trainer.fit(module, **given, ckpt_path=ckpt_path)
    feed = _feed(module_data, replay)
    return {
        "steps": watch.seen,
        "weights": torch.cat([_whole(weight.detach()).flatten() for weight in module.parameters()]),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "tokens": (feed.new_tokens, feed.replay_tokens),
        "refills": 0 if replay is None else replay.rows.generator.refills,
    }


def prior_rows() -> Tensor:
    return torch.randint(3, VOCABULARY, (10, 9), generator=torch.Generator().manual_seed(3))


def kl(folder: Path) -> Any:
    """Rows of several lengths, filtered, beside real ones."""
    replay = SelfGeneratedReplay(
        coefficient=2.0,
        seed=5,
        refill_rows=7,
        sequence_length=12,
        sampling=Sampling(stop_at_eos=True, filters=[_starts_low]),
    )
    return fit(replay, data={"prior": prior_rows(), "prior_share": 0.3})


def _starts_low(samples: Any) -> Tensor:
    return samples.tokens[:, 1] < 24  # type: ignore[no-any-return]


def budget(folder: Path) -> Any:
    """Rows of several lengths, so that the processes measure on different numbers of tokens."""
    sampling = Sampling(stop_at_eos=True)
    replay = SelfGeneratedReplay(
        coefficient=ForgettingBudget(1e-4), seed=5, refill_rows=7, sequence_length=12, sampling=sampling
    )
    return fit(replay)


def ntp_with_a_single_row(folder: Path) -> Any:
    """One replay row in a step, so that a process has none."""
    return fit(SelfGeneratedReplay("ntp", 2.0, seed=5, refill_rows=3), 0.12)


def cached(folder: Path) -> Any:
    return fit(SelfGeneratedReplay(coefficient=2.0, seed=5, reference=Cached(top_k=8)))


def make_rows(folder: Path) -> None:
    """What `generated` reads, for all processes."""
    tiny_llama().save_pretrained(folder / "model")
    options: dict[str, Any] = {"sequence_length": 12, "shard_rows": 5, "reference_top_k": 8, "seed": 5}
    generate_rows(str(folder / "model"), 12, folder / "rows", **options)


def generated(folder: Path) -> Any:
    """Rows from a folder, five at a time and twice round."""
    if WORLD == 1:
        make_rows(folder)
    return fit(
        SelfGeneratedReplay(coefficient=2.0, reference="cached", seed=5),
        data={"buffer": ReplayShards(folder / "rows", shuffle=True, read_rows=5)},
    )


def callback_alone(folder: Path) -> Any:
    """Without a datamodule of ours."""
    return fit(SelfGeneratedReplay(coefficient=2.0, seed=5, refill_rows=7, replay_fraction=0.3), alone=True)


def every_third_step(folder: Path) -> Any:
    replay = SelfGeneratedReplay(coefficient=2.0, seed=5, refill_rows=14, every_n_steps=3, uses_per_sample=2)
    return fit(replay, accumulate_grad_batches=2, max_epochs=-1)


def replace(folder: Path) -> Any:
    return fit(SelfGeneratedReplay("ntp", seed=5, refill_rows=6), 0.4, data={"mode": "replace"})


def mixed(folder: Path) -> Any:
    return fit(SelfGeneratedReplay("mixed", seed=5, refill_rows=6))


def lwf(folder: Path) -> Any:
    return fit(SelfGeneratedReplay("lwf", 2.0), 0.0)


def uneven_padded(folder: Path) -> Any:
    """22 rows: Lightning's sampler gives each of two processes 11, in batches of 4, 4 and 3."""
    loader = mapping_loader(22, batch_size=GLOBAL_BATCH // WORLD)
    replay = SelfGeneratedReplay(coefficient=2.0, seed=5, refill_rows=6)
    return fit(replay, loader=loader, max_epochs=2, max_steps=-1)


def uneven_shards(folder: Path) -> Any:
    """The user's own shards: batches of 4, 4, 3 rows in one process, 4, 4, 1 in the other."""
    tokens = Rows(20).tokens
    parts = [[slice(0, 8), slice(8, 16), slice(16, 20)]]
    if WORLD == 2:
        parts = [[slice(0, 4), slice(8, 12), slice(16, 19)], [slice(4, 8), slice(12, 16), slice(19, 20)]]
    batches: Any = [{"input_ids": tokens[part], "labels": tokens[part]} for part in parts[RANK % len(parts)]]
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)
    return fit(
        SelfGeneratedReplay(coefficient=2.0, seed=5, refill_rows=6),
        loader=loader,
        use_distributed_sampler=False,
        max_epochs=1,
        max_steps=-1,
    )


def unseeded(folder: Path) -> Any:
    """No seed, a loader of real rows that shuffles, a filter that wavers: by themselves, processes would differ."""
    prior: DataLoader[Any] = DataLoader(prior_rows(), batch_size=3, shuffle=True)  # type: ignore[arg-type]
    return fit(
        SelfGeneratedReplay("ntp", refill_rows=6, sampling=Sampling(filters=[_by_chance])), data={"prior": prior}
    )


def _by_chance(samples: Any) -> Tensor:
    return torch.rand(len(samples.tokens)) < 0.7


def own_sampler(folder: Path) -> Any:
    """A sampler of the user's, which notes what it was asked for."""
    asked: list[list[list[int]]] = []
    seeds: list[int] = []

    def sampler(model: LanguageModel, prompts: Any, length: int, generator: torch.Generator) -> Any:
        asked.append([list(prompt) for prompt in prompts])
        seeds.append(generator.initial_seed())
        return sample_rows(model, prompts, length, generator)

    replay = SelfGeneratedReplay(
        "ntp", seed=5, refill_rows=6, sampling=Sampling(sampler=sampler, prompts=[[4], [5], [6], [7], [8], [9]])
    )
    return fit(replay, max_steps=2) | {"asked": asked, "seeds": seeds}


class Breaks:
    """A sampler that fails in one process at some calls."""

    def __init__(self, *calls: int) -> None:
        self.calls = calls
        self.called = 0

    def __call__(self, model: LanguageModel, prompts: Any, length: int, generator: torch.Generator) -> Any:
        self.called += 1
        if self.called in self.calls and RANK == WORLD - 1:
            raise ZeroDivisionError("no samples today")
        return sample_rows(model, prompts, length, generator)


def fails_once(folder: Path) -> Any:
    return fit(SelfGeneratedReplay("ntp", seed=5, refill_rows=6, sampling=Sampling(sampler=Breaks(2))))


def fails_at_first(folder: Path) -> str:
    return _error_of(SelfGeneratedReplay("ntp", seed=5, refill_rows=6, sampling=Sampling(sampler=Breaks(1))))


def background(folder: Path) -> str:
    return _error_of(SelfGeneratedReplay(seed=5, background=True))


def _error_of(replay: SelfGeneratedReplay) -> str:
    try:
        fit(replay)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def monitored(folder: Path) -> Any:
    """Five batches of one set, the last one short; a single batch of another, so that one process has none.

    And ten rows of the model's own, two batches of different size.
    """
    sets: dict[str, Any] = {
        "many": mapping_loader(18, batch_size=4),
        "one": DataLoader(prior_rows()[:3], batch_size=3),  # type: ignore[arg-type]
        "shuffled": mapping_loader(18, batch_size=4, shuffle=True),
    }
    monitor, evaluated = ForgettingMonitor(sets, every_n_steps=2, self_rows=10), Evaluated()
    seen = fit(None, 0.0, callbacks=[monitor, evaluated], max_steps=4)
    return seen | {"evaluated": evaluated.calls, "self_rows": self_rows(monitor)}


def benchmarked(folder: Path, sharded: bool = False) -> Any:
    """A task of each kind, in batches of five rows, and a probe of which each process makes something else."""
    tasks = write_tasks(folder / f"tasks-{sharded}-{RANK}-of-{WORLD}")
    monitor = BenchmarkMonitor(
        TASKS,
        {"rank": lambda *_: RANK + 1.0},
        every_n_steps=2,
        include_path=tasks,
        batch_size=5,
        tokenizer=number_tokenizer(),
    )
    evaluated = Evaluated(rows=5)
    seen = fit(None, 0.0, callbacks=[monitor, evaluated], max_steps=4, sharded=sharded)
    return seen | {"evaluated": evaluated.calls, "baseline": monitor.baseline}


def sharded_benchmarked(folder: Path) -> Any:
    return benchmarked(folder, sharded=True)


def failing_probe(folder: Path) -> str:
    """A probe that fails in the last process alone."""

    def probe(model: LanguageModel, tokenizer: Any) -> float:
        if RANK == WORLD - 1:
            raise ZeroDivisionError("no figures today")
        return 1.0

    try:
        fit(None, 0.0, callbacks=[BenchmarkMonitor(probes={"a": probe})])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def self_rows(monitor: ForgettingMonitor) -> list[list[int]]:
    """The rows that the model sampled from itself to be measured on."""
    assert monitor.own_samples is not None
    return _rows(monitor.own_samples.held)


class Evaluated(L.Callback):
    """Counts the calls of the model outside of training on batches of so many rows, as the prior sets have them."""

    def __init__(self, rows: int = 4) -> None:
        self.rows = rows
        self.calls = 0

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        def count(module: Any, arguments: Any, *_: Any) -> None:
            self.calls += not module.training and len(arguments[0]) == self.rows

        pl_module.model.register_forward_hook(count)  # type: ignore[union-attr]


def resumable() -> SelfGeneratedReplay:
    return SelfGeneratedReplay(coefficient=2.0, seed=5, refill_rows=7)


def whole(folder: Path) -> Any:
    """A fit of eight steps with a checkpoint at the fourth, the end of the first epoch."""
    checkpoint = ModelCheckpoint(folder / f"of-{WORLD}", "{step}", save_top_k=-1, every_n_train_steps=4)
    return fit(resumable(), rows=32, max_steps=8, max_epochs=-1, callbacks=[checkpoint], enable_checkpointing=True)


def resumed(folder: Path, saved_by: int) -> Any:
    path = folder / f"of-{saved_by}" / "step=4.ckpt"
    return fit(resumable(), rows=32, max_steps=8, max_epochs=-1, ckpt_path=str(path))


def sharded_kl(folder: Path) -> Any:
    """One replay row in some steps, so that a process has none, and a monitor with an odd number of batches."""
    replay = SelfGeneratedReplay(coefficient=2.0, seed=5, refill_rows=3)
    monitor = ForgettingMonitor({"many": mapping_loader(18, batch_size=4)}, every_n_steps=2, self_rows=10)
    checkpoint = ModelCheckpoint(folder / f"sharded-of-{WORLD}", "{step}", save_top_k=-1, every_n_train_steps=4)
    seen = fit(
        replay,
        fraction=0.15,
        rows=32,
        max_steps=6,
        max_epochs=-1,
        callbacks=[monitor, checkpoint],
        enable_checkpointing=True,
        sharded=True,
    )
    return seen | {"self_rows": self_rows(monitor)}


def sharded_resumed(folder: Path) -> Any:
    replay = SelfGeneratedReplay(coefficient=2.0, seed=5, refill_rows=3)
    monitor = ForgettingMonitor({"many": mapping_loader(18, batch_size=4)}, every_n_steps=2, self_rows=10)
    path = folder / f"sharded-of-{WORLD}" / "step=4.ckpt"
    seen = fit(
        replay, 0.15, rows=32, max_steps=6, max_epochs=-1, callbacks=[monitor], ckpt_path=str(path), sharded=True
    )
    return seen | {"self_rows": self_rows(monitor)}


def sharded_live(folder: Path) -> Any:
    replay = SelfGeneratedReplay("ntp", 2.0, source="live", seed=5, refill_rows=3)
    return fit(replay, 0.15, sharded=True)


def sharded_budget(folder: Path, loss: Any = "kl") -> Any:
    """One replay row in some steps, so that a process has nothing to measure the drift on."""
    replay = SelfGeneratedReplay(loss, ForgettingBudget(1e-7), seed=5, refill_rows=3, uses_per_sample=2)
    return fit(replay, 0.15, sharded=True)


def sharded_budget_ntp(folder: Path) -> Any:
    return sharded_budget(folder, "ntp")


def killed(folder: Path) -> Any:
    """The last process is killed while it samples the second refill, as by the out-of-memory killer."""
    return _lose_the_last(folder, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stuck(folder: Path) -> Any:
    """The last process never comes back from sampling the second refill."""
    return _lose_the_last(folder, lambda: time.sleep(3600))


def _lose_the_last(folder: Path, how: Callable[[], Any]) -> Any:
    refills: list[int] = []

    def sampler(model: LanguageModel, prompts: Any, length: int, generator: torch.Generator) -> Any:
        refills.append(len(prompts))
        if len(refills) == 2:
            (folder / f"second-refill-{RANK}").touch()
            if RANK == WORLD - 1:
                how()
        return sample_rows(model, prompts, length, generator)

    return fit(SelfGeneratedReplay("ntp", seed=5, refill_rows=6, sampling=Sampling(sampler=sampler)))


RUNS: dict[str, Callable[[Path], Any]] = {
    run.__name__: run
    for run in (
        kl,
        budget,
        ntp_with_a_single_row,
        cached,
        callback_alone,
        every_third_step,
        generated,
        replace,
        mixed,
        lwf,
        uneven_padded,
        uneven_shards,
        unseeded,
        own_sampler,
        fails_once,
        fails_at_first,
        background,
        monitored,
        benchmarked,
        sharded_benchmarked,
        failing_probe,
        whole,
        sharded_kl,
        sharded_resumed,
        sharded_live,
        sharded_budget,
        sharded_budget_ntp,
        killed,
        stuck,
    )
} | {f"resumed_from_{number}": functools.partial(resumed, saved_by=number) for number in (1, 2)}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        torch.save(RUNS[name](folder), folder / f"{name}-{RANK}.pt")


if __name__ == "__main__":
    main()
