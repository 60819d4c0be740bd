"""Three pictures of one finetuning: what is sampled, what is regularized, what is measured.

    python examples/concepts.py --model DIR_OR_HUB_NAME --prior known.txt --new new.txt --output pictures
    python examples/concepts.py --quick

Finetunes without and with replay, from the same weights and on the same rows. Writes `sampled.png`, `regularized.png`
and `measured.png`, which stand in the README, and prints the figures in them. Takes two minutes for a model of
650,000 parameters on two cores, and half a minute with --quick.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import quick
import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoTokenizer

from lightning_replay import (
    CausalLM,
    ForgettingMonitor,
    ReplayDataModule,
    SelfGeneratedReplay,
    TextDataModule,
    forward_kl,
)
from lightning_replay.report.plots import STEPS, STYLE, Look

ARMS = ("without replay", "with replay")
LOOKS = dict(zip(ARMS, map(Look.of, (0, 1)), strict=True))
LIKELIEST = 8


@dataclass
class Seen(L.Callback):
    """The rows of a run's first step."""

    new: Tensor | None = None
    replayed: Tensor | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep them."""
        drawn = trainer.datamodule.drawn  # type: ignore[attr-defined]
        if self.new is None and drawn is not None:
            self.new, self.replayed = batch["input_ids"], drawn.tokens


@dataclass(frozen=True)
class Run:
    """What a finetuning gave: the model, the rows of its first step, and losses by step."""

    model: Any
    seen: Seen
    steps: list[int]
    losses: dict[str, list[float]]


def finetune(options: argparse.Namespace, arm: str) -> Run:
    """Train once."""
    L.seed_everything(0, verbose=False)
    sizes: dict[str, Any] = {"tokenizer": options.model, "sequence_length": options.length}
    new = TextDataModule(options.new, batch_size=16, **sizes)
    prior = TextDataModule(options.prior, batch_size=16, document_separator=options.prior_separator, **sizes)
    new.setup("fit")
    prior.setup("fit")
    held_out = {"prior": prior.val_dataloader(), "new": new.val_dataloader()}
    seen, log = Seen(), CSVLogger(options.output / "logs", arm, "")
    trainer = L.Trainer(
        max_steps=options.steps,
        callbacks=[
            SelfGeneratedReplay(uses_per_sample=1),
            ForgettingMonitor(held_out, max(1, options.steps // 20), max_batches=6),
            seen,
        ],
        limit_val_batches=0,
        logger=log,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = CausalLM(options.model, options.learning_rate, schedule="constant")
    trainer.fit(module, datamodule=ReplayDataModule(new, 0.2 if arm == "with replay" else 0.0))
    with open(log.experiment.metrics_file_path, newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["prior_loss/prior"]]
    steps = [int(line["step"]) for line in lines]
    return Run(
        module.model, seen, steps, {name: [float(line[f"prior_loss/{name}"]) for line in lines] for name in held_out}
    )


def draw_sampled(figure: Figure, seen: Seen, tokenizer: Any) -> None:
    """Some rows of the first batch, as text."""
    assert seen.new is not None
    assert seen.replayed is not None
    axis = figure.add_subplot()
    axis.set_axis_off()
    rows = [("new text", LOOKS["without replay"], row) for row in seen.new[:4]]
    rows += [("sample", LOOKS["with replay"], row) for row in seen.replayed[:2]]
    for line, (kind, look, row) in enumerate(rows):
        text = " ".join(tokenizer.decode(row, skip_special_tokens=True).split())
        place: dict[str, Any] = {"va": "center", "transform": axis.transAxes}
        height = 1 - (line + 0.5) / len(rows)
        axis.text(0.0, height, kind, color=look.color, weight="bold", **place)
        axis.text(0.11, height, text[:88] + " …", family="monospace", fontsize=8, **place)
    axis.set_title(
        f"From the first batch: {len(seen.new)} rows of the new text, {len(seen.replayed)} of the model's own"
    )


def draw_regularized(figure: Figure, logits: dict[str, Tensor], context: str, tokenizer: Any) -> None:
    """The likeliest next tokens at one position of a sample, before finetuning and after."""
    axis = figure.add_subplot()
    before = logits["before"].softmax(-1)
    likeliest = before.topk(LIKELIEST).indices
    places = torch.arange(LIKELIEST)
    bars = [("before, the reference π", "#9aa1ab", before)]
    for arm in reversed(ARMS):
        divergence = float(forward_kl(logits[arm][None, None], logits["before"][None, None]))
        print(f"KL divergence from the model before, {arm}: {divergence:.3f}")
        bars.append((f"after, {arm}: KL {divergence:.2f}", LOOKS[arm].color, logits[arm].softmax(-1)))
    for number, (label, color, probabilities) in enumerate(bars):
        axis.bar(places + 0.27 * (number - 1), probabilities[likeliest], 0.25, color=color, label=label)
    axis.set_xticks(places, [tokenizer.decode([token]).strip() or "␣" for token in likeliest.tolist()])
    axis.set(title=f"Next token after “… {context}”", ylabel="probability")
    axis.legend(frameon=False)


def draw_measured(figure: Figure, runs: dict[str, Run]) -> None:
    """Losses on prior and on new text over the steps."""
    prior, new = figure.subplots(1, 2)
    for arm, run in runs.items():
        color, steps, losses = LOOKS[arm].color, run.steps, run.losses["prior"]
        start, end = losses[0], losses[-1]
        prior.plot(steps, losses, **LOOKS[arm].line())
        new.plot(steps, run.losses["new"], label=arm, **LOOKS[arm].line())
        print(f"forgetting {arm}: {end - start:+.3f} at a new-task loss of {run.losses['new'][-1]:.3f}")
        prior.annotate("", (steps[-1], end), (steps[-1], start), arrowprops={"arrowstyle": "->", "color": color})
        middle = (start + end) / 2 if end > start + 0.2 else start + 0.06
        prior.text(0.95 * steps[-1], middle, f"forgetting {end - start:+.2f}", ha="right", color=color)
    prior.axhline(start, color="0.5", linewidth=1, linestyle=":")
    prior.set(title="Loss on held-out prior text", xlabel=STEPS, ylabel="nats a token")
    new.set(title="Loss on held-out new text", xlabel=STEPS)
    new.legend(frameon=False)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="hub name or local folder, of model and tokenizer")
    parser.add_argument("--prior", help="text that the model knows: a local file")
    parser.add_argument("--prior-separator", help="what stands between its documents, if anything")
    parser.add_argument("--new", help="text to finetune on: a local file")
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return quick.parsed(parser, steps=40, length=quick.LENGTH)


def main() -> None:
    """Finetune, and draw."""
    options = parsed()
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    runs = {arm: finetune(options, arm) for arm in ARMS}
    models: dict[str, Any] = {arm: run.model for arm, run in runs.items()}
    models["before"] = CausalLM(options.model).model

    seen = runs["with replay"].seen
    assert seen.replayed is not None
    row = seen.replayed[:1]
    with torch.no_grad():
        all_logits = {name: model(seen.replayed).logits for name, model in models.items()}
    for arm in ARMS:
        divergence = float(forward_kl(all_logits[arm], all_logits["before"]))
        print(f"mean KL divergence on the samples, {arm}: {divergence:.3f}")
    logits = {name: of_samples[0] for name, of_samples in all_logits.items()}
    # A typical position: the one with the median of the divergences without replay.
    divergences = forward_kl(logits[ARMS[0]][None], logits["before"][None], reduction="none")[0]
    position = int((divergences == divergences.median()).nonzero()[0])
    words = tokenizer.decode(row[0, : position + 1], skip_special_tokens=True).split()
    context = " ".join(words)[-48:].partition(" ")[2]
    at_position = {name: values[position] for name, values in logits.items()}

    options.output.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, tuple[float, Callable[[Figure], None]]] = {
        "sampled": (2.0, lambda figure: draw_sampled(figure, seen, tokenizer)),
        "regularized": (2.8, lambda figure: draw_regularized(figure, at_position, context, tokenizer)),
        "measured": (2.8, lambda figure: draw_measured(figure, runs)),
    }
    for name, (height, draw) in pictures.items():
        figure = Figure(figsize=(7.5, height), layout="constrained")
        draw(figure)
        figure.savefig(options.output / f"{name}.png", dpi=160)
    print(f"Wrote {', '.join(f'{name}.png' for name in pictures)} to {options.output}.")


if __name__ == "__main__":
    main()
