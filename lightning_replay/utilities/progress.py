"""Progress of long work: a bar at a terminal, a line every now and then elsewhere; and an end when one is asked for."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tqdm.auto import tqdm

__all__ = ["ProgressLines", "heed_sigterm", "refill_bar"]

DELAY = 2.0
"""Seconds after which the bar appears."""
EVERY = 15.0
"""Seconds between two lines of progress."""

_DESCRIPTION = "Sampling replay rows"


class ProgressLines:
    """Prints a line every ``EVERY`` seconds, unless to a terminal, which has a bar instead.

    Args:
        stream: Where the bar is drawn, and the lines are printed, such as ``sys.stdout``.

    Example:
        >>> import sys
        >>> lines = ProgressLines(sys.stdout)
        >>> for step in range(3):  # too quick for a line
        ...     lines(lambda: f"step {step}")
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._next = time.monotonic() + EVERY

    def __call__(self, line: Callable[[], str], due: bool = False) -> None:
        """Print a line if it is time for one.

        Args:
            line: Returns the line.
            due: Whether it is time for it anyway.
        """
        now = time.monotonic()
        if (due or now >= self._next) and not self._stream.isatty():
            self._next = now + EVERY
            print(line(), file=self._stream, flush=True)


def heed_sigterm(trainer: pl.Trainer) -> None:
    """End the run if a ``SIGTERM`` has arrived, as Lightning does between batches.

    A scheduler sends it ahead of the end of a job. Call this in work of our own that takes longer than a batch.

    Raises:
        SIGTERMException: If one has arrived.
    """
    if trainer.received_sigterm:
        raise SIGTERMException


@contextmanager
def refill_bar(trainer: pl.Trainer, tokens: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar for refills of more than ``DELAY`` seconds, if the Trainer shows progress bars.

    Under ``RichProgressBar`` it is a task of that bar's display, since rich draws one live display at a time. Otherwise
    it is a tqdm bar.

    Args:
        trainer: The Trainer.
        tokens: The number of tokens to sample.

    Yields:
        A function to call with the number of tokens sampled since the last call. It ends the run if a ``SIGTERM`` has
        arrived.
    """
    theirs = trainer.progress_bar_callback
    if isinstance(theirs, RichProgressBar) and theirs.is_enabled and theirs.progress is not None:
        display, started = theirs.progress, time.perf_counter()
        task = display.add_task(_DESCRIPTION, total=tokens, visible=False)

        def advance(sampled: int) -> None:
            heed_sigterm(trainer)
            display.update(task, advance=sampled, visible=time.perf_counter() - started > DELAY)
            theirs.refresh()

        try:
            yield advance
        finally:
            display.remove_task(task)
        return
    hidden = theirs is None or not trainer.is_global_zero
    with tqdm(
        total=tokens, desc=_DESCRIPTION, unit=" tokens", unit_scale=True, delay=DELAY, leave=False, disable=hidden
    ) as bar:

        def update(sampled: int) -> None:
            heed_sigterm(trainer)
            bar.update(sampled)

        yield update
