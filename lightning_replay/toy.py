"""Four small algorithmic tasks on pairs of numbers, after the toy experiment of arXiv 2605.26097."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

__all__ = ["END", "TASKS", "VOCABULARY", "answer_positions", "problems", "problems_loader", "row_length", "task_token"]

TASKS = ("add", "reverse", "sort", "modadd")
"""In the order in which they are learned."""

_SEPARATOR, _NULL, _EQUALS, END, _FIRST_TASK = range(10, 15)
VOCABULARY = _FIRST_TASK + len(TASKS)
"""Ten digits, separator, null, equals, end and one token for each task."""


def task_token(task: str) -> int:
    """The token that a task's rows begin with."""
    return _FIRST_TASK + TASKS.index(task)


def row_length(digits: int) -> int:
    """Tokens in a row: task, a, separator, b, equals, answer, end."""
    return 4 * digits + 4


def answer_positions(digits: int) -> slice:
    """Where in a row the answer and its end token stand."""
    return slice(2 * digits + 3, row_length(digits))


def problems(task: str, rows: int, digits: int, generator: torch.Generator) -> Tensor:
    """Random problems with their answers.

    Two numbers a and b of ``digits`` digits; the answer has twice as many tokens, filled up with nulls. ``"add"`` is
    a + b and ``"modadd"`` is a + b without the carry beyond ``digits`` digits, lowest digit first; ``"reverse"`` and
    ``"sort"`` are the digits of both numbers, reversed or in rising order.

    Args:
        task: One of :data:`TASKS`.
        rows: How many.
        digits: Digits in each number.
        generator: The source of randomness.

    Returns:
        Token ids, shape ``(rows, row_length(digits))``.

    Example:
        >>> problems("sort", 1, digits=2, generator=torch.Generator().manual_seed(0))
        tensor([[16,  4,  4, 10,  3,  9, 12,  3,  4,  4,  9, 13]])
    """
    a, b = torch.randint(10**digits, (2, rows), generator=generator)
    a_digits, b_digits = _digits(a, digits), _digits(b, digits)
    both = torch.cat([a_digits, b_digits], 1)
    if task == "add":
        answer = _digits(a + b, digits + 1).flip(1)
    elif task == "modadd":
        answer = _digits((a + b) % 10**digits, digits).flip(1)
    elif task == "reverse":
        answer = both.flip(1)
    elif task == "sort":
        answer = both.sort(1).values
    else:
        raise ValueError(f"`task` is one of {TASKS}; got {task!r}.")
    nulls = torch.full((rows, 2 * digits - answer.shape[1]), _NULL)

    def column(token: int) -> Tensor:
        return torch.full((rows, 1), token)

    parts = (task_token(task), a_digits, _SEPARATOR, b_digits, _EQUALS, answer, nulls, END)
    return torch.cat([column(part) if isinstance(part, int) else part for part in parts], 1)


def problems_loader(task: str, batch_size: int, digits: int, seed: int) -> DataLoader[dict[str, Tensor]]:
    """An endless loader of fresh problems, in batches with ``input_ids`` and ``labels``."""
    return DataLoader(_Problems(task, batch_size, digits, seed), batch_size=None)


class _Problems(IterableDataset[dict[str, Tensor]]):
    def __init__(self, task: str, batch_size: int, digits: int, seed: int) -> None:
        self.task = task
        self.batch_size = batch_size
        self.digits = digits
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            rows = problems(self.task, self.batch_size, self.digits, generator)
            yield {"input_ids": rows, "labels": rows}


def _digits(numbers: Tensor, digits: int) -> Tensor:
    powers = 10 ** torch.arange(digits - 1, -1, -1)
    return numbers.unsqueeze(1) // powers % 10
