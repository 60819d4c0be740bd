"""The runs that the scripts of this folder are made of: models trained from scratch, and finetuned on new text.

A run is a dataclass that holds all that it depends on; what it gives is plain numbers, for a JSON file.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_replay import CausalLM, ForgettingMonitor, ReplayDataModule, SelfGeneratedReplay, TextDataModule
from lightning_replay.demo.run import learn_sequence, quiet_lightning, replay_of


@dataclass(frozen=True)
class Text:
    """A local file or a dataset on the hub, as ``TextDataModule`` reads it."""

    data: str
    column: str | tuple[str, ...] = "text"
    separator: str | None = None


@dataclass(frozen=True)
class Point:
    """What was measured after some optimizer steps of a finetuning.

    Attributes:
        step: Optimizer steps so far.
        seconds: Wall-clock time of training and sampling, without that of measuring.
        cpu_seconds: The same in time of the process, which others on the same cores don't lengthen.
        sampled_rows: Replay rows sampled so far.
        prior_loss: Loss on held-out prior text, in nats a token.
        prior_kl: KL divergence from the model before finetuning there, in nats a token.
        new_loss: Loss on held-out new text, in nats a token.
        new_kl: KL divergence from the model before finetuning there, in nats a token.
        sampling_seconds: Of ``seconds``, those that sampling took.
        self_kl: The same on samples of the model's own, if the run is watched on them.
        self_error: Its standard error.
    """

    step: int
    seconds: float
    cpu_seconds: float
    sampled_rows: int
    prior_loss: float
    prior_kl: float
    new_loss: float
    new_kl: float
    sampling_seconds: float
    self_kl: float = float("nan")
    self_error: float = float("nan")


Trajectory = list[Point]
OF_BUDGETS = ("replay/drift", "replay/coefficient", "replay/price")


def trajectory(result: Mapping[str, Any]) -> Trajectory:
    """What was measured during a fit."""
    return [Point(**point) for point in result["points"]]


@dataclass(frozen=True)
class Run:
    """All that a run depends on."""

    @property
    def key(self) -> str:
        """A name for the run, the same for the same settings."""
        settings = json.dumps({"kind": type(self).__name__, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    def run(self, folder: Path) -> dict[str, Any]:
        """Train; files go to the folder of all runs."""
        raise NotImplementedError


@dataclass(frozen=True)
class Finetuning(Run):
    """A language model finetuned on new text while prior text is watched.

    Attributes:
        model: Hub name or folder of the model; a relative folder may be one within the folder of all runs.
        prior: Text that the model knows.
        new: Text to finetune on.
        seed: Of the order of the new rows, of the samples and of the weights of adapters.
        learning_rate: AdamW's.
        steps: Optimizer steps at most.
        every: Steps between measurements; in the beginning, a fifth of that.
        schedule: Of the learning rate: ``"constant"``, or ``"cosine"``, which falls to zero at the last step.
        until: The new-task loss to stop at, if any.
        replay: Arguments of ``SelfGeneratedReplay``; None for no replay. As in the paper, rows are used once.
        replayed: Text to replay instead of samples.
        replay_fraction: Share of replay rows in a mixed batch.
        lora_rank: Rank of an adapter to train instead of the weights.
        rows: New rows in a batch.
        length: Tokens in a row.
        held_out: Rows of each text to measure on.
    """

    model: str
    prior: Text
    new: Text
    seed: int
    learning_rate: float
    steps: int
    every: int
    schedule: Literal["constant", "cosine"] = "constant"
    until: float | None = None
    replay: Mapping[str, Any] | None = None
    replayed: Text | None = None
    replay_fraction: float = 0.2
    lora_rank: int | None = None
    rows: int = 16
    length: int = 128
    held_out: int = 128

    self_rows: ClassVar[int] = 0
    """Samples of the model's own to measure on as well. They change nothing else in the run."""

    kl: ClassVar[bool] = True
    """Whether to measure KL divergences. They change nothing else either."""

    def run(self, folder: Path) -> dict[str, Any]:
        """Train; returns ``points``, as ``Point`` has them, and what a budget logged at each step, by key."""
        model = str(folder / self.model) if (folder / self.model).is_dir() else self.model
        new, prior = (packed(text, model, self.rows, self.length) for text in (self.new, self.prior))
        sets = {"prior": held_out_rows(prior, self.held_out), "new": held_out_rows(new, self.held_out)}
        replay = None
        if self.replay is not None:
            once: dict[str, Any] = {} if self.replay["loss"] == "lwf" else {"uses_per_sample": 1}
            replay = SelfGeneratedReplay(**once | dict(self.replay))
        real = None
        if self.replayed is not None:
            real = packed(self.replayed, model, self.rows, self.length).train_dataloader()
        L.seed_everything(self.seed, verbose=False)
        module = CausalLM(self._network(model), self.learning_rate, schedule=self.schedule)
        data = ReplayDataModule(new, self.replay_fraction if replay else 0.0, prior=real, prior_share=1.0)
        recorder = Recorder(sets, self.every, "new", self.until, self.kl, self.self_rows)
        besides = self._train(module, data, recorder, replay)
        return {"points": recorder.points, "budget": recorder.budget} | besides

    def _train(
        self, module: CausalLM, data: ReplayDataModule, recorder: "Recorder", replay: SelfGeneratedReplay | None
    ) -> dict[str, Any]:
        """Fit; returns what the run gives besides what the recorder keeps."""
        train(module, data, recorder, self.steps, replay)
        return {}

    def _network(self, model: str) -> Any:
        if self.lora_rank is None:
            return model
        from peft import LoraConfig, get_peft_model

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return get_peft_model(
            base, LoraConfig(r=self.lora_rank, lora_alpha=2 * self.lora_rank, target_modules="all-linear")
        )


@dataclass(frozen=True)
class Pretraining(Run):
    """A small Llama trained from scratch on text, read byte by byte.

    Attributes:
        text: What to train on.
        width: Of its two layers.
        seed: Of the weights and of the order of the rows.
        steps: Optimizer steps at most.
        every: Steps between measurements; in the beginning, a fifth of that.
        keep: Steps at which the weights are kept; the last ones are kept in any case.
        until: The held-out loss to stop at, if any.
        learning_rate: AdamW's, constant after a warm-up.
        rows: Rows in a batch.
        length: Tokens in a row.
        held_out: Rows to measure on.
    """

    text: Text
    width: int
    seed: int
    steps: int
    every: int
    keep: tuple[int, ...] = ()
    until: float | None = None
    learning_rate: float = 5e-3
    rows: int = 16
    length: int = 128
    held_out: int = 128

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a batch."""
        return self.rows * self.length

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(parameter.numel() for parameter in self.network().parameters())

    def network(self) -> LlamaForCausalLM:
        """The model with fresh weights."""
        config = LlamaConfig(
            vocab_size=len(bytes_tokenizer()),
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_hidden_layers=2,
            num_attention_heads=max(2, self.width // 32),
            max_position_embeddings=2 * self.length,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
        return LlamaForCausalLM(config)

    def run(self, folder: Path) -> dict[str, Any]:
        """Train; returns ``points`` with step and loss and, by step, the ``kept`` models."""
        data = packed(self.text, "", self.rows, self.length)
        L.seed_everything(self.seed, verbose=False)
        module = CausalLM(
            self.network(), self.learning_rate, warmup_steps=min(100, self.steps // 10), schedule="constant"
        )
        sets = {"prior": held_out_rows(data, self.held_out)}
        recorder = Recorder(sets, self.every, "prior", self.until, kl=False)
        keeper = Keeper(folder, f"models/{self.key}", self.keep)
        train(module, ReplayDataModule(data, 0.0), recorder, self.steps, keeper)
        return {"points": recorder.points, "kept": keeper.kept}


@dataclass(frozen=True)
class TaskSequence(Run):
    """The demo's tasks learned one after another, without and with self-generated replay.

    Attributes:
        seed: Of the weights, the problems and the samples.
        steps: Optimizer steps of each task but the first, which is trained until it is learned.
    """

    seed: int
    steps: int

    def run(self, folder: Path) -> dict[str, Any]:
        """Train; returns the figures of the demo and its curves, by arm."""
        with open(os.devnull, "w") as nowhere:
            runs = learn_sequence(
                {"without_replay": None, "with_replay": replay_of},
                self.seed,
                Console(file=nowhere),
                self.steps,
            )
        return {
            arm: run.summary() | {"steps": run.steps, "curves": run.curves, "ends": run.ends}
            for arm, run in runs.items()
        }


class Recorder(ForgettingMonitor):
    """Keeps what it measures, each time with the seconds of training so far, and stops the run at a level.

    Args:
        sets: Held-out sets by name.
        every: Optimizer steps between measurements; at the beginning, when losses fall fast, a fifth of that.
        kl: Whether to measure KL divergences from the first model.
        watched: The set whose loss ends the run.
        until: The loss to stop at, if any.
        self_rows: Samples of the model's own to measure on as well.
    """

    def __init__(
        self,
        sets: Mapping[str, list[Any]],
        every: int,
        watched: str,
        until: float | None,
        kl: bool = True,
        self_rows: int = 0,
    ) -> None:
        super().__init__(sets, max(1, every // 5), kl=kl, self_rows=self_rows)
        self.every = every
        self.watched = watched
        self.until = until
        self.points: list[dict[str, float]] = []
        self.budget: dict[str, list[float]] = {}
        self._clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
        self._trained = dict.fromkeys(self._clocks, 0.0)
        self._resumed_at: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure before the first step."""
        super().on_train_start(trainer, pl_module)
        self._record(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure when it is due, and stop the run when its level is reached."""
        step = trainer.global_step
        values = trainer.callback_metrics
        for key in (*OF_BUDGETS, "train/loss") if "replay/drift" in values else ():
            self.budget.setdefault(key, []).append(float(values[key]))
        if step % self.every == 0 or (step < self.every and step % self.every_n_steps == 0):
            self._stop_clocks()
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._record(trainer)
            trainer.should_stop = self.until is not None and self.points[-1][f"{self.watched}_loss"] <= self.until

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure what the last step has led to."""
        if trainer.global_step != self.points[-1]["step"]:
            self._stop_clocks()
            super().on_train_end(trainer, pl_module)
            self._record(trainer)

    def _stop_clocks(self) -> None:
        for name, clock in self._clocks.items():
            self._trained[name] += clock() - self._resumed_at[name]

    def _record(self, trainer: L.Trainer) -> None:
        """Keep what was measured, and let the clocks go on."""
        values = trainer.callback_metrics
        point = {"step": trainer.global_step, **self._trained}
        point["sampled_rows"] = int(values.get("replay/rows_sampled", 0))
        point["sampling_seconds"] = float(values.get("replay/sampling_seconds", 0))
        for name in self.prior:
            point[f"{name}_loss"] = float(values[f"prior_loss/{name}"])
            if self.kl:
                point[f"{name}_kl"] = float(values[f"prior_kl/{name}"])
        if self.own_samples is not None:  # sampled when the first step begins, when nothing is forgotten yet
            point["self_kl"] = float(values.get("forgetting/self", 0.0))
            point["self_error"] = float(values.get("forgetting_error/self", 0.0))
        self.points.append(point)
        self._resumed_at = {name: clock() for name, clock in self._clocks.items()}


class Keeper(Callback):
    """Saves the model at some steps and at the end, with its tokenizer, as a folder that transformers reads.

    Args:
        folder: The folder of all runs.
        name: Of this run's folder in it.
        steps: When to save.
    """

    def __init__(self, folder: Path, name: str, steps: Sequence[int]) -> None:
        self.folder = folder
        self.name = name
        self.steps = steps
        self.kept: dict[str, str] = {}
        """By step, the model's folder within the folder of all runs."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is due."""
        if trainer.global_step in self.steps:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last weights."""
        self._save(trainer, pl_module)

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        name = f"{self.name}/{trainer.global_step}"
        assert isinstance(pl_module, CausalLM)
        assert isinstance(pl_module.model, LlamaForCausalLM)
        pl_module.model.save_pretrained(self.folder / name)
        bytes_tokenizer().save_pretrained(self.folder / name)
        self.kept[str(trainer.global_step)] = name


def train(
    module: L.LightningModule, data: ReplayDataModule, recorder: Recorder, steps: int, *callbacks: Callback | None
) -> None:
    """Fit on one CPU core, with nothing logged but what the recorder keeps."""
    with quiet_lightning():
        L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            limit_val_batches=0,
            callbacks=[callback for callback in (*callbacks, recorder) if callback is not None],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, datamodule=data)


def prepare_worker() -> None:
    """Train on one core in this process, without progress bars: two such processes do more than one on two cores."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


@cache
def packed(text: Text, model: str, rows: int, length: int) -> TextDataModule:
    """Text in rows of tokens; for no model, of bytes. A process that does several runs reads it once."""
    data = TextDataModule(
        text.data,
        model or bytes_tokenizer(),
        length,
        rows,
        text_column=text.column,
        document_separator=text.separator,
    )
    data.setup("fit")
    return data


def held_out_rows(data: TextDataModule, rows: int) -> list[Any]:
    """Batches of the rows that are not trained on, the same ones each time."""
    return list(islice(data.val_dataloader(), rows // data.batch_size))


@cache
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, and a token each for a document's beginning and end."""
    special = ["<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])


def at_new_loss(trajectory: Sequence[Point], level: float, name: str) -> float:
    """What a run measured when it passed a new-task loss, by linear interpolation between two measurements.

    Args:
        trajectory: What was measured, in order.
        level: The new-task loss.
        name: The attribute of ``Point`` that is asked for.

    Returns:
        The value at the first passage; NaN if the run begins below the level or does not reach it.
    """
    for before, after in pairwise(trajectory):
        if after.new_loss <= level <= before.new_loss:
            way = (before.new_loss - level) / (before.new_loss - after.new_loss)
            first, last = getattr(before, name), getattr(after, name)
            return float(first + way * (last - first))
    return float("nan")


def forgetting(trajectory: Sequence[Point], level: float | None = None) -> float:
    """Rise of the prior loss since the first measurement, at the end or when a run passed a new-task loss."""
    loss = trajectory[-1].prior_loss if level is None else at_new_loss(trajectory, level, "prior_loss")
    return loss - trajectory[0].prior_loss
