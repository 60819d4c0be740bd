"""What replay costs on a GPU: time of a step, sampling and memory, and where the time goes.

    python examples/benchmarks/on_a_gpu.py                                  # step, sampling, memory and profile
    python examples/benchmarks/on_a_gpu.py --only fit graphs --models 125M  # the others, which take longer
    python examples/benchmarks/on_a_gpu.py --device cpu --quick             # every part in small: to see that it runs

Llamas of random weights in bfloat16 (``precision="bf16-true"``), trained with AdamW.

``step``: steps of fits over steps without replay, measured in turn, once rows are there and the first steps are over;
then the seconds of a refill of the default size, and what both come to for each use of its rows. ``sampling``: tokens a
second of ours and of `model.generate`. ``memory``: the most that tensors take in a step, with rows of 2,048 tokens, of
the largest model. ``profile``: tables of `torch.profiler`. ``graphs``: `generate` with a static cache, compiled, for
what CUDA graphs would give. ``fit``: whole fits of the default, sampling included, as long as one refill lasts.

If an arm fails, its error is printed and recorded, and the others are measured. All figures are in
``<output>/on_a_gpu.json``, which is written after each; those of parts that were measured before stay.
"""

import argparse
import gc
import json
import logging
import platform
import signal
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from replay_cost import NEW_ROWS, llama, ratios, sampling_arms
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import CompileConfig
from typing_extensions import override

from lightning_replay import KL, CausalLM, Copy, Sampling, SelfGeneratedReplay, sample_rows
from lightning_replay.data.share import REPLAY_FRACTION
from lightning_replay.models.language_model import evaluating, find_language_model
from lightning_replay.utilities.tables import markdown

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 64, "layers": 2, "heads": 4, "vocabulary": 512},
    "125M": {"width": 768, "layers": 12, "heads": 12, "vocabulary": 32000},
    "1B": {
        "width": 2048,
        "layers": 16,
        "heads": 32,
        "kv_heads": 8,
        "inner": 8192,
        "vocabulary": 128256,
        "tied": True,
    },
    "3B": {
        "width": 3072,
        "layers": 28,
        "heads": 24,
        "kv_heads": 8,
        "inner": 8192,
        "vocabulary": 128256,
        "tied": True,
    },
}
"""The larger ones are those of Llama 3.2."""
REFILL = 256
"""Rows of a refill of a long run."""
CYCLE = 9
"""Steps after which replay rows of the default, a tenth of 16 new ones, come to a whole number: 16."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    length: int = 512
    warm: int = 3
    steps: Mapping[str, int] = field(default_factory=lambda: {"125M": 4 * CYCLE, "1B": CYCLE, "3B": CYCLE})
    rounds: Mapping[str, int] = field(default_factory=lambda: {"125M": 3, "1B": 2, "3B": 1})
    refill: int = REFILL
    sampled_rows: tuple[int, ...] = (64, 256)
    memory_rows: int = 4
    memory_length: int = 2048
    profiled_steps: int = CYCLE
    fit_steps: int = 2 * REFILL * CYCLE // 16
    """As many as a refill lasts that is used twice, as ``"auto"`` begins."""


QUICK = Sizes(16, 1, {"tiny": 1}, {"tiny": 1}, 8, (2, 4), 4, 32, 1, 4)


@dataclass
class Run:
    """What is measured, where, and all figures so far."""

    device: str
    sizes: Sizes
    output: Path
    figures: dict[str, Any]

    def record(self, part: str, model: str, name: str, found: Any) -> None:
        """Add a figure, print it and write all to the file."""
        self.figures.setdefault(part, {}).setdefault(model, {})[name] = found
        print(f"{part}, {model}, {name}: {json.dumps(found)}", flush=True)
        (self.output / "on_a_gpu.json").write_text(json.dumps(self.figures, indent=1) + "\n")

    def attempt(self, part: str, model: str, name: str, measure: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Record what an arm measures; if it fails, its error, and return None."""
        try:
            found = measure(*args, **options)
        except Exception as error:  # one arm may not take the others' figures with it
            traceback.print_exc()
            self.record(part, model, name, {"error": f"{type(error).__name__}: {error}"})
            return None
        self.record(part, model, name, found)
        return found

    def made(self, model: str) -> Any:
        """A model of random weights."""
        self.clear()
        torch.manual_seed(0)
        with torch.device(self.device):
            return llama(**SHAPES[model], context=2 * self.sizes.memory_length).bfloat16()

    def clear(self) -> None:
        """Give memory of what is no longer used back."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


class Clock(L.Callback):
    """Measures the steps of a fit after some first ones.

    Attributes:
        found: Seconds of a step; seconds of sampling in the whole fit; the most bytes that tensors took in these steps,
            and those that were there before the fit, on CUDA.
    """

    def __init__(self, run: Run, warm: int, profiler: Any = None) -> None:
        self.found: dict[str, Any] = {}
        self._run, self._warm, self._profiler = run, warm, profiler
        self._started = 0.0
        run.clear()
        if run.device == "cuda":
            self.found["bytes_before"] = torch.cuda.memory_allocated()

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._start(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._run.wait()
        self.found["seconds"] = (time.perf_counter() - self._started) / (trainer.global_step - self._warm)
        self.found["sampling_seconds"] = float(trainer.callback_metrics.get("replay/sampling_seconds", 0.0))
        if self._profiler is not None:
            self._profiler.stop()
        if self._run.device == "cuda":
            self.found["bytes"] = torch.cuda.max_memory_allocated()
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()
            optimizer.state.clear()  # else Lightning moves both to the CPU, which takes longer than the steps

    def _start(self, trainer: L.Trainer) -> None:
        if trainer.global_step != self._warm:
            return
        self._run.wait()
        if self._run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if self._profiler is not None:
            self._profiler.start()
        self._started = time.perf_counter()


def fit(
    run: Run,
    module: Any,
    replay: SelfGeneratedReplay | None,
    steps: int,
    warm: int | None = None,
    rows: int = NEW_ROWS,
    length: int = 0,
    profiler: Any = None,
) -> dict[str, Any]:
    """Train on random rows for some steps after the first ones, and measure these."""
    warm = run.sizes.warm if warm is None else warm
    vocabulary = module.config.vocab_size
    tokens: Any = torch.randint(3, vocabulary, (rows, length or run.sizes.length))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    batches: Any = [batch] * (warm + steps)
    clock = Clock(run, warm, profiler)
    trainer = L.Trainer(
        max_steps=warm + steps,
        callbacks=[clock] if replay is None else [clock, replay],
        accelerator=run.device,
        devices=1,
        precision="bf16-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(CausalLM(module, 1e-5, schedule="constant"), DataLoader(batches, batch_size=None))
    return clock.found


def at_once(model: Any, prompts: Any, length: int, generator: torch.Generator) -> torch.Tensor:
    """A sampler whose samples are random tokens: training on them costs what it costs on the model's own."""
    samples = torch.randint(3, model.vocabulary, (len(prompts), length), generator=generator)
    samples[:, 0] = torch.tensor([prompt[0] for prompt in prompts])
    return samples


def replay(**settings: Any) -> SelfGeneratedReplay:
    """Replay of rows that take no time to sample."""
    return SelfGeneratedReplay(sampling=Sampling(sampler=at_once), **settings)


class WholeLogits(KL):
    """The divergence of whole logits: a loss that doesn't say what it is of hidden states."""

    @override
    def __call__(self, logits: torch.Tensor, rows: Any, reference_logits: Callable[[], torch.Tensor]) -> torch.Tensor:
        return super().__call__(logits, rows, reference_logits)


DEFAULT = f"**the default**: a tenth (`replay_fraction={REPLAY_FRACTION}`)"
PAPER = "the paper's setting: `replay_fraction=0.2, uses_per_sample=1`"
STEPS: dict[str, Callable[[], SelfGeneratedReplay | None]] = {
    "no replay": lambda: None,
    "plugin attached, `replay_fraction=0`": lambda: SelfGeneratedReplay(replay_fraction=0.0),
    DEFAULT: replay,
    "the same, whole logits": lambda: replay(loss=WholeLogits()),
    "the same, next-token loss": lambda: replay(loss="ntp"),
    "the same, `reference=Copy(quantize='int8')`": lambda: replay(reference=Copy(quantize="int8")),
    "the same, `reference='cached'`": lambda: replay(reference="cached"),
    PAPER: lambda: replay(replay_fraction=0.2, uses_per_sample=1),
}


def measure_step(run: Run, model: str) -> None:
    """Steps with replay over steps without, and the price of a refill."""
    module, steps, found = run.made(model), run.sizes.steps[model], dict[str, list[float]]()
    failed = set[str]()
    run.attempt("step", model, "first steps, which don't count", fit, run, module, replay(), 1)
    for number in range(run.sizes.rounds[model]):
        for name, make in STEPS.items():
            if name in failed:
                continue
            one = run.attempt("step", model, f"{name}, round {number}", fit, run, module, make(), steps)
            if one is None:
                failed.add(name)
            else:
                found.setdefault(name, []).append(one["seconds"])
    full = {name: seconds for name, seconds in found.items() if name not in failed}
    if "no replay" not in full:
        return
    table = ratios(full, "no replay")
    for name, ratio in table.items():
        run.record("step", model, name, vars(ratio))
    print(f"\nSteps of {NEW_ROWS} × {run.sizes.length} new tokens, {model}, rows at hand\n")
    print(step_table(run.figures, [model]))

    sampled = SelfGeneratedReplay(refill_rows=run.sizes.refill)
    one = run.attempt("step", model, "refill", fit, run, module, sampled, 1)
    if one is None:
        return
    seconds, table_of_uses = one["sampling_seconds"], list[str]()
    for name, rows in {DEFAULT: REPLAY_FRACTION / (1 - REPLAY_FRACTION) * NEW_ROWS, PAPER: 0.25 * NEW_ROWS}.items():
        if name in table:
            a_step = seconds * rows / run.sizes.refill / table[name].base
            with_sampling = {uses: table[name].ratio + a_step / uses for uses in (1, 2, 4)}
            run.record("step", model, f"{name}, with sampling, by uses", with_sampling)
            table_of_uses.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in with_sampling.values())} |")
    print(f"\nWith a refill of {run.sizes.refill} rows in {seconds:.2f} s, ÷ without replay\n")
    print("| fit | rows used once | twice | four times |\n|---|---|---|---|")
    print("\n".join(table_of_uses), "\n")


def step_table(figures: Mapping[str, Any], models: Sequence[str]) -> str:
    """The steps of each model, in Markdown: milliseconds, time and memory over those without replay, of all rounds."""
    titles, lines = ["fit"], [[name] for name in STEPS]
    for model in models:
        titles += [f"{model}, ms a step", "÷ without replay", "memory ÷ without"]
        found = figures["step"][model]
        for line in lines:
            rounds = [key.removeprefix(line[0]) for key in found if key.startswith(f"{line[0]}, round ")]
            pairs = [(found[line[0] + each], found["no replay" + each]) for each in rounds]
            pairs = [(one, base) for one, base in pairs if "error" not in one]
            over = sorted(one["seconds"] / base["seconds"] for one, base in pairs)
            held = [one["bytes"] / base["bytes"] for one, base in pairs if "bytes" in one]
            line += (
                ["–"] * 3
                if not pairs
                else [
                    f"{1000 * median(one['seconds'] for one, _ in pairs):.1f}",
                    f"{median(over):.2f} ({over[0]:.2f} to {over[-1]:.2f})",
                    f"{median(held):.2f}" if held else "–",
                ]
            )
    return markdown(titles, lines)


def measure_sampling(run: Run, model: str) -> None:
    """Tokens a second of ours and of `model.generate`."""
    module = run.made(model).eval()
    language_model = find_language_model(CausalLM(module), None)
    length, table = run.sizes.length, list[str]()
    with evaluating(module):
        for rows in run.sizes.sampled_rows:
            speeds = {}
            for index, name in enumerate(("ours", "generate")):
                first, arm = (sampling_arms(language_model, module, rows, each)[index] for each in (8, length))
                speeds[name] = run.attempt("sampling", model, f"{name}, {rows} rows", speed, run, first, arm, rows)
            if None not in speeds.values():
                ours, theirs = speeds["ours"], speeds["generate"]
                table.append(f"| {model} | {rows} × {length} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |")
    print("\nSampling, temperature 1, nothing truncated, tokens a second\n")
    print("| model | rows × tokens | ours | `generate` | ours ÷ `generate` |\n|---|---|---|---|---|")
    print("\n".join(table))


def speed(run: Run, first: Callable[[], Any], arm: Callable[[], Any], rows: int) -> float:
    """Tokens a second of an arm that samples rows, after a call that may take longer."""
    first()
    run.wait()
    started = time.perf_counter()
    arm()
    run.wait()
    return rows * (run.sizes.length - 1) / (time.perf_counter() - started)


def measure_graphs(run: Run, model: str) -> None:
    """Tokens a second of `generate` with a static cache, if it is compiled in 40 seconds."""
    module = run.made(model).eval()
    rows, length = run.sizes.sampled_rows[-1], run.sizes.length
    start = torch.ones(rows, 1, dtype=torch.int64, device=run.device)
    configs = {
        "static cache, compiled as transformers does": None,
        "static cache, the backend `cudagraphs`": CompileConfig(fullgraph=False, backend="cudagraphs", mode=None),
    }
    for name, config in configs.items() if run.device == "cuda" else list(configs.items())[:1]:

        def generate(config: Any = config) -> Any:
            return module.generate(
                start,
                do_sample=True,
                top_k=0,
                max_length=length,
                min_length=length,
                pad_token_id=0,
                cache_implementation="static",
                compile_config=config,
            )

        def first(generate: Callable[[], Any] = generate) -> None:
            with at_most(40):
                generate()

        run.attempt("graphs", model, f"{name}, {rows} rows", speed, run, first, generate, rows)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in what takes longer."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"It took more than {seconds} seconds.")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


MEMORY: dict[str, tuple[bool, dict[str, Any] | None]] = {
    "no replay": (False, None),
    "copy": (False, {"reference": Copy()}),
    "copy, whole logits": (False, {"reference": Copy(), "loss": WholeLogits()}),
    "int8 copy": (False, {"reference": Copy(quantize="int8")}),
    "cached": (False, {"reference": "cached"}),
    "LoRA, no replay": (True, None),
    "LoRA, adapter": (True, {"reference": "adapter"}),
    "LoRA, adapter, whole logits": (True, {"reference": "adapter", "loss": WholeLogits()}),
}
"""Whether only LoRA's matrices train, and the settings of replay."""


def measure_memory(run: Run, model: str) -> None:
    """The most that tensors take in a step, over those of a step without replay."""
    module, found = run.made(model), dict[str, Any]()
    for name, (lora, settings) in MEMORY.items():
        trained = get_peft_model(module, LoraConfig(target_modules=["q_proj", "v_proj"], r=8)) if lora else module
        added = None if settings is None else replay(replay_fraction=0.2, **settings)
        rows, length = run.sizes.memory_rows, run.sizes.memory_length
        one = run.attempt("memory", model, name, fit, run, trained, added, 1, warm=1, rows=rows, length=length)
        if lora:
            trained.unload()
        if one is not None and "bytes" in one:
            found[name] = one["bytes"]
    print(f"\nMemory of a step of {run.sizes.memory_rows} × {run.sizes.memory_length} new tokens, {model}\n")
    print("| reference | GiB | ÷ without replay |\n|---|---|---|")
    for name in MEMORY:
        base = found.get("LoRA, no replay" if name.startswith("LoRA") else "no replay")
        taken = found.get(name)
        ratio = "–" if base is None or taken is None else f"{taken / base:.3f}"
        print(f"| {name} | {'–' if taken is None else f'{taken / 2**30:.2f}'} | {ratio} |")


def measure_profile(run: Run, model: str) -> None:
    """Where the time goes: of steps without replay and with the default, and of sampling."""
    module = run.made(model)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.device == "cuda" else [])]

    def profiled(name: str) -> dict[str, Any]:
        profiler, steps = profile(activities=activities), run.sizes.profiled_steps
        if name == "sampling":
            module.to(run.device)
            language_model = find_language_model(CausalLM(module), None)
            with evaluating(module):
                sample_rows(language_model, [[1]] * 64, 4, torch.Generator())
                run.wait()
                profiler.start()
                started = time.perf_counter()
                sample_rows(language_model, [[1]] * 64, steps + 1, torch.Generator())
                run.wait()
                seconds = (time.perf_counter() - started) / steps
            profiler.stop()
        else:
            seconds = fit(run, module, None if name == "no replay" else replay(), steps, profiler=profiler)["seconds"]
        return summary(run, f"{model}, {name}", profiler, steps, seconds)

    for name in ("no replay", "default", "sampling"):
        run.attempt("profile", model, name, profiled, name)


def summary(run: Run, title: str, profiler: Any, steps: int, seconds: float) -> dict[str, Any]:
    """Add a profile's tables to a file, and return the five operations that take most, in ms a step."""
    averages: Any = profiler.key_averages()
    tables = [f"{title}: {seconds * 1000:.2f} ms a step while profiled, {steps} steps"]
    tables.append(averages.table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=80))
    found: dict[str, Any] = {"ms_a_step": seconds * 1000}
    found["cpu"] = _most(averages, "self_cpu_time_total", steps)
    if run.device == "cuda":
        tables.append(averages.table(sort_by="self_device_time_total", row_limit=12, max_name_column_width=80))
        kernels = [
            one for one in averages if one.device_type.name == "CUDA" and not getattr(one, "is_user_annotation", False)
        ]
        found["device"] = _most(kernels, "self_device_time_total", steps)
        found["device_ms_a_step"] = sum(one.self_device_time_total for one in kernels) / 1000 / steps
        # Launches of kernels, copies, and waits of the host for the device.
        of_cuda = ("cuda", "cuLaunch", "aten::_local_scalar_dense")
        found["calls_a_step"] = {one.key: one.count / steps for one in averages if one.key.startswith(of_cuda)}
    with (run.output / "on_a_gpu_profile.txt").open("a") as file:
        file.write("\n".join([*tables, "\n"]))
    return found


def _most(events: Any, key: str, steps: int) -> dict[str, float]:
    first = sorted(events, key=lambda one: -getattr(one, key))[:5]
    return {one.key[:100]: getattr(one, key) / 1000 / steps for one in first}


def measure_fit(run: Run, model: str) -> None:
    """A whole fit of the default, sampling included, over the same fit without replay."""
    module, steps = run.made(model), run.sizes.fit_steps
    run.attempt("fit", model, "first steps, which don't count", fit, run, module, replay(), 2)
    arms = {"no replay": None, DEFAULT: SelfGeneratedReplay()}
    found = {
        name: run.attempt("fit", model, name, fit, run, module, added, steps, warm=0) for name, added in arms.items()
    }
    if None in found.values():
        return
    plain, ours = (one["seconds"] for one in found.values())
    share = found[DEFAULT]["sampling_seconds"] / (steps * ours)
    run.record("fit", model, "ratio", ours / plain)
    print(f"\nFits of {steps} steps, {model}: {ours / plain:.2f} × without replay; sampling is {share:.0%} of it.\n")


PARTS: dict[str, Callable[[Run, str], None]] = {
    "step": measure_step,
    "sampling": measure_sampling,
    "memory": measure_memory,
    "profile": measure_profile,
    "graphs": measure_graphs,
    "fit": measure_fit,
}


def timed(part: Callable[[Run, str], None], run: Run, model: str) -> float:
    """Seconds that a part takes."""
    started = time.perf_counter()
    part(run, model)
    return time.perf_counter() - started


def machine(device: str) -> dict[str, str]:
    """Machine, card and versions."""
    found = {"machine": f"{platform.platform()}, {platform.machine()}, {torch.get_num_threads()} threads"}
    if device == "cuda":
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        found["card"] = torch.cuda.get_device_name()
        found["driver"] = subprocess.run(query, shell=True, capture_output=True, text=True, check=False).stdout.strip()
    return found | {name: version(name) for name in ("torch", "lightning", "transformers", "peft")}


def main() -> None:
    """Measure what is asked for, print the tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to measure")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="which parts; by default the first four")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["125M", "1B"], help="models, the largest last")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder for the figures")
    parser.add_argument("--quick", action="store_true", help="all parts in small, to see that they run")
    parser.add_argument("--table", type=Path, help="measure nothing, and print the steps of this file")
    options = parser.parse_args()
    if options.table is not None:
        print(step_table(json.loads(options.table.read_text()), options.models))
        return
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    models = ["tiny"] if options.quick else options.models
    options.output.mkdir(parents=True, exist_ok=True)
    about = machine(options.device)
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    written = options.output / "on_a_gpu.json"
    figures = json.loads(written.read_text()) if written.exists() else {}
    run = Run(options.device, QUICK if options.quick else Sizes(), options.output, figures | about)
    for part in options.only or (list(PARTS) if options.quick else list(PARTS)[:4]):
        for model in models[-1:] if part == "memory" else models:
            run.attempt("seconds", model, part, timed, PARTS[part], run, model)


if __name__ == "__main__":
    main()
