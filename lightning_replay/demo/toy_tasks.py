"""Four small algorithmic tasks on pairs of numbers, after the toy experiment of arXiv 2605.26097.

Reversal and sorting are the paper's tasks. Its two additions take a tiny model hundreds of thousands of problems to
learn, which is too long for a demo, so two shorter tasks replace them.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

__all__ = [
    "ANSWER",
    "END",
    "ROW_LENGTH",
    "TASKS",
    "VOCABULARY",
    "held_out_problems",
    "problems",
    "problems_loader",
    "task_token",
]

TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse": lambda digits: digits.flip(1),
    "sort": lambda digits: digits.sort(1).values,
    "increment": lambda digits: (digits + 1) % 10,
    "swap": lambda digits: digits.roll(2, 1),
}
"""The function that each task applies to the four digits, in the order in which the tasks are learned."""

_SEPARATOR, _EQUALS, END, _FIRST_TASK = range(10, 14)
VOCABULARY = _FIRST_TASK + len(TASKS)
"""Ten digits, separator, equals, end and one token for each task."""

ROW_LENGTH = 12
"""Tokens in a row: task, two digits, separator, two digits, equals, four digits, end."""

ANSWER = slice(7, ROW_LENGTH)
"""The columns of the answer and its end token."""

_HELD_OUT, _TRAINED_ON = torch.randperm(10_000, generator=torch.Generator().manual_seed(0)).tensor_split([400])
"""The four digits of each question, as a number. No held-out question is trained on, in any task."""


def task_token(task: str) -> int:
    """The first token of a task's rows."""
    return _FIRST_TASK + list(TASKS).index(task)


def problems(task: str, rows: int, generator: torch.Generator) -> Tensor:
    """Random problems to train on with their answers, token ids of shape ``(rows, ROW_LENGTH)``.

    Example:
        >>> problems("sort", 1, generator=torch.Generator().manual_seed(0))
        tensor([[14,  1,  6, 10,  6,  7, 11,  1,  6,  6,  7, 12]])
    """
    return _solved(task, _TRAINED_ON[torch.randint(len(_TRAINED_ON), (rows,), generator=generator)])


def held_out_problems(task: str) -> Tensor:
    """The 400 problems that are never trained on, token ids of shape ``(400, ROW_LENGTH)``."""
    return _solved(task, _HELD_OUT)


def _solved(task: str, questions: Tensor) -> Tensor:
    rows = len(questions)
    digits = questions.unsqueeze(1) // torch.tensor([1000, 100, 10, 1]) % 10
    task_column, separator, equals, end = (
        torch.full((rows, 1), token) for token in (task_token(task), _SEPARATOR, _EQUALS, END)
    )
    return torch.cat([task_column, digits[:, :2], separator, digits[:, 2:], equals, TASKS[task](digits), end], 1)


def problems_loader(task: str, batch_size: int, seed: int) -> DataLoader[dict[str, Tensor]]:
    """An endless loader of fresh problems, in batches with ``input_ids`` and ``labels``."""
    return DataLoader(_Problems(task, batch_size, seed), batch_size=None)


class _Problems(IterableDataset[dict[str, Tensor]]):
    def __init__(self, task: str, batch_size: int, seed: int) -> None:
        self.task = task
        self.batch_size = batch_size
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            rows = problems(self.task, self.batch_size, generator)
            yield {"input_ids": rows, "labels": rows}
