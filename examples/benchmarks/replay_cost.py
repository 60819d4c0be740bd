"""What replay costs: time of a fit, sampling speed, and how each grows.

Everything is a ratio of two measurements taken in turn in one run: A B A B …, and the median of the ratios of
neighbours. Models have random weights, which cost what trained ones do, so nothing is downloaded.

    python examples/benchmarks/replay_cost.py                 # all parts; the fits alone take a quarter of an hour
    python examples/benchmarks/replay_cost.py --only fit      # one of fit, sampling, draw, growth
    python examples/benchmarks/replay_cost.py --quick         # every part once, in small: to see that it runs

Prints a table in Markdown for each part and writes all figures to ``<output>/replay_cost.json``, which ``--table FILE``
prints again.
"""

import argparse
import json
import logging
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightning_replay import (
    CausalLM,
    Copy,
    ReplayBuffer,
    ReplayDataModule,
    SelfGeneratedReplay,
    sample_rows,
)
from lightning_replay.data.share import REPLAY_FRACTION
from lightning_replay.models.language_model import evaluating, find_language_model
from lightning_replay.utilities.tables import markdown

LENGTH = 128
NEW_ROWS = 16


def tinystories() -> PreTrainedModel:
    """The shape of TinyStories-656K: 2 layers of width 128, vocabulary 2,048."""
    return llama(width=128, layers=2, heads=8, vocabulary=2048, inner=384, kv_heads=4, tied=True)


def llama(
    width: int,
    layers: int,
    heads: int,
    vocabulary: int = 8192,
    inner: int = 0,
    kv_heads: int = 0,
    tied: bool = False,
    context: int = 512,
) -> PreTrainedModel:
    """A Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner or width * 8 // 3 // 64 * 64,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads or heads,
            max_position_embeddings=context,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def gpt2(width: int, layers: int, heads: int, vocabulary: int) -> PreTrainedModel:
    """A GPT-2 with random weights."""
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "TinyStories-656K": tinystories,
    "Llama, 25M": lambda: llama(512, 6, 8, vocabulary=8192),
    "GPT-2, 25M": lambda: gpt2(512, 6, 8, vocabulary=12000),
    "Llama, 125M": lambda: llama(768, 12, 12, vocabulary=32000),
    "GPT-2, 125M": lambda: gpt2(768, 12, 12, vocabulary=50257),
}


@dataclass(frozen=True)
class Ratio:
    """Two costs, measured in turn: medians, and the median and the extremes of the ratios of neighbours."""

    ours: float
    base: float
    ratio: float
    least: float
    most: float


def in_turn(arms: Mapping[str, Callable[[], Any]], base: str, repeats: int) -> dict[str, Ratio]:
    """Seconds of each arm over those of the base, measured in turn.

    The first round doesn't count, unless there is no other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - started)
    return ratios({name: values[1:] or values for name, values in seconds.items()}, base)


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, Ratio]:
    """Seconds of each arm in each round over those of the base."""
    found = {}
    for name, values in seconds.items():
        each = [ours / theirs for ours, theirs in zip(values, seconds[base], strict=True)]
        found[name] = Ratio(median(values), median(seconds[base]), median(each), min(each), max(each))
    return found


def fit(
    model: PreTrainedModel, steps: int, replay: SelfGeneratedReplay | None, fraction: float, new_rows: int = NEW_ROWS
) -> None:
    """Train on random rows."""
    rows: Any = torch.randint(3, model.config.vocab_size, (new_rows, LENGTH))
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}
    batches: Any = [batch] * steps
    loader = DataLoader(batches, batch_size=None)
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=[] if replay is None else [replay],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = CausalLM(model, 1e-4, schedule="constant")
    if replay is None:
        trainer.fit(module, loader)
    else:
        trainer.fit(module, datamodule=ReplayDataModule(loader, fraction))


def fits_in_turn(arms: Mapping[str, Callable[[], Any]], base: str, repeats: int, steps: int) -> dict[str, Any]:
    """The figures of fits that were measured in turn, each of so many steps."""
    return {name: vars(ratio) | {"steps": steps} for name, ratio in in_turn(arms, base, repeats).items()}


def measure_fit(options: argparse.Namespace) -> dict[str, Any]:
    """A fit with replay over the same fit without."""
    steps, repeats = (2, 0) if options.quick else (48, options.repeats)
    torch.manual_seed(0)
    model = tinystories()

    def arm(fraction: float | None, **settings: Any) -> Callable[[], None]:
        if fraction is None:
            return lambda: fit(model, steps, SelfGeneratedReplay(**settings), REPLAY_FRACTION)
        return lambda: fit(model, steps, SelfGeneratedReplay(uses_per_sample=1, **settings), fraction)

    arms: dict[str, Callable[[], Any]] = {
        "no replay": lambda: fit(model, steps, None, 0.0),
        "plugin attached, `replay_fraction=0`": arm(0.0),
        '**the default**: a tenth, `uses_per_sample="auto"`': arm(None),
        "the same, next-token loss": arm(None, loss="ntp"),
        "the paper's setting: 16 new + 4 fresh rows": arm(0.2),
        "the same, `background=True`": arm(0.2, background=True),
        "the same, `reference='cached'`": arm(0.2, reference="cached"),
        "the same, `reference=Copy(quantize='int8')`": arm(0.2, reference=Copy(quantize="int8")),
        "the paper's setting, next-token loss": arm(0.2, loss="ntp"),
        "16 new + 16 fresh rows": arm(0.5),
    }
    found = fits_in_turn(arms, "no replay", repeats, steps)
    steps = 4 if options.quick else 200  # which the arms read when they run
    longer = {"no replay, 200 steps": arms["no replay"], "the default, 200 steps": arm(None)}
    return found | fits_in_turn(longer, "no replay, 200 steps", repeats, steps)


def measure_sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of ours over those of `model.generate`."""
    found: dict[str, Any] = {}
    for name, make in MODELS.items():
        if options.quick and "125M" in name:
            continue
        torch.manual_seed(0)
        module = make().eval()
        model = find_language_model(CausalLM(module), None)
        rows, length = (128, LENGTH) if name.startswith("Tiny") else (16, LENGTH)
        if options.quick:
            rows, length = 2, 8
        ours, theirs = sampling_arms(model, module, rows, length)
        with evaluating(module):
            repeats = 0 if options.quick else options.repeats if "125M" not in name else 3
            ratio = in_turn({"ours": ours, "generate": theirs}, "ours", repeats)["generate"]
        found[name] = vars(ratio) | {"rows": rows, "length": length}
    return found


def sampling_arms(
    model: Any, module: PreTrainedModel, rows: int, length: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same work by our loop and by `generate`."""
    start = torch.ones(rows, 1, dtype=torch.int64, device=module.device)

    def ours() -> None:
        sample_rows(model, [[1]] * rows, length, torch.Generator().manual_seed(0))

    def theirs() -> None:
        generate: Any = module.generate
        generate(start, do_sample=True, top_k=0, max_length=length, min_length=length, pad_token_id=0)

    return ours, theirs


def measure_draw(options: argparse.Namespace) -> dict[str, Any]:
    """Drawing and merging as a share of a plain step, over the capacity of the buffer."""
    torch.manual_seed(0)
    model, repeats = tinystories(), 20 if options.quick else 400
    steps = 2 if options.quick else 32
    step = in_turn({"fit": lambda: fit(model, steps, None, 0.0)}, "fit", 0 if options.quick else 3)["fit"].ours / steps
    found: dict[str, Any] = {}
    for capacity in (10**3, 10**4) if options.quick else (10**3, 10**4, 10**5, 10**6):
        buffer = ReplayBuffer(capacity, LENGTH)
        buffer.add(torch.randint(3, 2048, (capacity, LENGTH)))
        data = ReplayDataModule([], 0.2, buffer=buffer)
        data.setup("fit")
        rows = torch.randint(3, 2048, (NEW_ROWS, LENGTH))
        batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            joined = data.mixed(batch)
            seconds.append(time.perf_counter() - started)
        assert len(joined["input_ids"]) == NEW_ROWS + 4
        a_token = buffer.nbytes / (capacity * LENGTH)
        found[str(capacity)] = {"seconds": median(seconds), "share": median(seconds) / step, "bytes": a_token}
    cached = ReplayBuffer(100, LENGTH, top_k=64)
    a_log_prob = (cached.nbytes - ReplayBuffer(100, LENGTH).nbytes) / (100 * (LENGTH - 1) * 64)
    return {"step_seconds": step, "capacities": found, "bytes_of_a_log_probability": a_log_prob}


def measure_growth(options: argparse.Namespace) -> dict[str, Any]:
    """Sampling time over rows, length and model size; step cost over the share of replay rows."""
    found: dict[str, Any] = {"sampling": [], "fraction": {}}
    cases = [("TinyStories-656K", rows, LENGTH) for rows in (16, 64, 256, 1024)]
    cases += [("TinyStories-656K", 64, length) for length in (64, 256, 512)]
    cases += [(name, 16, LENGTH) for name in ("Llama, 25M", "Llama, 125M")]
    for name, rows, length in cases[:2] if options.quick else cases:
        torch.manual_seed(0)
        module = MODELS[name]().eval()
        model = find_language_model(CausalLM(module), None)
        seconds = []
        with evaluating(module):
            for _ in range(1 if options.quick else 3):
                started = time.perf_counter()
                sample_rows(model, [[1]] * rows, length, torch.Generator().manual_seed(0), batch_size=256)
                seconds.append(time.perf_counter() - started)
        found["sampling"].append({"model": name, "rows": rows, "length": length, "seconds": median(seconds)})
    steps, repeats = (2, 0) if options.quick else (48, 3)
    model_656k = tinystories()
    arms: dict[str, Callable[[], Any]] = {"0": lambda: fit(model_656k, steps, None, 0.0)}
    for fraction in (0.2, 0.5) if options.quick else (0.1, 0.2, 0.3, 0.4, 0.5):
        arms[str(fraction)] = lambda share=fraction: fit(  # type: ignore[misc]
            model_656k, steps, SelfGeneratedReplay(uses_per_sample=1), share
        )
    found["fraction"] = fits_in_turn(arms, "0", repeats, steps)
    return found


def fit_lines(figures: Mapping[str, Any], name: str) -> str:
    """Milliseconds a step and ratios, a line for each fit."""
    lines = [[arm, f"{one['ours'] / one['steps'] * 1000:.0f}", ratio_of(one)] for arm, one in figures.items()]
    return markdown([name, "ms a step", "÷ without replay"], lines)


def sampling_lines(figures: Mapping[str, Any]) -> str:
    """Tokens a second of ours and of `generate`, and how many more are ours."""
    lines = []
    for name, one in figures.items():
        tokens = one["rows"] * (one["length"] - 1)
        speeds = [f"{tokens / one[each]:,.0f}" for each in ("base", "ours")]
        lines.append([name, f"{one['rows']} × {one['length']}", *speeds, ratio_of(one)])
    return markdown(["model", "rows × tokens", "ours", "`generate`", "ours ÷ `generate`"], lines)


def draw_lines(figures: Mapping[str, Any]) -> str:
    """What it takes to draw rows, and bytes of a cached log-probability."""
    lines = [
        [f"{int(capacity):,}", f"{one['seconds'] * 1e6:.0f}", f"{one['share']:.2%}", f"{one['bytes']:.2f}"]
        for capacity, one in figures["capacities"].items()
    ]
    bytes_each = figures["bytes_of_a_log_probability"]
    table = markdown(["capacity", "µs", "share of a step", "buffer, bytes a token"], lines)
    return f"{table}\n\nA cached log-probability takes {bytes_each:.2f} bytes, the tail's included (k = 64)."


def growth_lines(figures: Mapping[str, Any]) -> str:
    """How sampling and steps grow."""
    lines = []
    for one in figures["sampling"]:
        speed = one["rows"] * (one["length"] - 1) / one["seconds"]
        lines.append([one["model"], f"{one['rows']:,}", str(one["length"]), f"{one['seconds']:.2f}", f"{speed:,.0f}"])
    sampling = markdown(["model", "rows", "tokens a row", "seconds", "tokens a second"], lines)
    return f"{sampling}\n\n{fit_lines(figures['fraction'], '`replay_fraction`')}"


def ratio_of(figures: Mapping[str, Any]) -> str:
    """A ratio with its extremes."""
    return f"{figures['ratio']:.2f} ({figures['least']:.2f} to {figures['most']:.2f})"


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "fit": lambda figures: fit_lines(figures, "fit"),
    "sampling": sampling_lines,
    "draw": draw_lines,
    "growth": growth_lines,
}
PARTS = {
    "fit": measure_fit,
    "sampling": measure_sampling,
    "draw": measure_draw,
    "growth": measure_growth,
}


def main() -> None:
    """Measure what is asked for, print the tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="which parts")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each comparison that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder for the figures")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: print the tables of this file")
    options = parser.parse_args()
    if options.table is not None:
        figures = json.loads(options.table.read_text())
        print("\n\n".join(TABLES[part](figures[part]) for part in options.only))
        return
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    figures = {
        "machine": f"{platform.machine()}, {options.threads} threads",
        "torch": torch.__version__,
        "repeats": options.repeats,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for part in options.only:
        figures[part] = PARTS[part](options)
        print(f"\n{TABLES[part](figures[part])}")
        (options.output / "replay_cost.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
