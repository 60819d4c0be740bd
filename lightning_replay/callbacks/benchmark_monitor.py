"""The callback that measures benchmarks during training: tasks of lm-evaluation-harness, and probes of the user's."""

import functools
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_replay.benchmarks.figures import Figure, drop
from lightning_replay.benchmarks.probes import Probe, check_probes, figures_of_probe
from lightning_replay.callbacks.monitor import Monitor, replay_of
from lightning_replay.models.head import OutputHeads
from lightning_replay.models.language_model import LanguageModel, evaluating, find_language_model, find_tokenizer
from lightning_replay.utilities.distributed import Processes
from lightning_replay.utilities.logging import next_step, publish
from lightning_replay.utilities.progress import heed_sigterm
from lightning_replay.utilities.seeds import own_randomness
from lightning_replay.utilities.validation import check_package, is_whole

__all__ = ["BenchmarkMonitor"]

T = TypeVar("T")

_BATCH = 8


class BenchmarkMonitor(Monitor):
    """Measures benchmarks before, during and after training, on the model that trains.

    The benchmarks are tasks of lm-evaluation-harness (the extra ``lm-eval``), by name or from files of your own, and
    functions of your own. They are measured at fit start, every ``every_n_steps`` optimizer steps and at the end, in
    evaluation mode, without a second model and without changing the global random state. The values go to every logger
    and to ``trainer.callback_metrics``, so ``ModelCheckpoint`` and ``EarlyStopping`` can monitor them, at the steps at
    which ``ForgettingMonitor`` logs. For each metric of a task, or of a probe:

    - ``benchmark/<task>/<metric>``: the figure, as the harness reports it. A task with several filters has
      ``benchmark/<task>/<metric>/<filter>``; a probe that returns a number has ``benchmark/<probe>``.
    - ``benchmark_stderr/<task>/<metric>``: its standard error over the task's documents, if it is known.
    - ``benchmark_drop/<task>/<metric>``: how much worse it is than at fit start; positive is worse. Left out if the
      task does not tell which way is better. A drop of less than about three standard errors may be noise.

    ``benchmark/seconds`` is the time that all such monitors of the Trainer have spent so far.

    Tasks get the same answers as from the harness's own ``HFLM``, up to rounding, and from any module that maps tokens
    to logits. The beginning-of-sequence token stands once before a text, whether the tokenizer adds it, a chat template
    has it or the harness asks for it. For a perplexity of whole texts, ``HFLM`` puts it there twice if the tokenizer
    adds it by itself, so its figures differ from these, unless it is told ``add_bos_token=False``. An end token that
    the tokenizer puts after each text is left out, which ``HFLM`` leaves between a text and its continuation.

    Note:
        With several processes, each answers its share of a task's requests. With sharded weights, each answers all. A
        probe runs in every process, and the figures of the first count.

    Note:
        Each measurement begins with the same random numbers, so a probe that samples draws the same ones each time.

    Args:
        tasks: Names of tasks, of groups or of tags, such as ``["arc_easy", "gsm8k"]``.
        probes: Functions by name. Each gets the language model, in evaluation mode and without gradients, and the
            tokenizer, and returns a number or a mapping of numbers by metric. ``"<metric>_stderr"`` in a mapping is the
            standard error of ``"<metric>"``.
        every_n_steps: Optimizer steps between measurements; 0 for fit start and end only.
        limit: Documents of each task at most; a share of them if below 1; all by default.
        num_fewshot: Examples before each document; by default as many as the task says.
        include_path: A folder, or several, with task files of your own.
        apply_chat_template: Whether to put requests through the tokenizer's chat template.
        batch_size: Rows of a task's requests in a forward. Rows of about one length go together.
        max_length: Tokens in a row at most, beyond which its beginning is cut off; by default the model's context, or
            2,048 if its configuration does not tell.
        tokenizer: The model's tokenizer; by default that of the Trainer's ``SelfGeneratedReplay``, of the datamodule or
            of the module, whichever has the attribute ``tokenizer``. Tasks need a Hugging Face tokenizer.
        language_model: Where the language model is in the LightningModule, as an attribute path. By default that of the
            Trainer's ``SelfGeneratedReplay``; without one, it is found in the same way.
        lower_is_better: Names of figures of ``probes`` of which a lower one is better: ``"<probe>"`` or
            ``"<probe>/<metric>"``.
        seed: Seed of the few-shot examples and of all else that is random in measuring.

    Raises:
        ModuleNotFoundError: If ``tasks`` is given and lm-evaluation-harness is not installed.
        TypeError: If an argument is of another type; before the first step, if a probe returns something else.
        ValueError: If nothing is to be measured, a number is out of range, or an argument has no effect beside the
            others.
        MisconfigurationException: Before the first step, if a task can't be loaded, asks for what is not supported, or
            needs a tokenizer that is not known; or if another monitor of the Trainer has a benchmark of the same name.

    Example:
        >>> def starts_with_a_capital(model, tokenizer):
        ...     start = torch.tensor([[tokenizer.bos_token_id]])
        ...     token = model.logits(start)[0, -1].argmax()
        ...     return float(tokenizer.decode([token])[:1].isupper())
        >>> monitor = BenchmarkMonitor(probes={"capital": starts_with_a_capital}, every_n_steps=100)
        >>> of_the_harness = BenchmarkMonitor(["arc_easy"], limit=200, every_n_steps=1000)  # doctest: +SKIP
    """

    _seconds_key = "benchmark/seconds"

    def __init__(
        self,
        tasks: Sequence[str] | None = None,
        probes: Mapping[str, Probe] | None = None,
        every_n_steps: int = 1000,
        limit: int | float | None = None,
        num_fewshot: int | None = None,
        include_path: str | Path | Sequence[str | Path] | None = None,
        apply_chat_template: bool = False,
        batch_size: int = _BATCH,
        max_length: int | None = None,
        tokenizer: Any = None,
        language_model: str | None = None,
        lower_is_better: Collection[str] = (),
        seed: int = 1234,
    ) -> None:
        self.tasks = [] if tasks is None else _names(tasks)
        self.probes = dict(probes or {})
        if not self.tasks and not self.probes:
            raise ValueError(
                "Nothing to measure: give `tasks`, as in ['arc_easy'], or `probes`, as in {'name': function}."
            )
        super().__init__(every_n_steps, language_model)
        if not is_whole(seed, 0):
            raise ValueError(f"`seed` is a whole number, at least 0; got {seed!r}.")
        check_probes(self.probes, self.tasks, lower_is_better)
        of_tasks: dict[str, Any] = {
            "limit": limit,
            "num_fewshot": num_fewshot,
            "include_path": include_path,
            "apply_chat_template": apply_chat_template or None,
            "batch_size": None if batch_size == _BATCH else batch_size,
            "max_length": max_length,
        }
        self.tokenizer = tokenizer
        self.lower_is_better = set(lower_is_better)
        self.seed = seed
        self._harness: Any = None
        if self.tasks:
            try:  # an optional extra, which takes seconds to import
                from lightning_replay.benchmarks.tasks import HarnessTasks
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    f"`tasks` are those of lm-evaluation-harness, and {error.name} is not installed: "
                    "pip install 'lightning-replay[lm-eval]'"
                ) from error
            self._harness = HarnessTasks(self.tasks, seed=seed, **of_tasks | {"batch_size": batch_size})
        elif changed := [name for name, value in of_tasks.items() if value is not None]:
            raise ValueError(
                f"Without `tasks`, {', '.join(f'`{name}`' for name in changed)} would have no effect. Leave it out."
            )
        self._settings = {
            "tasks": self.tasks,
            "probes": sorted(self.probes),
            "limit": limit,
            "num_fewshot": num_fewshot,
        }

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(**self._settings)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_package(trainer, "The Trainer")
        if stage != "fit":
            return
        self._begin_fit(trainer)
        others = [c for c in trainer.callbacks if isinstance(c, BenchmarkMonitor) and c is not self]  # type: ignore[attr-defined]
        shared = {*self.tasks, *self.probes} & {name for other in others for name in (*other.tasks, *other.probes)}
        if shared:
            raise MisconfigurationException(
                f"Two BenchmarkMonitors of this Trainer have benchmarks of the same name: {sorted(shared)}. Leave one "
                "out."
            )
        if self._harness is not None:
            with self._seeded(torch.device("cpu")):
                _together(trainer, self._harness.load)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._heads = OutputHeads()
        # Rows of many lengths would have it compiled for each.
        self._model = find_language_model(pl_module, self._path_of_model(trainer)).uncompiled
        if self._resumed:
            # Other callbacks may monitor the last values before the next measurement.
            publish(trainer, self._values)
            return
        if trainer.ckpt_path is not None and trainer.global_step:
            rank_zero_warn("The checkpoint was saved without this BenchmarkMonitor: drops are measured from here on.")
        self._measure(trainer, pl_module, next_step(trainer))

    @override
    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Measure everything, log the values and publish them to other callbacks."""
        started = time.perf_counter()
        figures = _together(trainer, functools.partial(self._figures, trainer, pl_module))
        values: dict[str, float] = {}
        for name, figure in figures.items():
            values[f"benchmark/{name}"] = figure.value
            if figure.error is not None:
                values[f"benchmark_stderr/{name}"] = figure.error
            worse = drop(figure, self.baseline.setdefault(name, figure.value))
            if worse is not None:
                values[f"benchmark_drop/{name}"] = worse
        self._add_seconds(trainer, time.perf_counter() - started)
        self._log(trainer, values, step)

    def _figures(self, trainer: pl.Trainer, pl_module: pl.LightningModule, processes: Processes) -> dict[str, Figure]:
        """All figures, the same in every process."""
        model, heed = self._model, functools.partial(heed_sigterm, trainer)
        assert model is not None
        tokenizer = find_tokenizer(self, replay_of(trainer), trainer.datamodule, pl_module)  # type: ignore[attr-defined]
        figures: dict[str, Figure] = {}
        with evaluating(model.module), trainer.precision_plugin.val_step_context():
            if self._harness is not None:
                with self._seeded(model.device):
                    figures |= self._harness.evaluate(model, tokenizer, self._heads, processes, heed)
            for name, probe in self.probes.items():
                heed()
                measure = functools.partial(self._probed, name, probe, model, tokenizer)
                figures |= processes.broadcast(processes.run_on_all_ranks(measure))
        unknown = sorted(self.lower_is_better - figures.keys())
        if unknown:
            raise MisconfigurationException(
                f"`lower_is_better` names {unknown}, but the figures of the probes are "
                f"{[name for name in figures if name.partition('/')[0] in self.probes]}."
            )
        return figures

    def _probed(self, name: str, probe: Probe, model: LanguageModel, tokenizer: Any) -> dict[str, Figure]:
        with self._seeded(model.device):
            return figures_of_probe(name, probe(model, tokenizer), self.lower_is_better)

    @contextmanager
    def _seeded(self, device: torch.device) -> Iterator[None]:
        """Random numbers that depend on the seed alone; the global random state stays as it was."""
        with isolate_rng(), own_randomness(device, self.seed):
            random.seed(self.seed)
            np.random.seed(self.seed)  # noqa: NPY002  # the state that tasks and probes may use
            yield


def _names(tasks: Any) -> list[str]:
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"`tasks` names tasks of lm-evaluation-harness, as in ['arc_easy']; got {tasks!r}.")
    return list(dict.fromkeys(names))


def _together(trainer: pl.Trainer, function: Callable[[Processes], T]) -> T:
    """Call a function with the processes of the fit."""
    processes = Processes.of(trainer)
    try:
        return function(processes)
    finally:
        processes.close()
