"""Benchmarks before and after finetuning, without and with replay: a task of one's own for lm-evaluation-harness.

    pip install 'lightning-replay[lm-eval]'
    python examples/benchmarks_in_training.py --quick
    python examples/benchmarks_in_training.py --model DIR_OR_HUB_NAME --prior known.txt --new new.txt

The task is made of the known text, a document a line: which of four texts goes on after the first half of a line, its
second half or those of three other lines. Any task of the harness is measured in the same way, by its name, as in
``BenchmarkMonitor(["arc_easy"])``. A function of one's own is measured beside it: the loss on some lines.

Prints a table. Takes 20 seconds with --quick.
"""

import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness_task import NAME, cut_lines, write_task
from quick import arguments
from torch.nn import functional

from lightning_replay import (
    BenchmarkMonitor,
    CausalLM,
    LanguageModel,
    ReplayDataModule,
    SelfGeneratedReplay,
    TextDataModule,
)

DOCUMENTS = 100
options = arguments(__doc__)
lines = cut_lines(options.prior, DOCUMENTS, least=4, most=options.length // 2)


def loss(model: LanguageModel, tokenizer: Any) -> float:
    """Nats a token on ten lines: a probe, which any function of the model and its tokenizer can be."""
    losses = []
    for line in lines[:10]:
        tokens = torch.tensor([tokenizer.encode(line)], device=model.device)
        losses.append(functional.cross_entropy(model.logits(tokens)[0, :-1].float(), tokens[0, 1:]))
    return float(torch.stack(losses).mean())


def text(file: str) -> TextDataModule:
    """A file of documents, one a line."""
    return TextDataModule(file, options.model, options.length, batch_size=16, document_separator="\n")


table = ["| replay | benchmark | before | after | ± standard error | drop |", "|---|---|---|---|---|---|"]
with tempfile.TemporaryDirectory() as name:
    write_task(lines, Path(name))
    for fraction in (0.0, options.replay_fraction):
        L.seed_everything(0, verbose=False)
        monitor = BenchmarkMonitor(
            [NAME], {"loss": loss}, every_n_steps=options.steps, include_path=name, lower_is_better=["loss"]
        )
        replay = [SelfGeneratedReplay()] if fraction else []
        trainer = L.Trainer(max_steps=options.steps, callbacks=[*replay, monitor], logger=False)
        trainer.fit(
            CausalLM(options.model, options.learning_rate), datamodule=ReplayDataModule(text(options.new), fraction)
        )
        figures = {key: float(value) for key, value in trainer.callback_metrics.items()}
        for key, before in monitor.baseline.items():
            error = figures.get(f"benchmark_stderr/{key}")
            cells = [f"{before:.3f}", f"{figures[f'benchmark/{key}']:.3f}", "–" if error is None else f"{error:.3f}"]
            table.append(f"| {fraction:g} | {key} | {' | '.join(cells)} | {figures[f'benchmark_drop/{key}']:+.3f} |")
print(*table, sep="\n")
