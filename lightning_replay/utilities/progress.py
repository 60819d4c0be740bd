"""A progress bar for long refills, next to the Trainer's own."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from tqdm.auto import tqdm

__all__ = ["refill_bar"]

DELAY = 2.0
"""Seconds after which the bar appears."""

_DESCRIPTION = "Sampling replay rows"


@contextmanager
def refill_bar(trainer: pl.Trainer, tokens: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar for refills of more than ``DELAY`` seconds, if the Trainer shows progress bars.

    Under ``RichProgressBar`` it is a task of that bar's display, since rich draws one live display at a time. Otherwise
    it is a tqdm bar.

    Args:
        trainer: The Trainer.
        tokens: The number of tokens to sample.

    Yields:
        A function to call with the number of tokens sampled since the last call.
    """
    theirs = trainer.progress_bar_callback
    if isinstance(theirs, RichProgressBar) and theirs.is_enabled and theirs.progress is not None:
        display, started = theirs.progress, time.perf_counter()
        task = display.add_task(_DESCRIPTION, total=tokens, visible=False)

        def advance(sampled: int) -> None:
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
        yield bar.update
