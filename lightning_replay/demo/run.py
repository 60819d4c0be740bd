"""The demo: a small transformer learns a sequence of tasks, once without and once with self-generated replay.

It uses the public API, as a script of a user does. Each task is trained until it is learned, and then for
``COOLDOWN_STEPS`` in which the learning rate falls to 0. It is learned when the model answers a share of ``LEARNED`` of
400 held-out questions right: greedy decoding gives the whole answer and its end. These questions are never trained on.
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
    held_out_problems,
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

__all__ = ["NotLearnedError", "Run", "demo", "learn_sequence", "quiet_lightning", "replay_of"]

WIDTH = 64
BATCH_SIZE = 128
REPLAY_FRACTION = 1 / 3
COEFFICIENT = 2.0
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
STEPS_AT_MOST = 1000
"""A task that has not been learned by then is an error."""
LEARNED = 0.995
"""Share of the held-out questions whose whole answer is right when a task has been learned."""
COOLDOWN_STEPS = 50
"""Steps over which the learning rate falls to 0 once a task has been learned."""
MEASURE_EVERY = 25


class NotLearnedError(ValueError):
    """A task was not learned in ``STEPS_AT_MOST`` steps, so that its later accuracy would show nothing."""


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
    """Measures all tasks while one is learned, and may end its training.

    Args:
        run: Where the measurements go.
        progress: The bars.
        lines: The lines that replace bars if the output is not a terminal.
        label: What the bar is called.
        until_learned: Whether the learning rate falls to 0 over ``COOLDOWN_STEPS``, and training then ends, when the
            model answers ``LEARNED`` of the current task's questions right.
    """

    def __init__(self, run: Run, progress: Progress, lines: ProgressLines, label: str, until_learned: bool) -> None:
        self.run = run
        self.until_learned = until_learned
        self.learned_at: int | None = None
        """The step at which the task was learned."""
        self.progress = progress
        self.lines = lines
        self.label = label
        self.first_step = run.ends[-1] if run.ends else 0
        self.problems = {task: held_out_problems(task) for task in TASKS}

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
            if self.until_learned and self.learned_at is None and current >= LEARNED:
                self.learned_at = trainer.global_step
        if self.learned_at is not None:
            left = 1 - (trainer.global_step - self.learned_at) / COOLDOWN_STEPS
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= left  # after the schedule, which sets it anew at every step
            trainer.should_stop = left <= 0

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.run.steps[-1] != self.first_step + trainer.global_step:
            self._measure(trainer, pl_module)
        self.run.ends.append(self.run.steps[-1])
        self.run.matrix.append([curve[-1] for curve in self.run.curves.values()])
        self.progress.update(self.bar, completed=trainer.max_steps)
        self.lines(lambda: f"{self.label} ended after {trainer.global_step} steps: {self._shown()}", due=True)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[float]:
        accuracies = [self._accuracy(pl_module, rows) for rows in self.problems.values()]
        self.run.steps.append(self.first_step + trainer.global_step)
        for curve, accuracy in zip(self.run.curves.values(), accuracies, strict=True):
            curve.append(accuracy)
        self.progress.update(self.bar, accuracy=self._shown())
        self.lines(lambda: f"{self.label} step {trainer.global_step}: {self._shown()}")
        return accuracies

    def _shown(self) -> str:
        """The last measurement."""
        return "  ".join(f"{task} {curve[-1]:4.0%}" for task, curve in self.run.curves.items())

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

    Raises:
        NotLearnedError: If a task is not learned in ``STEPS_AT_MOST`` steps.
    """
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    console.print(
        f"A small transformer learns {len(TASKS)} tasks one after another: {', '.join(TASKS)}.\n"
        "First with plain finetuning, then with self-generated replay."
    )
    runs = learn_sequence({"without_replay": None, "with_replay": replay_of}, seed, console, logs=output / "logs")
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
    steps: int | None = None,
    logs: Path | None = None,
) -> dict[str, Run]:
    """Learn the tasks one after another in each arm; the first task is learned once and shared by all arms.

    Training uses one thread on the CPU. Matrices of this size gain nothing from a second one, and two threads that wait
    for each other are several times slower if another program uses a core.

    Args:
        arms: For each arm, a function of the tasks learned so far that returns the replay callback; None for no replay.
        seed: Seed of the weights, the problems and the samples.
        console: The console that shows progress.
        steps: Optimizer steps of each task but the first, with a cosine schedule. By default, each is trained until it
            is learned, as the first one always is, with a constant learning rate.
        logs: Folder for CSV logs of replay and forgetting, with a folder for each arm and task; None for no logs.

    Returns:
        The measurements of each arm.

    Raises:
        NotLearnedError: If a task that is trained until it is learned is not, in ``STEPS_AT_MOST`` steps.
    """
    tasks, runs, lines = list(TASKS), {}, ProgressLines(console.file)
    with _one_thread(), quiet_lightning(), _bars(console) as progress:
        pl.seed_everything(seed)
        shared = Run()
        model = _small_transformer()
        _learn("all", tasks[0], model, shared, progress, lines, seed, steps=None, replay=None, logs=None)
        for arm, replay_of_tasks in arms.items():
            runs[arm], learner = copy.deepcopy(shared), copy.deepcopy(model)
            for number, task in enumerate(tasks[1:], start=1):
                replay = None if replay_of_tasks is None else replay_of_tasks(tasks[:number])
                _learn(arm, task, learner, runs[arm], progress, lines, seed, steps, replay, logs)
    return runs


def _small_transformer() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
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
        coefficient=COEFFICIENT,
        reference=reference,
        sequence_length=ROW_LENGTH,
        # Cached rows are sampled once, all that the run uses.
        refill_rows="auto" if isinstance(reference_of(reference), Cached) else 1024,
        uses_per_sample=1,
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
    steps: int | None,
    replay: SelfGeneratedReplay | None,
    logs: Path | None,
) -> None:
    """Train the model on one task, with a fresh optimizer."""
    learned = len(run.ends)
    label = f"{arm.replace('_', ' '):<14} {learned + 1}/{len(TASKS)} {task:<8}"
    accuracy = _TaskAccuracy(run, progress, lines, label, until_learned=steps is None)
    callbacks: list[Callback] = [accuracy]
    if replay is not None:
        callbacks.append(replay)
    if logs is not None:
        answers = {name: [_answers(rows)] for name, rows in accuracy.problems.items()}
        callbacks.append(ForgettingMonitor(answers, MEASURE_EVERY))
    loader = problems_loader(task, BATCH_SIZE, seed)
    trainer = pl.Trainer(
        max_steps=STEPS_AT_MOST if steps is None else steps,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False if logs is None else CSVLogger(logs, arm, f"{learned + 1}_{task}"),
        log_every_n_steps=MEASURE_EVERY,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = CausalLM(
        model, LEARNING_RATE, warmup_steps=WARMUP_STEPS, schedule="constant" if steps is None else "cosine"
    )
    started = time.perf_counter()
    trainer.fit(module, datamodule=ReplayDataModule(loader, REPLAY_FRACTION if replay else 0.0))
    run.seconds += time.perf_counter() - started
    if steps is None and accuracy.learned_at is None:
        raise NotLearnedError(
            f"The model has not learned the task {task!r} ({arm.replace('_', ' ')}) in {STEPS_AT_MOST} steps: it "
            f"answers {run.matrix[-1][learned]:.1%} of the held-out questions right, and {LEARNED:.1%} are asked for. "
            f"Try another seed than {seed}."
        )


def _answers(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch in which only the tokens of the answers are measured; those of the questions are random."""
    labels = torch.full_like(rows, -100)
    labels[:, ANSWER] = rows[:, ANSWER]
    return {"input_ids": rows, "labels": labels}


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[accuracy]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.file.isatty(),  # which has lines instead
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
