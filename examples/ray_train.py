"""Finetune with replay on a Ray cluster: Ray Train starts the workers, Lightning trains in them under Ray's DDP.

Shows that nothing but the Trainer's strategy and plugin changes: the workers share sampling and hold one buffer. Every
machine has to find model and text under the names given.

    pip install 'lightning-replay[ray]'
    python examples/ray_train.py --model roneneldan/TinyStories-33M --new my_notes.txt --workers 2 --output /shared/run
    python examples/ray_train.py --quick

Prints loss and replay loss of the last step, and where the trained model is. With --quick, a model of random weights
learns random rows on two CPUs of this machine: about a minute, most of it for starting Ray.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_replay import CausalLM, ReplayDataModule, SelfGeneratedReplay, TextDataModule


def fit(options: dict[str, Any]) -> None:
    """Train in this process, which may be a worker of Ray Train's; saves the model and the last step's values."""
    L.seed_everything(options["seed"], verbose=False)
    data: Any
    model: Any
    if options["quick"]:
        model, data = tiny_model(), random_rows(options["batch_size"], options["rows"])
    else:
        model = options["model"]
        data = TextDataModule(options["new"], options["model"], batch_size=options["batch_size"])
    module = CausalLM(model, learning_rate=1e-3, schedule="constant")
    how: dict[str, Any] = {"accelerator": "cpu"} if options["quick"] else {}
    if options["workers"]:
        from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

        how |= {"strategy": RayDDPStrategy(), "plugins": [RayLightningEnvironment()], "devices": "auto"}
    trainer = L.Trainer(
        max_steps=options["steps"],
        callbacks=[SelfGeneratedReplay(seed=options["seed"])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **how,
    )
    if options["workers"]:
        from ray.train.lightning import prepare_trainer

        trainer = prepare_trainer(trainer)
    trainer.fit(module, datamodule=ReplayDataModule(data, replay_fraction=0.2))
    if trainer.is_global_zero:
        pretrained: Any = module.model
        pretrained.save_pretrained(options["output"])
        values = {name: float(trainer.callback_metrics[name]) for name in ("train/loss", "replay/loss")}
        (Path(options["output"]) / "values.json").write_text(json.dumps(values))


def fit_on_ray(options: dict[str, Any]) -> None:
    """Train with the number of workers in the options; each has a part of the global batch."""
    import ray.train
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        fit,
        train_loop_config=options | {"batch_size": options["batch_size"] // options["workers"]},
        scaling_config=ray.train.ScalingConfig(num_workers=options["workers"], use_gpu=torch.cuda.is_available()),
        run_config=ray.train.RunConfig(storage_path=str(options["output"] / "ray")),
    )
    trainer.fit()


def tiny_model() -> LlamaForCausalLM:
    """A model of random weights, the same each time."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def random_rows(batch_size: int, rows: int = 256) -> DataLoader[Any]:
    """Batches of random rows."""
    tokens = torch.randint(3, 64, (rows, 32), generator=torch.Generator().manual_seed(1))
    examples: Any = [{"input_ids": row, "labels": row} for row in tokens]
    return DataLoader(examples, batch_size)


def main() -> None:
    """Train on the cluster and print the last step's losses."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="hub name or folder of model and tokenizer")
    parser.add_argument("--new", help="text to finetune on: hub name or file")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="processes that train, with a GPU each if there are any; 0 to train in this one, without Ray",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="new rows in a batch of all workers together")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/ray"), help="folder for the trained model")
    parser.add_argument("--quick", action="store_true", help="a tiny model and random rows, in a folder of its own")
    options = vars(parser.parse_args())
    if options["quick"]:
        # One batch holds all rows, as several workers would have them shuffled: any number of workers trains the same.
        options |= {"steps": 10, "rows": options["batch_size"], "output": Path(tempfile.mkdtemp())}
    elif not options["model"] or not options["new"]:
        parser.error("--model and --new are needed without --quick")
    # Ray's workers have a working directory of their own.
    options["output"] = options["output"].absolute()
    for name in ("model", "new"):
        if options[name] and Path(options[name]).exists():
            options[name] = str(Path(options[name]).absolute())

    if options["workers"]:
        fit_on_ray(options)
    else:
        fit(options)
    values = json.loads((options["output"] / "values.json").read_text())
    print(f"Last step: loss {values['train/loss']:.3f}, replay loss {values['replay/loss']:.4f} nats a token.")
    print(f"The trained model is in {options['output']}.")


if __name__ == "__main__":
    main()
