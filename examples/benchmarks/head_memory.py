"""Measure the memory and time of a replay loss, with whole logits and with the output head in the loss.

    OMP_NUM_THREADS=2 python examples/benchmarks/head_memory.py [--json head_memory.json] [--markdown head_memory.md]

The KL divergence of a Llama of random weights (768 wide, 4 layers, tied head, 32 bits) from a frozen copy of itself, on
4 rows of 512 tokens, forward and backward, at vocabularies of 32,000 and 128,256. Each measurement is a process of its
own. Memory is the peak of the resident memory during the loss, above that of the process when model, copy and rows are
there; the gradients of the weights are part of it. A second table has the loss alone, of given hidden states, at 128 to
4,096 positions. --quick measures small models, to see that it runs.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_replay import forward_kl, linear_divergence
from lightning_replay.linear_losses import divergence_of_heads
from lightning_replay.models.head import OutputHeads
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.models import FrozenCopy

WAYS = ("whole", "chunks")


def resident(peak: bool) -> int:
    """This process's resident memory in bytes, now or at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    name = "VmHWM:" if peak else "VmRSS:"
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def measured(step: Any, repeats: int) -> dict[str, float]:
    """Peak memory of the first step above that before it, and the least seconds of all."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, seconds = resident(peak=False), []
    for index in range(repeats):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
        if index == 0:
            peak = resident(peak=True) - before
    return {"gib": peak / 2**30, "seconds": min(seconds)}


def of_model(way: str, vocabulary: int, rows: int, length: int, width: int, repeats: int) -> dict[str, float]:
    """The KL of a model's rows, from tokens to the gradients of all weights."""
    torch.manual_seed(0)
    module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 64 * 64,
            num_hidden_layers=4,
            num_attention_heads=width // 64,
            max_position_embeddings=length,
            tie_word_embeddings=True,
        )
    )
    model = LanguageModel(module, vocabulary, length, has_cache=True)
    reference, heads = FrozenCopy(model), OutputHeads()
    tokens = torch.randint(vocabulary, (rows, length))
    if way == "chunks":
        heads.of(model)
        with reference.active() as active:
            heads.of(active)

    def whole() -> Any:
        with reference.active() as active:
            before = active.logits(tokens)
        return forward_kl(model.logits(tokens), before)

    def chunks() -> Any:
        with reference.active() as active:
            kept = heads.run(active, lambda asked: asked.logits(tokens), lambda given: given.kept(copy=False))
        assert kept is not None
        return heads.run(
            model,
            lambda asked: asked.logits(tokens),
            lambda given: divergence_of_heads(*given, *kept, None, "forward", 1.0),
        )

    def step() -> None:
        module.zero_grad()
        loss: torch.Tensor = (whole if way == "whole" else chunks)()
        loss.backward()  # type: ignore[no-untyped-call]

    return measured(step, repeats)


def of_loss(way: str, vocabulary: int, positions: int, width: int) -> dict[str, float]:
    """The KL of given hidden states and a head whose weight is not trained."""
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, width) / width**0.5
    hidden, reference = torch.randn(1, positions, width, requires_grad=True), torch.randn(1, positions, width)

    def step() -> None:
        if way == "whole":
            forward_kl(hidden @ weight.t(), reference @ weight.t()).backward()  # type: ignore[no-untyped-call]
        else:
            linear_divergence(hidden, weight, reference, weight).backward()  # type: ignore[no-untyped-call]

    return measured(step, repeats=1)


def in_a_process(function: str, **arguments: Any) -> dict[str, Any]:
    """The result of a function of this file in a process of its own."""
    call = [sys.executable, __file__, "--one", json.dumps([function, arguments])]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return arguments | result


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """All figures in Markdown."""
    lines = [
        "| forward and backward at a vocabulary of | whole, GiB | chunks, GiB | time, chunks / whole |",
        "|---|---|---|---|",
    ]
    for whole, chunks in zip(found["model"][::2], found["model"][1::2], strict=True):
        ratio = chunks["seconds"] / whole["seconds"]
        lines.append(f"| {whole['vocabulary']:,} | {whole['gib']:.2f} | {chunks['gib']:.2f} | {ratio:.2f} |")
    lines += ["", "| the loss alone, positions | whole, GiB | chunks, GiB |", "|---|---|---|"]
    for whole, chunks in zip(found["loss"][::2], found["loss"][1::2], strict=True):
        lines.append(f"| {whole['positions']:,} | {whole['gib']:.2f} | {chunks['gib']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("head_memory.json"), help="file for the figures")
    parser.add_argument("--markdown", type=Path, help="file for the tables; by default beside the JSON")
    parser.add_argument("--quick", action="store_true", help="small models, to see that it runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        function, arguments = json.loads(options.one)
        print(json.dumps(globals()[function](**arguments)))
        return
    vocabularies, rows, length, width = ((512,), 2, 16, 64) if options.quick else ((32000, 128256), 4, 512, 768)
    positions = (16, 64) if options.quick else (128, 512, 2048, 4096)
    found = {
        "model": [
            in_a_process("of_model", way=way, vocabulary=size, rows=rows, length=length, width=width, repeats=3)
            for size in vocabularies
            for way in WAYS
        ],
        "loss": [
            in_a_process("of_loss", way=way, vocabulary=vocabularies[-1], positions=number, width=width)
            for number in positions
            for way in WAYS
        ],
    }
    print(table(found))
    options.json.write_text(json.dumps(found, indent=1))
    (options.markdown or options.json.with_suffix(".md")).write_text(table(found))


if __name__ == "__main__":
    main()
