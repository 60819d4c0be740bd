"""Tasks of lm-evaluation-harness in files, made on the fly, and a tokenizer for them."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.helpers.modules import VOCABULARY

TASKS = ["choice", "last", "text", "count"]
CHAT = (
    "<s> {% for m in messages %}{{ '3' if m.role == 'user' else '4' }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}4 {% endif %}"
)
"""A chat template that begins with the start token, as most do."""


def number_tokenizer(
    adds_start: bool = False, template: str | None = None, adds_end: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of whole numbers, whose ids they are.

    Args:
        adds_start: Whether it puts the start token before each text by itself.
        template: Its chat template.
        adds_end: Whether it puts the end token after each text, too.
    """
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {str(number): number for number in range(3, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_start:
        single = "<s> $A </s>" if adds_end else "<s> $A"
        words.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def write_tasks(folder: Path, documents: int = 24) -> Path:
    """One task of each kind of request: on rows that count upwards, each as long as chance has it.

    ``choice``: the next number, one of three continuations. ``last``: the last number's probability. ``text``:
    perplexity of a text, which may be longer than the context. ``count``: the next numbers, generated. The first two
    are the group ``next``, too.
    """
    draw = random.Random(0)
    rows = []
    for _ in range(documents):
        start, length = draw.randrange(3, VOCABULARY), draw.randrange(2, 12)
        counted = [str(3 + (start + place) % (VOCABULARY - 3)) for place in range(length + 3)]
        wrong = [str(draw.randrange(3, VOCABULARY)), f"{draw.randrange(3, VOCABULARY)} {draw.randrange(3, VOCABULARY)}"]
        long = [str(draw.randrange(3, VOCABULARY)) for _ in range(draw.randrange(1, 80))]
        rows.append(
            {
                "before": " ".join(counted[:length]),
                "next": counted[length],
                "answer": " ".join(counted[length:]),
                "choices": [counted[length], *wrong],
                "text": " ".join(long),
            }
        )
    write_task(folder, "choice", rows, "multiple_choice", ["acc", "acc_norm"], choices="choices", target=0)
    write_task(folder, "last", rows, "loglikelihood", ["perplexity", "acc"], target=" {{next}}")
    write_task(
        folder,
        "text",
        rows,
        "loglikelihood_rolling",
        ["word_perplexity", "bits_per_byte"],
        before="",
        target="{{text}}",
    )
    generation = {"until": ["17", "</s>"], "max_gen_toks": 5, "do_sample": False}
    write_task(folder, "count", rows, "generate_until", ["exact_match"], target="{{answer}}", generation=generation)
    group = {"group": "next", "task": ["choice", "last"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "next.yaml").write_text(json.dumps(group))
    return folder


def write_task(
    folder: Path,
    name: str,
    rows: list[dict[str, Any]],
    kind: str,
    metrics: list[str],
    before: str = "{{before}}",
    target: Any = "",
    choices: str | None = None,
    generation: dict[str, Any] | None = None,
) -> None:
    """A task's file and its documents, the first four of which are its examples too."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"test": folder / f"{name}.jsonl", "train": folder / f"{name}-examples.jsonl"}
    for split, chosen in {"test": rows, "train": rows[:4]}.items():
        files[split].write_text("\n".join(json.dumps(row) for row in chosen))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(path) for split, path in files.items()},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "train",
        "output_type": kind,
        "doc_to_text": before,
        "doc_to_target": target,
        "metric_list": [{"metric": metric} for metric in metrics],
    }
    if choices is not None:
        task["doc_to_choice"] = choices
    if generation is not None:
        task["generation_kwargs"] = generation
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # which is YAML too


def numbers(results: Any) -> Iterator[tuple[str, float]]:
    """The figures of the harness's results, by task and metric."""
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            if isinstance(value, float):
                yield f"{task}/{key}", value
