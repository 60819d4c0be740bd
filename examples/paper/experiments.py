"""What all scripts of this folder share: command-line arguments, runs on worker processes, and their results."""

import argparse
import json
import multiprocessing
import os
import random
import time
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

from reports import FOLDER, Script, details, fill, regions, summary
from runs import Finetuning, Pretraining, Run, Text, Trajectory, prepare_worker, trajectory

from lightning_replay.utilities.io import atomic_write

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Scale:
    """How large the experiments are.

    Attributes:
        steps: Optimizer steps of a finetuning.
        every: Steps between its measurements; a fifth of that in the beginning.
        rows: New rows in a batch.
        length: Tokens in a row.
        held_out: Rows of each text to measure on.
        rates: Learning rates without replay, in `learning_rate.py`.
        rate_steps: Optimizer steps at most for a run at a learning rate of 1e-3; lower ones have more in proportion.
        widths: Of the models in `capacity.py`.
        tokens_per_parameter: How far the smallest of them is pretrained.
        decades: How far below that its weights are first looked at, in powers of ten.
        capacity_steps: Optimizer steps of a finetuning at most, in `capacity.py`.
        task_steps: Optimizer steps of each task of the sequence but the first, which is trained until it is learned.
        budgets: Of forgetting, in nats a token, in `budget.py`.
        budget_rates: Learning rates there.
        budget_steps: Optimizer steps of a finetuning there.
        verdict_budgets: Of forgetting, in nats a byte, in `verdict.py`.
        verdict_steps: Optimizer steps of a finetuning there; for some, twice as many.
    """

    steps: int = 200
    every: int = 25
    rows: int = 16
    length: int = 128
    held_out: int = 96
    rates: tuple[float, ...] = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
    rate_steps: int = 80
    widths: tuple[int, ...] = (16, 32, 64, 128)
    tokens_per_parameter: float = 2000.0
    decades: int = 3
    capacity_steps: int = 800
    task_steps: int = 400
    budgets: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    budget_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    budget_steps: int = 300
    verdict_budgets: tuple[float, ...] = (0.02, 0.1)
    verdict_steps: int = 600


QUICK = Scale(
    steps=15,
    every=5,
    rows=8,
    length=32,
    held_out=16,
    rates=(1e-2, 1e-3),
    rate_steps=15,
    widths=(16, 32),
    tokens_per_parameter=3.0,
    decades=1,
    capacity_steps=15,
    task_steps=10,
    budgets=(0.05, 0.1),
    budget_rates=(1e-2,),
    budget_steps=60,
    verdict_budgets=(0.1,),
    verdict_steps=30,
)


class Lab:
    """Does the runs of all scripts, each once, on worker processes; results are kept, so no run is repeated.

    Args:
        options: The options of the command line.
        pool: The worker processes.
    """

    def __init__(self, options: argparse.Namespace, pool: ProcessPoolExecutor) -> None:
        self.scale = QUICK if options.quick else Scale()
        changes = {
            name: value for name in ("steps", "every", "held_out") if (value := getattr(options, name)) is not None
        }
        self.scale = replace(self.scale, **changes)
        self.seeds: list[int] = options.seeds or ([0] if options.quick else [0, 1, 2])
        self.learning_rate: float = options.learning_rate
        self.folder: Path = options.output
        self.model: str = options.model
        self.time: bool = options.time
        self.finished: bool = options.finished
        self.prior = Text(options.prior, options.prior_column, options.prior_separator)
        self.new = Text(options.new, options.new_column)
        self.other = Text(options.other or options.prior, tuple(options.other_column))
        self._pool = pool
        self._lock = RLock()  # the callback of a run that is done at once is called while the lock is held
        self._begun: dict[str, Future[dict[str, Any]]] = {}
        self._finished = 0

    def finetuning(self, seed: int, **changes: Any) -> Finetuning:
        """A finetuning of the model on the new text, without replay unless the changes say so."""
        usual = Finetuning(
            self.model,
            self.prior,
            self.new,
            seed,
            self.learning_rate,
            self.scale.steps,
            self.scale.every,
            rows=self.scale.rows,
            length=self.scale.length,
            held_out=self.scale.held_out,
        )
        return replace(usual, **changes)

    def pretraining(self, width: int, seed: int, steps: int, every: int, **changes: Any) -> Pretraining:
        """A small model trained from scratch on the prior text."""
        scale = self.scale
        usual = Pretraining(
            self.prior, width, seed, steps, every, rows=scale.rows, length=scale.length, held_out=scale.held_out
        )
        return replace(usual, **changes)

    def results(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Do the runs that have not been done, and return what each gave."""
        return [future.result() for future in [self._begin(run) for run in runs]]

    def done(self, runs: Mapping[Key, Run]) -> dict[Key, dict[str, Any]]:
        """What each run gave, by the same keys; with ``--finished``, of those alone that have been done."""
        if self.finished:
            runs = {key: run for key, run in runs.items() if file_of(run, self.folder).exists()}
        return dict(zip(runs, self.results(list(runs.values())), strict=True))

    def trajectories(self, runs: Sequence[Finetuning]) -> list[Trajectory]:
        """Do the finetunings that have not been done, and return what was measured in each."""
        return [trajectory(result) for result in self.results(runs)]

    def _begin(self, run: Run) -> Future[dict[str, Any]]:
        with self._lock:
            key = run.key
            if key not in self._begun:
                self._begun[key] = self._pool.submit(perform, run, self.folder)
                self._begun[key].add_done_callback(lambda future: self._report(run, future))
            return self._begun[key]

    def _report(self, run: Run, future: Future[dict[str, Any]]) -> None:
        if future.cancelled() or future.exception() is not None:
            return
        with self._lock:
            self._finished += 1
            took = future.result()["took"]
            print(f"{self._finished}/{len(self._begun)} {type(run).__name__} {run.key}: {took:.0f} s", flush=True)


def perform(run: Run, folder: Path) -> dict[str, Any]:
    """Do a run, or read its result if it was done before."""
    file = file_of(run, folder)
    if not file.exists():
        started = time.perf_counter()
        result = {"kind": type(run).__name__, "settings": asdict(run), **run.run(folder)}
        result["took"] = time.perf_counter() - started
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    read: dict[str, Any] = json.loads(file.read_text())
    return read


def file_of(run: Run, folder: Path) -> Path:
    """Where the result of a run is kept."""
    return folder / "runs" / f"{run.key}.json"


def main(scripts: Sequence[Script], description: str) -> None:
    """Do the runs that the scripts need, unless ``--redraw`` is given, and write what all of them report.

    Args:
        scripts: All that the command does.
        description: Of the command.
    """
    options = parsed(description)
    if options.redraw is None:
        measure(scripts, options)
    folder = options.redraw or options.output
    reports = {script.name: script.read(folder) for script in scripts}
    for name, report in reports.items():
        report.figure().savefig(folder / f"{name}.png", dpi=160)
    results = f"{summary(reports)}\n\n{details(reports)}\n"
    if options.redraw is None:
        (folder / ("results.md" if len(scripts) > 1 else f"{scripts[0].name}.md")).write_text(results)
    print(f"\n{results}\nThe pictures are in {folder}, beside the CSV files that they are drawn from.")
    for page in options.fill:
        for region, text in regions(reports, page).items():
            fill(page, region, text)


def measure(scripts: Sequence[Script], options: argparse.Namespace) -> None:
    """Do what the scripts need on worker processes, and write the CSV files of each."""
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, prepare_worker) as pool:
        try:
            if options.quick and options.model is None:
                invent(options, pool)
            lab = Lab(options, pool)
            # Each script waits for runs of its own in a thread of its own, so that the workers always have some to do.
            with ThreadPoolExecutor(len(scripts)) as threads:
                list(threads.map(lambda script: script.write(lab), scripts))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def parsed(description: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=description.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="hub name or local folder, of model and tokenizer")
    parser.add_argument("--prior", help="text that the model knows: hub name or local file")
    parser.add_argument("--prior-column", default="text", help="column of the prior text")
    parser.add_argument("--prior-separator", help="what stands between documents in a prior .txt file")
    parser.add_argument("--new", help="text to finetune on: hub name or local file")
    parser.add_argument("--new-column", default="text", help="column of the new text")
    parser.add_argument("--other", help="text of another kind, to replay instead of prior text or to finetune on")
    parser.add_argument("--other-column", nargs="+", default=["text"], help="its columns")
    parser.add_argument("--output", type=Path, default=Path("runs/paper"), help="folder for all files")
    parser.add_argument("--steps", type=int, help="optimizer steps of a finetuning; by default 200")
    parser.add_argument("--every", type=int, help="steps between measurements; by default 25")
    parser.add_argument("--held-out", type=int, help="rows of each text to measure on; by default 96")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0 1 2")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, on one core each")
    parser.add_argument("--time", action="store_true", help="`frontier.py`: measure the time of a fit of each arm")
    parser.add_argument("--finished", action="store_true", help="`frontier.py`, `budget.py`: only finished runs")
    parser.add_argument("--quick", action="store_true", help="tiny runs, which show that it works and nothing else")
    parser.add_argument("--fill", type=Path, nargs="+", default=[], help="Markdown files to put the tables into")
    parser.add_argument(
        "--redraw",
        type=Path,
        nargs="?",
        const=FOLDER,
        metavar="FOLDER",
        help="no runs: report what the CSV files of a folder hold, by default those beside the scripts",
    )
    options = parser.parse_args()
    if options.redraw is not None:
        given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
        if useless := [f"--{name.replace('_', '-')}" for name in given if name not in ("redraw", "fill")]:
            parser.error(f"--redraw does no runs, so {', '.join(useless)} would have no effect; leave it out.")
        return options
    missing = [f"--{name}" for name in ("model", "prior", "new", "other") if getattr(options, name) is None]
    if missing and not (options.quick and len(missing) == 4):
        parser.error(f"{', '.join(missing)} missing; --quick alone needs none of them and makes its own.")
    return options


def invent(options: argparse.Namespace, pool: ProcessPoolExecutor) -> None:
    """Make texts of three kinds, and a model that knows the first."""
    kinds = {
        "prior": "the a little big old red cat dog girl boy saw took liked found ball tree house cake",
        "new": "el la una pequeña grande sesión comisión señor presidente informe europea propone aprueba debate",
        "other": "thou thy hath doth lord king sword crown speak begone enter exeunt noble grave wherefore",
    }
    for seed, (kind, words) in enumerate(kinds.items()):
        chance = random.Random(seed)
        sentences = [" ".join(chance.choices(words.split(), k=7)) + "." for _ in range(2000)]
        path = options.output / f"{kind}.txt"
        path.write_text("\n".join(sentences), encoding="utf-8")
        setattr(options, kind, str(path))
    text = Text(options.prior)
    pretraining = Pretraining(text, 32, 0, 100, 50, rows=QUICK.rows, length=QUICK.length, held_out=QUICK.held_out)
    options.model = pool.submit(perform, pretraining, options.output).result()["kept"]["100"]
