"""A real instruction-tuned model finetuned: what it forgets, with and without replay.

    pip install 'lightning-replay[lm-eval,peft]'
    python examples/instruct.py --quick
    python examples/instruct.py --model DIR_OR_HUB_NAME --new problems.jsonl --known stories=stories.txt \
        --known plays=plays.txt --other spanish.txt --output runs/instruct

New data are lines {"question": ..., "answer": ...}, as GSM8K has them, with the loss on the answers; or a text, a
document a line. The arms are plain finetuning, LoRA at ten times the rate, replay of chats that the model samples
itself, and replay of text of another kind. A run that is done is not repeated, so the command can be stopped at any
time.

Measured before and after: the loss on held-out new data and the share of held-out problems solved; forgetting on the
model's own chats and on each known text; the share of twenty instructions that are followed, such as "answer in JSON";
and a benchmark, which of four halves of lines continues a line of the first known text. Writes `instruct.csv` and
prints a table. Takes a minute with --quick; 135 million parameters on two cores take half an hour an arm.
"""

import argparse
import csv
import json
import multiprocessing
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import starmap
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import torch
from harness_task import NAME, cut_lines, write_task
from quick import LENGTH, quick_folder

from lightning_replay import (
    BenchmarkMonitor,
    CausalLM,
    ChatDataModule,
    ForgettingBudget,
    ForgettingMonitor,
    LanguageModel,
    ReplayDataModule,
    Sampling,
    SelfGeneratedReplay,
    TextDataModule,
)
from lightning_replay.utilities.io import atomic_write
from lightning_replay.utilities.tables import markdown

CHAT = Sampling(prompts="chat")
ANSWERED = 100
"""Questions that are answered at a time."""
PACKAGES = ("lightning-replay", "torch", "lightning", "transformers")


@dataclass(frozen=True)
class Arm:
    """A way to finetune.

    Attributes:
        replay: Arguments of ``SelfGeneratedReplay``; None for no replay.
        from_other: Whether the replay rows are text of another kind, and not chats of the model's own.
        module: Arguments of ``CausalLM``.
        rate: What the learning rate is multiplied with.
    """

    replay: Mapping[str, Any] | None = None
    from_other: bool = False
    module: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 1.0


ARMS = {
    "plain": Arm(),
    "LoRA": Arm(
        module={"adapter": {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}}, rate=10.0
    ),
    "own chats, KL × 1": Arm({"coefficient": 1.0}),
    "own chats, KL × 10": Arm({"coefficient": 10.0}),
    "own chats, budget of 0.05": Arm({"coefficient": ForgettingBudget(0.05)}),
    "own chats, next-token × 1": Arm({"loss": "ntp", "coefficient": 1.0}),
    "other text, KL × 10": Arm({"coefficient": 10.0}, from_other=True),
    "other text, next-token × 1": Arm({"loss": "ntp", "coefficient": 1.0}, from_other=True),
}


def lines_of(answer: str) -> list[str]:
    """The lines that are not empty."""
    return [line.strip() for line in answer.splitlines() if line.strip()]


def has_keys(answer: str, *keys: str) -> bool:
    """Whether an answer is a JSON object with these keys."""
    try:
        found = json.loads(answer)
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() == set(keys)


INSTRUCTIONS: dict[str, Callable[[str], bool]] = {
    "What is the capital of France? Answer with one word.": lambda a: len(a.split()) == 1,
    "How many days are in a week? Answer with a number in digits only.": lambda a: a.strip(" .") == "7",
    "Is fire cold? Answer with yes or no only.": lambda a: a.lower().strip(" .!") in ("yes", "no"),
    "Name three fruits, one on each line, and nothing else.": lambda a: len(lines_of(a)) == 3,
    "Name two colors as a list. Begin each line with a hyphen.": lambda a: (
        len(lines_of(a)) == 2 and all(line.startswith("-") for line in lines_of(a))
    ),
    "Name two animals as a numbered list, such as 1. and 2.": lambda a: (
        [line[:2] for line in lines_of(a)] == ["1.", "2."]
    ),
    'Write a JSON object with the keys "name" and "age" for Anna, who is 30. Write nothing else.': lambda a: has_keys(
        a, "name", "age"
    ),
    "Write one sentence about dogs without the letter e.": lambda a: bool(a.strip()) and "e" not in a.lower(),
    "Say that it is raining. Use capital letters only.": lambda a: a.isupper(),
    "Say that it is raining. Use lower-case letters only.": lambda a: a.islower(),
    "Write exactly five words about the sea.": lambda a: len(a.split()) == 5,
    "What is rain? Use ten words at most.": lambda a: 0 < len(a.split()) <= 10,
    "Is the sky blue? Begin your answer with the word Yes.": lambda a: a.strip().startswith("Yes"),
    "Ask me what my name is. End with a question mark.": lambda a: a.strip().endswith("?"),
    "Say hello in Spanish.": lambda a: "hola" in a.lower(),
    "Say thank you in French.": lambda a: "merci" in a.lower(),
    "Repeat this sentence and say nothing else: The cat sat on the mat.": lambda a: (
        a.strip(' "') == "The cat sat on the mat."
    ),
    "Put a title for a story about a bear in square brackets. Write nothing else.": lambda a: bool(
        re.fullmatch(r"\[[^\[\]]+\]", a.strip())
    ),
    "Write the first five letters of the alphabet, separated by commas.": lambda a: (
        re.sub(r"\s", "", a).strip(".").lower() == "a,b,c,d,e"
    ),
    'Write one sentence about the moon in double quotes ("). Write nothing else.': lambda a: bool(
        re.fullmatch(r'"[^"]+"', a.strip())
    ),
}
"""Instructions whose answers a program can check, each with its check."""


def answers(model: LanguageModel, tokenizer: Any, questions: list[str], new_tokens: int) -> list[str]:
    """The model's likeliest answers to questions, each the beginning of a chat."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    network: Any = model.module
    found: list[str] = []
    for first in range(0, len(prompts), ANSWERED):
        batch = tokenizer(
            prompts[first : first + ANSWERED],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        with torch.no_grad():
            rows = network.generate(**batch.to(model.device), do_sample=False, max_new_tokens=new_tokens)
        found += tokenizer.batch_decode(rows[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def followed(model: LanguageModel, tokenizer: Any) -> dict[str, float]:
    """The share of instructions that are followed, and its standard error."""
    given = answers(model, tokenizer, list(INSTRUCTIONS), 48)
    hits = [check(answer) for check, answer in zip(INSTRUCTIONS.values(), given, strict=True)]
    return share(hits)


def share(hits: list[bool]) -> dict[str, float]:
    """How many of some are true, with the standard error of that share."""
    rate = mean(hits)
    return {"share": rate, "share_stderr": (rate * (1 - rate) / max(1, len(hits) - 1)) ** 0.5}


def solves(problems: list[dict[str, str]], new_tokens: int) -> Callable[[LanguageModel, Any], dict[str, float]]:
    """A probe: the share of problems whose last number is that of the answer."""

    def last_number(text: str) -> str | None:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        return numbers[-1].replace(",", "") if numbers else None

    def solved(model: LanguageModel, tokenizer: Any) -> dict[str, float]:
        given = answers(model, tokenizer, [problem["question"] for problem in problems], new_tokens)
        wanted = [last_number(problem["answer"]) for problem in problems]
        pairs = zip(map(last_number, given), wanted, strict=True)
        return share([number is not None and number == right for number, right in pairs])

    return solved


def problems_of(file: Path) -> list[dict[str, str]]:
    """Questions and answers of a file of problems, or of one of chats with one question each."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        read = json.loads(line)
        if "messages" in read:
            said = {message["role"]: message["content"] for message in read["messages"]}
            read = {"question": said["user"], "answer": said["assistant"]}
        found.append({"question": read["question"], "answer": read["answer"]})
    return found


def write_chats(problems: list[dict[str, str]], file: Path) -> Path:
    """Problems as chats."""
    chats = [
        [{"role": "user", "content": one["question"]}, {"role": "assistant", "content": one["answer"]}]
        for one in problems
    ]
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats), encoding="utf-8")
    return file


def finetune(options: argparse.Namespace, name: str, seed: int, folder: Path) -> dict[str, float]:
    """Do a run, and return what was measured: ``<key> before`` and ``<key>`` after.

    Args:
        options: The options of the command line.
        name: Of the arm.
        seed: Of the run.
        folder: For files that are not needed after the run.
    """
    arm = ARMS[name]

    def text(file: str | Path) -> TextDataModule:
        return TextDataModule(
            file, options.model, options.length, batch_size=options.rows, document_separator="\n", max_documents=4000
        )

    def chats(some: list[dict[str, str]], file: str, validation: float) -> ChatDataModule:
        path = write_chats(some, folder / file)
        return ChatDataModule(path, options.model, options.length, options.rows, validation_fraction=validation)

    L.seed_everything(seed, verbose=False)
    new: TextDataModule | ChatDataModule
    probes: dict[str, Callable[[LanguageModel, Any], dict[str, float]]] = {"instructions": followed}
    if options.new.suffix == ".jsonl":
        problems = problems_of(options.new)
        held_out = problems[: max(options.held_out * 2, options.problems)]
        new = chats(problems[len(held_out) :], "learned.jsonl", 0.0)
        measured: TextDataModule | ChatDataModule = chats(held_out, "held_out.jsonl", 0.5)
        probes["solved"] = solves(held_out[: options.problems], options.length // 2)
    else:
        new, measured = text(options.new), text(options.new)
    known = {
        title: chats(problems_of(Path(file))[: 2 * options.held_out], f"{title}.jsonl", 0.5)
        if file.endswith(".jsonl")
        else text(file)
        for title, _, file in (each.partition("=") for each in options.known)
    }
    forgetting = ForgettingMonitor(
        {"new": measured, **known},
        every_n_steps=0,
        max_batches=max(1, options.held_out // options.rows),
        self_rows=options.held_out // 2,
        sampling=CHAT,
        sequence_length=options.length,
    )
    write_task(cut_lines(options.known[0].partition("=")[2], options.lines, least=12, most=40), folder)
    benchmarks = BenchmarkMonitor(
        [NAME], probes, every_n_steps=0, include_path=folder, tokenizer=new.tokenizer, batch_size=16
    )
    callbacks: list[L.Callback] = [forgetting, benchmarks]
    data = ReplayDataModule(new, 0.0)
    if arm.replay is not None:
        sampling: dict[str, Any] = {} if arm.from_other else {"sampling": CHAT}
        callbacks.insert(0, SelfGeneratedReplay(**arm.replay, **sampling, sequence_length=options.length))
        real: dict[str, Any] = {}
        if arm.from_other:
            other = text(options.other)
            other.setup("fit")
            real = {"prior": other.train_dataloader(), "prior_share": 1.0}
        data = ReplayDataModule(new, options.replay_fraction, **real)
    before = Before()
    trainer = L.Trainer(
        accelerator=options.device,
        devices=1,
        precision=options.precision,
        max_steps=options.steps,
        limit_val_batches=0,
        callbacks=[*callbacks, before],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=options.workers == 1,
    )
    rate = options.learning_rate * arm.rate
    trainer.fit(CausalLM(options.model, rate, schedule="constant", **arm.module), datamodule=data)
    after = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {f"{key} before": value for key, value in before.figures.items()} | after


def done(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """A run's line of the CSV file; the run is done if it has not been."""
    file = options.output / "runs" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{seed}.json"
    if not file.exists():
        with tempfile.TemporaryDirectory() as folder:
            figures: dict[str, Any] = finetune(options, name, seed, Path(folder))
        figures["versions"] = " ".join([*(f"{package} {version(package)}" for package in PACKAGES), str(date.today())])
        file.parent.mkdir(exist_ok=True)
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(figures, indent=1))
    figures = json.loads(file.read_text())
    return {"new": options.new.stem, "arm": name, "seed": seed, **figures}


class Before(L.Callback):
    """Keeps what the monitors measured before the first step."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Callbacks before this one have measured."""
        self.figures = {key: float(value) for key, value in trainer.callback_metrics.items()}


def main() -> None:
    """Do the runs that are missing, and print the table of all."""
    options = options_of_the_command_line()
    if options.csv is None:
        runs = [(options, name, seed) for seed in options.seeds for name in options.arms]
        with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(done, *zip(*runs, strict=True))) if options.workers > 1 else list(starmap(done, runs))
        with (options.output / "instruct.csv").open("w", newline="", encoding="utf-8") as file:
            names = list(dict.fromkeys(key for row in rows for key in row))
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    for file in options.csv or [options.output / "instruct.csv"]:
        with file.open(newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
        print(f"Finetuned on {rows[0]['new']}:\n\n{table(rows)}\n")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """The lines of a CSV file as a table in Markdown: means over seeds, and half the distance of the extremes."""
    prior = [name for name in rows[0] if name.startswith("forgetting/") and not name.endswith(" before")]
    known = [name for name in prior if name not in ("forgetting/new", "forgetting/self", "forgetting/seconds")]
    columns = {
        "new-task loss": "prior_loss/new",
        "problems solved": "benchmark/solved/share",
        "forgetting/self": "forgetting/self",
        **{f"forgetting, {name.partition('/')[2]}": name for name in known},
        **{f"KL, {name.partition('/')[2]}": name.replace("forgetting", "prior_kl") for name in known[:1]},
        "instructions followed": "benchmark/instructions/share",
        "lines continued": f"benchmark/{NAME}/acc",
    }
    columns = {title: name for title, name in columns.items() if rows[0].get(name)}

    def cells(some: Sequence[Mapping[str, str]], suffix: str = "") -> list[str]:
        figures = [[float(row.get(name + suffix) or 0) for row in some] for name in columns.values()]
        return [f"{mean(each):.3f}" + f" ± {(max(each) - min(each)) / 2:.3f}" * (len(some) > 1) for each in figures]

    lines = [["before", "", *cells(rows[:1], " before")]]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        seeds = [row for row in rows if row["arm"] == arm]
        lines.append([arm, str(len(seeds)), *cells(seeds)])
    return markdown(["arm", "seeds", *columns], lines)


def options_of_the_command_line() -> argparse.Namespace:
    """What to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or local folder of an instruction-tuned model")
    parser.add_argument(
        "--new", type=Path, help="to finetune on: problems, JSON Lines with question and answer, or a text"
    )
    parser.add_argument("--other", help="text of another kind to replay: a local file, a document a line")
    parser.add_argument(
        "--known", action="append", default=[], metavar="NAME=FILE", help="text or problems to watch; the first a text"
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--rows", type=int, default=8, help="new rows in a batch")
    parser.add_argument("--length", type=int, default=192, help="tokens in a row at most")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--replay-fraction", type=float, default=0.2)
    parser.add_argument("--held-out", type=int, default=64, help="rows to measure on, of each text")
    parser.add_argument("--problems", type=int, default=20, help="held-out problems to solve")
    parser.add_argument("--lines", type=int, default=100, help="documents of the benchmark")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--csv", type=Path, nargs="+", help="do no runs, and print the tables of these files")
    parser.add_argument("--device", default="cpu", help="Lightning's accelerator: cpu, cuda, auto")
    parser.add_argument("--precision", default="32-true", help="Lightning's precision")
    parser.add_argument("--output", type=Path, default=Path("runs/instruct"), help="folder for all files")
    parser.add_argument("--quick", action="store_true", help="a tiny model and texts, no download")
    options = parser.parse_args()
    if options.quick:
        folder = quick_folder()
        options.model, options.new, options.other = str(folder / "model"), folder / "new.jsonl", folder / "third.txt"
        options.known = [f"counts={folder / 'prior.txt'}"]
        options.length, options.learning_rate, options.steps, options.problems = LENGTH, 3e-3, 40, 4
    elif options.csv is None and not (options.model and options.new and options.other and options.known):
        parser.error("--model, --new, --known and --other are needed without --quick")
    options.output.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
