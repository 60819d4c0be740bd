"""Generate replay rows first, on a Ray cluster or here, then train on them, without sampling and a second model.

The model that trains has its device to itself: rows and the reference's 64 likeliest log-probabilities of each
position come from a folder. Any number of later runs can use them.

    python examples/generate_ahead.py --model roneneldan/TinyStories-33M --new my_notes.txt --rows 20000 --engine ray
    python examples/generate_ahead.py --quick

The first half is also a command, for other machines than those that train:

    lightning-replay generate --model roneneldan/TinyStories-33M --rows 20000 --sequence_length 128 \
        --reference_top_k 64 --engine Ray --engine.actors 8 --output rows

Prints rows a second, then what the model forgets of rows of its own that it never trained on, without and with replay.
With --quick, a model of random weights learns random rows in this process, in ten seconds.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from ray_train import random_rows, tiny_model
from torch.utils.data import DataLoader

from lightning_replay import (
    CausalLM,
    ForgettingMonitor,
    Ray,
    ReplayDataModule,
    ReplayShards,
    Sampling,
    SelfGeneratedReplay,
    TextDataModule,
    generate_rows,
)


def train(options: argparse.Namespace, model: str, rows: Path | None, held_out: Path) -> dict[str, float]:
    """Train on the new rows, and on the generated ones if there are any; the last values of the monitor."""
    L.seed_everything(options.seed, verbose=False)
    quick = options.new is None
    data: Any = (
        random_rows(16) if quick else TextDataModule(options.new, model, sequence_length=options.sequence_length)
    )
    known = ReplayShards(held_out, read_rows=64).next_rows().tokens
    prior: Any = [{"input_ids": row, "labels": row} for row in known]
    monitor = ForgettingMonitor({"own": DataLoader(prior, 16)}, every_n_steps=options.steps)
    replay = SelfGeneratedReplay(loss="kl", coefficient=10.0, reference="cached")
    trainer = L.Trainer(
        max_steps=options.steps,
        callbacks=[monitor] if rows is None else [replay, monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        accelerator="cpu" if quick else "auto",
    )
    mixed = ReplayDataModule(data, 0.0) if rows is None else ReplayDataModule(data, 0.2, buffer=rows)
    trainer.fit(CausalLM(model, learning_rate=1e-3, schedule="constant"), datamodule=mixed)
    return {name: float(trainer.callback_metrics[name]) for name in ("train/loss", "forgetting/own")}


def main() -> None:
    """Generate, train without and with what was generated, and print both."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="hub name or folder of model and tokenizer")
    parser.add_argument("--new", help="text to finetune on: hub name or file")
    parser.add_argument("--rows", type=int, default=2000, help="rows to generate")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="this process, or a Ray cluster")
    parser.add_argument("--actors", type=int, default=2, help="Ray actors")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/ahead"), help="folder for the rows")
    parser.add_argument("--quick", action="store_true", help="a tiny model and random rows, in a folder of its own")
    options = parser.parse_args()
    if options.quick:
        options.output, options.new = Path(tempfile.mkdtemp()), None
        options.model = str(options.output / "model")
        tiny_model().save_pretrained(options.model)
        options.rows, options.sequence_length, options.steps = 256, 32, 60
    elif not options.model or not options.new:
        parser.error("--model and --new are needed without --quick")

    rows, held_out = options.output / "rows", options.output / "held_out"
    length, seed = options.sequence_length, options.seed
    engine: Any = Ray(options.actors) if options.engine == "ray" else "local"
    made = generate_rows(
        options.model, options.rows, rows, sequence_length=length, reference_top_k=64, seed=seed, engine=engine
    )
    whole = Sampling(length=length)
    generate_rows(options.model, 64, held_out, sampling=whole, sequence_length=length, seed=seed + 1)
    print(f"{rows}: {made.rows:,} rows of {length} tokens, {made.new_rows / made.seconds:,.1f} rows/s")

    plain, replayed = (train(options, options.model, given, held_out) for given in (None, rows))
    print(f"{'':>16}{'new-task loss':>16}{'forgetting':>14}")
    for name, values in {"without replay": plain, "with replay": replayed}.items():
        print(f"{name:>16}{values['train/loss']:>16.3f}{values['forgetting/own']:>+14.3f}")


if __name__ == "__main__":
    main()
