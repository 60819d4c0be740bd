"""Measure the memory that replay takes: of its loss, and of whole fits with each reference.

    OMP_NUM_THREADS=2 python examples/benchmarks/memory.py [--only head fit] [--json memory.json]

Each measurement is a process of its own, on Llamas of random weights in 32 bits.

``head``: the KL divergence of a model 768 wide with 4 layers and a tied head from a frozen copy of itself, on 4 rows of
512 tokens, forward and backward, with whole logits and with the output head in the loss, at vocabularies of 32,000 and
128,256. Memory is the peak of the resident memory during the loss, above that of the process when model, copy and rows
are there; the gradients of the weights are part of it. A second table has the loss alone, of given hidden states, at
128 to 4,096 positions.

``fit``: steps of a fit with AdamW, a model 768 wide with 12 layers, 8 new and 2 replay rows of 128 tokens, over those
of the same fit without replay. Memory is the peak above that of the process before the model is made. So that it is
memory in use, glibc is told to give large blocks back when they are freed (`MALLOC_MMAP_THRESHOLD_`).

``--quick`` measures small models, to see that it runs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from replay_cost import llama
from torch.utils.data import DataLoader

from lightning_replay import Cached, CausalLM, Copy, SelfGeneratedReplay, forward_kl, linear_divergence
from lightning_replay.linear_losses import divergence_of_heads
from lightning_replay.models.head import OutputHeads
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.models import FrozenCopy

WAYS = ("whole", "chunks")
FITS: dict[str, tuple[bool, Any]] = {
    "no replay": (False, None),
    "cached": (False, Cached()),
    "frozen copy": (False, Copy()),
    "int8 copy": (False, Copy(quantize="int8")),
    "LoRA, no replay": (True, None),
    "LoRA": (True, "adapter"),
}
"""Whether only LoRA's matrices train, and the reference; None for no replay."""
FIT_SIZES = {"width": 768, "layers": 12, "rows": 8, "length": 128}


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
    module = llama(width, 4, width // 64, vocabulary, tied=True)
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


def of_fit(arm: str, vocabulary: int, width: int, layers: int, rows: int, length: int, steps: int) -> dict[str, float]:
    """A fit, from making the model to its last step."""
    torch.manual_seed(0)
    lora, reference = FITS[arm]
    tokens: Any = torch.randint(3, vocabulary, (rows, length))
    batches: Any = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}] * steps

    def step() -> None:
        module: Any = llama(width, layers, width // 64, vocabulary)
        if lora:
            module = get_peft_model(module, LoraConfig(target_modules=["q_proj", "v_proj"], r=8))
        trainer = L.Trainer(
            max_steps=steps,
            callbacks=[] if reference is None else [SelfGeneratedReplay(reference=reference, replay_fraction=0.2)],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(CausalLM(module, 1e-4, schedule="constant"), DataLoader(batches, batch_size=None))

    return measured(step, repeats=1)


def in_a_process(function: str, **arguments: Any) -> dict[str, Any]:
    """The result of a function of this file in a process of its own."""
    call = [sys.executable, __file__, "--one", json.dumps([function, arguments])]
    gives_back = {"MALLOC_MMAP_THRESHOLD_": str(2**18)} if function == "of_fit" else {}
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=os.environ | gives_back)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return arguments | result


def tables(found: dict[str, list[dict[str, Any]]]) -> str:
    """All figures in Markdown."""
    lines: list[str] = []
    if "model" in found:
        lines += ["| forward and backward at a vocabulary of | whole, GiB | chunks, GiB | time, chunks / whole |"]
        lines += ["|---|---|---|---|"]
        for whole, chunks in zip(found["model"][::2], found["model"][1::2], strict=True):
            ratio = chunks["seconds"] / whole["seconds"]
            lines.append(f"| {whole['vocabulary']:,} | {whole['gib']:.2f} | {chunks['gib']:.2f} | {ratio:.2f} |")
        lines += ["", "| the loss alone, positions | whole, GiB | chunks, GiB |", "|---|---|---|"]
        for whole, chunks in zip(found["loss"][::2], found["loss"][1::2], strict=True):
            lines.append(f"| {whole['positions']:,} | {whole['gib']:.2f} | {chunks['gib']:.2f} |")
        lines.append("")
    if "fit" in found:
        lines += ["| fit at a vocabulary of | reference | GiB | / without replay |", "|---|---|---|---|"]
        for one in found["fit"]:
            plain = "LoRA, no replay" if one["arm"].startswith("LoRA") else "no replay"
            (base,) = (
                other["gib"]
                for other in found["fit"]
                if (other["arm"], other["vocabulary"]) == (plain, one["vocabulary"])
            )
            lines.append(f"| {one['vocabulary']:,} | {one['arm']} | {one['gib']:.2f} | {one['gib'] / base:.3f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for, print the tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=("head", "fit"), default=["head", "fit"], help="what to measure")
    parser.add_argument(
        "--json", type=Path, default=Path("memory.json"), help="file for the figures; others in it stay"
    )
    parser.add_argument("--markdown", type=Path, help="file for the tables; by default beside the JSON")
    parser.add_argument("--quick", action="store_true", help="small models, to see that it runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        function, arguments = json.loads(options.one)
        print(json.dumps(globals()[function](**arguments)))
        return
    quick = options.quick
    vocabularies, rows, length, width = ((512,), 2, 16, 64) if quick else ((32000, 128256), 4, 512, 768)
    positions = (16, 64) if quick else (128, 512, 2048, 4096)
    found: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    if "head" in options.only:
        found["model"] = [
            in_a_process("of_model", way=way, vocabulary=size, rows=rows, length=length, width=width, repeats=3)
            for size in vocabularies
            for way in WAYS
        ]
        found["loss"] = [
            in_a_process("of_loss", way=way, vocabulary=vocabularies[-1], positions=number, width=width)
            for number in positions
            for way in WAYS
        ]
    if "fit" in options.only:
        sizes = {"width": 64, "layers": 2, "rows": 8, "length": 16} if quick else FIT_SIZES
        found["fit"] = [
            in_a_process("of_fit", arm=arm, vocabulary=size, steps=3, **sizes) for size in vocabularies for arm in FITS
        ]
    print(tables(found))
    options.json.write_text(json.dumps(found, indent=1))
    (options.markdown or options.json.with_suffix(".md")).write_text(tables(found))


if __name__ == "__main__":
    main()
