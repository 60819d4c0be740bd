"""A task for lm-evaluation-harness made of a text: which of four texts goes on after the first half of a line."""

import json
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

NAME = "second_half"
CHOICES = 4


def cut_lines(file: str | Path, count: int, least: int, most: int) -> list[str]:
    """The first different lines of a text that have enough words, each cut to so many at most."""
    lines = (line.split() for line in dict.fromkeys(Path(file).read_text(encoding="utf-8").splitlines()))
    long = (words[:most] for words in lines if len(words) >= least)
    return [" ".join(words) for words in islice(long, count)]


def write_task(lines: Sequence[str], folder: Path) -> None:
    """Write the task's file and its documents, as the harness reads them from ``include_path``.

    The choices are a line's second half and those of three other lines.
    """
    halves = [halved(line.split()) for line in lines]
    begins, ends = [begin for begin, _ in halves], [end for _, end in halves]
    draw = random.Random(0)
    rows = []
    for begin, end in zip(begins, ends, strict=True):
        others = draw.sample([other for other in dict.fromkeys(ends) if other != end], CHOICES - 1)
        rows.append({"begin": begin, "ends": [end, *others]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{begin}}",
        "doc_to_choice": "ends",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{NAME}.yaml").write_text(json.dumps(task))  # JSON is YAML


def halved(words: list[str]) -> tuple[str, str]:
    """The two halves of some words."""
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])
