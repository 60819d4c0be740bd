"""Measure how fast one core generates rows, for models of several sizes.

    taskset -c 0 python examples/benchmarks/generate_speed.py [--model FOLDER ...] [--json speed.json]

Random-weight Llamas of 25 and 125 million parameters, and each model given, generate rows of 128 tokens in 32 bits on a
single thread, without and with 64 cached log-probabilities a position. Prints a table: rows and tokens a second, the
operations of sampling that come with them (2 a weight and token), and bytes of a row on disk. Ten minutes; --quick
measures a small one in seconds.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from replay_cost import MODELS
from transformers import AutoModelForCausalLM

from lightning_replay import generate_rows
from lightning_replay.buffers.manifest import Manifest

SIZES = {"25M": "Llama, 25M", "125M": "Llama, 125M"}
"""The models of random weights, by the name of their folder, as `replay_cost.py` names them."""
TINY = {"tiny": "TinyStories-656K"}
ROWS = {"tiny": 16, "25M": 512, "125M": 128}


def saved(name: str, folder: Path) -> Path:
    """A model of random weights in a folder."""
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder)
    return folder


def measure(model: Path, rows: int, length: int, top_k: int) -> dict[str, Any]:
    """Generate some rows on one thread."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    # Weights that are multiplied with for each token: all but the table that tokens are looked up in.
    tied = loaded.config.tie_word_embeddings
    table = 0 if tied else loaded.get_input_embeddings().weight.numel()
    parameters = sum(weight.numel() for weight in loaded.parameters())
    with tempfile.TemporaryDirectory() as folder:
        made = generate_rows(str(model), rows, folder, sequence_length=length, reference_top_k=top_k, threads=1)
        size = sum(shard.bytes for shard in Manifest.read(Path(folder)).shards.values())
    speed = rows / made.seconds
    return {
        "model": model.name,
        "parameters": parameters,
        "top_k": top_k,
        "rows_per_second": speed,
        "tokens_per_second": speed * length,
        "gflops": 2 * (parameters - table) * speed * length / 1e9,
        "bytes_per_row": size / rows,
    }


def main() -> None:
    """Measure each model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="folders of models to measure first")
    parser.add_argument("--rows", type=int, help="rows of each; by default as many as take a minute or so")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--quick", action="store_true", help="a small model alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sizes = TINY if options.quick else SIZES
        models = [*options.model, *(saved(size, Path(name) / folder) for folder, size in sizes.items())]
        found = [
            measure(model, options.rows or ROWS.get(model.name, 2048), 16 if options.quick else 128, top_k)
            for model in models
            for top_k in (0, 64)
        ]
    print("| model | parameters | cached | rows/s | tokens/s | GFLOP/s | bytes a row |")
    print("|---|---|---|---|---|---|---|")
    for one in found:
        print(
            f"| {one['model']} | {one['parameters'] / 1e6:,.1f}M | {one['top_k']} | {one['rows_per_second']:,.1f} "
            f"| {one['tokens_per_second']:,.0f} | {one['gflops']:,.1f} | {one['bytes_per_row']:,.0f} |"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
