"""The demo: a small transformer learns a sequence of tasks, once without and once with self-generated replay.

It uses the public API, as a script of a user does.
"""

import copy
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from transformers import LlamaConfig, LlamaForCausalLM
from typing_extensions import override

from lightning_replay.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_replay.callbacks.self_generated_replay import SelfGeneratedReplay
from lightning_replay.data.replay import ReplayDataModule
from lightning_replay.demo.toy_tasks import (
    ANSWER,
    END,
    ROW_LENGTH,
    TASKS,
    VOCABULARY,
    problems,
    problems_loader,
    task_token,
)
from lightning_replay.metrics import average_accuracy, backward_transfer
from lightning_replay.models.causal_lm import CausalLM
from lightning_replay.models.language_model import evaluating
from lightning_replay.references.reference import Cached, Reference, ReferenceName, reference_of
from lightning_replay.sampling.sampling import Sampling
from lightning_replay.utilities.progress import ProgressLines

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demo draws with {error.name}, which is not installed: pip install 'lightning-replay[demo]'"
    ) from error

__all__ = ["Run", "demo", "learn_sequence", "quiet_lightning", "replay_of"]

BATCH_SIZE = 128
REPLAY_FRACTION = 0.2
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
STEPS = 400
FIRST_TASK_STEPS = 1500
"""The first task is trained to an accuracy of ``LEARNED``, for at most these steps; the others for ``STEPS``."""
LEARNED = 0.995
MEASURE_EVERY = 25
HELD_OUT = 400


@dataclass
class Run:
    """The measurements of one arm, which learns the whole sequence of tasks.

    Attributes:
        steps: Optimizer steps before each measurement, over the whole sequence.
        curves: Accuracy of each task at each of those steps.
        matrix: A row for each task learned so far: the accuracy of every task after it.
        ends: The step at which each task's training ended.
        seconds: Wall-clock time of training, sampling and measuring.
    """

    steps: list[int] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=lambda: {task: [] for task in TASKS})
    matrix: list[list[float]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The final figures, as ``results.json`` holds them."""
        matrix = torch.tensor(self.matrix, dtype=torch.float64)
        return {
            "accuracy": dict(zip(TASKS, self.matrix[-1], strict=True)),
            "average_accuracy": average_accuracy(matrix),
            "backward_transfer": backward_transfer(matrix),
            "seconds": round(self.seconds, 1),
            "accuracy_after_each_task": self.matrix,
        }


class _TaskAccuracy(Callback):
    """Measures all tasks while one is learned: the share of problems whose whole answer is right."""

    def __init__(self, run: Run, progress: Progress, lines: ProgressLines, label: str, until: float | None) -> None:
        self.run = run
        self.until = until
        self.progress = progress
        self.lines = lines
        self.label = label
        self.first_step = run.ends[-1] if run.ends else 0
        held_out = torch.Generator().manual_seed(2**31)
        self.problems = {task: problems(task, HELD_OUT, held_out) for task in TASKS}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar = self.progress.add_task(self.label, total=trainer.max_steps, accuracy="")
        if not self.run.steps:
            self._measure(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.progress.update(self.bar, completed=trainer.global_step)
        if trainer.global_step % MEASURE_EVERY == 0:
            current = self._measure(trainer, pl_module)[len(self.run.ends)]
            trainer.should_stop = self.until is not None and current >= self.until

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.run.steps[-1] != self.first_step + trainer.global_step:
            self._measure(trainer, pl_module)
        self.run.ends.append(self.run.steps[-1])
        self.run.matrix.append([curve[-1] for curve in self.run.curves.values()])
        self.progress.update(self.bar, completed=trainer.max_steps)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[float]:
        accuracies = [self._accuracy(pl_module, rows) for rows in self.problems.values()]
        self.run.steps.append(self.first_step + trainer.global_step)
        for curve, accuracy in zip(self.run.curves.values(), accuracies, strict=True):
            curve.append(accuracy)
        shown = "  ".join(f"{task} {accuracy:4.0%}" for task, accuracy in zip(TASKS, accuracies, strict=True))
        self.progress.update(self.bar, accuracy=shown)
        self.lines(lambda: f"{self.label} step {trainer.global_step}: {shown}")
        return accuracies

    def _accuracy(self, pl_module: pl.LightningModule, rows: torch.Tensor) -> float:
        """Greedy decoding is right exactly if each token of the answer is the likeliest one after those before it."""
        with evaluating(pl_module):
            likeliest = pl_module(rows[:, :-1]).logits.argmax(-1)
        right = likeliest[:, ANSWER.start - 1 :] == rows[:, ANSWER]
        return float(right.all(1).double().mean())


def demo(output: Path, seed: int = 0) -> dict[str, Any]:
    """Learn the tasks one after another, without and with replay; write ``results.json`` and ``accuracy.png``.

    The first task is learned once and shared, because there is nothing to replay yet. The logs of the other tasks go to
    ``logs``, for ``lightning-replay report``.

    Args:
        output: Folder to write to; made if it is missing.
        seed: Seed of the weights, the problems and the samples.

    Returns:
        The content of ``results.json``.
    """
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    console.print(
        f"A small transformer learns {len(TASKS)} tasks one after another: {', '.join(TASKS)}.\n"
        "First with plain finetuning, then with self-generated replay."
    )
    runs = learn_sequence(
        {"without_replay": None, "with_replay": replay_of}, seed, console, STEPS, logs=output / "logs"
    )
    results = {"seed": seed, "tasks": list(TASKS)} | {arm: run.summary() for arm, run in runs.items()}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _draw(runs, output / "accuracy.png")
    console.print(_table(results))
    console.print(f"Wrote {output / 'results.json'} and {output / 'accuracy.png'}.")
    console.print(f"For a page of the logs: lightning-replay report {output}")
    return results


def learn_sequence(
    arms: Mapping[str, Callable[[Sequence[str]], SelfGeneratedReplay] | None],
    seed: int,
    console: Console,
    steps: int = STEPS,
    first_steps: int = FIRST_TASK_STEPS,
    logs: Path | None = None,
) -> dict[str, Run]:
    """Learn the tasks one after another in each arm; the first task is learned once and shared by all arms.

    Args:
        arms: For each arm, a function of the tasks learned so far that returns the replay callback; None for no replay.
        seed: Seed of the weights, the problems and the samples.
        console: The console that shows progress.
        steps: Optimizer steps of each task but the first.
        first_steps: Optimizer steps of the first task at most; training stops when the task has been learned.
        logs: Folder for CSV logs of replay and forgetting, with a folder for each arm and task; None for no logs.

    Returns:
        The measurements of each arm.
    """
    tasks, runs, lines = list(TASKS), {}, ProgressLines()
    with quiet_lightning(), _bars(console) as progress:
        pl.seed_everything(seed)
        shared = Run()
        model = _small_transformer()
        _learn("all", tasks[0], model, shared, progress, lines, seed, first_steps, replay=None, logs=None)
        for arm, replay_of_tasks in arms.items():
            runs[arm], learner = copy.deepcopy(shared), copy.deepcopy(model)
            for number, task in enumerate(tasks[1:], start=1):
                replay = None if replay_of_tasks is None else replay_of_tasks(tasks[:number])
                _learn(arm, task, learner, runs[arm], progress, lines, seed, steps, replay, logs)
    return runs


def _small_transformer() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=ROW_LENGTH,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)


def replay_of(tasks: Sequence[str], reference: ReferenceName | Reference = "auto") -> SelfGeneratedReplay:
    """Replay of samples that begin with the tokens of the tasks learned so far, an even share of each."""
    return SelfGeneratedReplay(
        loss="kl",
        coefficient=3.0,
        reference=reference,
        sequence_length=ROW_LENGTH,
        # Cached rows are sampled once, all that the run uses.
        refill_rows="auto" if isinstance(reference_of(reference), Cached) else 1024,
        sampling=Sampling(prompts=[[task_token(task)] for task in tasks]),
    )


def _learn(
    arm: str,
    task: str,
    model: LlamaForCausalLM,
    run: Run,
    progress: Progress,
    lines: ProgressLines,
    seed: int,
    steps: int,
    replay: SelfGeneratedReplay | None,
    logs: Path | None,
) -> None:
    """Train the model on one task, with a fresh optimizer."""
    learned = len(run.ends)
    first = not learned
    label = f"{arm.replace('_', ' '):<14} {learned + 1}/{len(TASKS)} {task:<8}"
    accuracy = _TaskAccuracy(run, progress, lines, label, until=LEARNED if first else None)
    callbacks: list[Callback] = [accuracy]
    if replay is not None:
        callbacks.append(replay)
    if logs is not None:
        earlier = list(accuracy.problems.items())[:learned]
        prior = {name: [{"input_ids": rows, "labels": rows}] for name, rows in earlier}
        callbacks.append(ForgettingMonitor(prior, MEASURE_EVERY))
    loader = problems_loader(task, BATCH_SIZE, seed)
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False if logs is None else CSVLogger(logs, arm, f"{learned + 1}_{task}"),
        log_every_n_steps=MEASURE_EVERY,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = CausalLM(model, LEARNING_RATE, warmup_steps=WARMUP_STEPS, schedule="constant" if first else "cosine")
    started = time.perf_counter()
    trainer.fit(module, datamodule=ReplayDataModule(loader, REPLAY_FRACTION if replay else 0.0))
    run.seconds += time.perf_counter() - started


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[accuracy]}"),
        TimeElapsedColumn(),
        console=console,
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's banners, and its advice on loaders, over the seven short fits."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _table(results: dict[str, Any]) -> Table:
    table = Table(title="Accuracy after the last task")
    table.add_column("task")
    table.add_column("without replay", justify="right")
    table.add_column("with replay", justify="right")
    arms = (results["without_replay"], results["with_replay"])
    for task in TASKS:
        table.add_row(task, *(f"{arm['accuracy'][task]:.1%}" for arm in arms))
    table.add_section()
    table.add_row("average", *(f"{arm['average_accuracy']:.1%}" for arm in arms))
    table.add_row("backward transfer", *(f"{arm['backward_transfer']:+.3f}" for arm in arms))
    table.add_row("seconds", *(f"{arm['seconds']:.0f}" for arm in arms))
    return table


def _draw(runs: dict[str, Run], path: Path) -> None:
    figure, axes = plt.subplots(1, len(runs), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, (arm, run) in zip(axes, runs.items(), strict=True):
        for task, curve in run.curves.items():
            axis.plot(run.steps, curve, label=task, linewidth=2)
        for start, end, task in zip([0, *run.ends], run.ends, TASKS, strict=False):
            axis.axvline(end, color="0.8", linewidth=1, zorder=0)
            axis.text((start + end) / 2, 1.04, task, ha="center", fontsize=8, color="0.4")
        axis.set(title=arm.replace("_", " ").capitalize(), xlabel="optimizer steps", ylim=(-0.02, 1.12))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy on held-out problems")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
