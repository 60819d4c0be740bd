"""Rows sampled from a model: when all are used, new ones are sampled, at once or ahead of time."""

import functools
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from threading import Event
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_replay.buffers.buffer import ReplayBuffer
from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.callbacks.reuse_gap import ReuseGap
from lightning_replay.callbacks.row_uses import RowUses
from lightning_replay.callbacks.run_length import rows_of_the_run
from lightning_replay.data.batches import row_length
from lightning_replay.data.feed import RowFeed
from lightning_replay.data.replay import ReplayDataModule
from lightning_replay.data.sources import RowSource
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.cached import cache_reference
from lightning_replay.references.models import FrozenCopy, ReferenceModel
from lightning_replay.sampling.rows import RowGenerator
from lightning_replay.utilities.distributed import LostProcessError
from lightning_replay.utilities.logging import (
    decoded,
    known_ids,
    log_samples,
    log_values,
    next_step,
    undecodable_share,
)
from lightning_replay.utilities.progress import heed_sigterm, refill_bar
from lightning_replay.utilities.seeds import order_seed

__all__ = ["Fit", "SampledRows", "Supply"]

_REFILL_ROWS = 256
"""Rows of a refill with ``"auto"``."""
_CACHED_ROWS, _CACHED_BYTES = 4096, 2**30
"""Rows sampled for a run of unknown length when there can be no refill, and what they may take in memory at most."""
_LOOK_EVERY = 0.5
"""Seconds between two looks for a signal to end, while rows are made ahead."""
_FAILURES = 3
"""How many refills in a row may fail before the run does."""


@dataclass(frozen=True)
class Fit:
    """What a fit's rows depend on.

    Attributes:
        trainer: The Trainer.
        model: The model that trains.
        feed: Draws the rows.
        data: The datamodule, if it is one that mixes.
        tokenizer: Turns samples into text; None if there is none.
        reuse_gap: What the use of rows again has cost so far.
        seed: Seed of all samples and of the order in which they are drawn.
        previews: How many rows of each refill to log as text.
    """

    trainer: pl.Trainer
    model: LanguageModel
    feed: RowFeed
    data: ReplayDataModule | None
    tokenizer: Any
    reuse_gap: ReuseGap
    seed: int
    previews: int


@dataclass(frozen=True)
class Supply:
    """What the rows of a fit are sampled from.

    Attributes:
        fit: The fit.
        source: The model to sample.
        narrowest: The model or the reference, whichever takes the shorter rows.
        lasting: Whether the source is gone as soon as the model trains, so that the rows of one refill have to last.
        trained_by: What has trained the model since the source was taken, if anything has.
    """

    fit: Fit
    source: ReferenceModel
    narrowest: LanguageModel
    lasting: bool
    trained_by: str | None


@dataclass(frozen=True)
class _Made:
    """A refill that is ready: rows, measures of their samples, the generator after it and the time it took."""

    rows: ReplayRows
    quality: dict[str, float]
    generator: RowGenerator
    seconds: float


class SampledRows(RowSource):
    """Samples rows when they are needed.

    A refill reaches the buffer whole or not at all. If one fails, the rows of the one before are used again, a warning
    gives the reason, and the next one is tried when they are used up; after three failures in a row the run ends.

    Args:
        generator: Makes the rows.
        rows: Rows to sample at a time. ``"auto"``: up to 256, in even parts of what the run uses, or all of it if they
            have to last.
        length: Tokens in a row; by default those of a row of the first batch.
        uses: How often each row is used, as ``RowUses`` takes it.
        top_k: How many of the source's log-probabilities to keep with each position of a row; 0 for none.
        temperature: Divides the logits before these log-probabilities are taken.
        background: Whether to sample the next refill in a thread while the model trains.
    """

    def __init__(
        self,
        generator: RowGenerator,
        rows: int | Literal["auto"],
        length: int | None,
        uses: int | Literal["auto"],
        top_k: int,
        temperature: float,
        background: bool,
    ) -> None:
        self.generator = generator
        self.rows = rows
        self.length = length
        self.uses = RowUses(uses)
        self.top_k = top_k
        self.temperature = temperature
        self.background = background
        self.buffer: ReplayBuffer | None = None
        """The rows that are drawn from; made at the first draw unless the user gave one."""
        self._given: ReplayBuffer | None = None
        self._supply: Supply | None = None
        self._failures = 0
        self._worker: ThreadPoolExecutor | None = None
        self._ahead: Future[_Made] | None = None
        self._stop = Event()

    def begin(self, supply: Supply) -> None:
        """Sample for a fit.

        Args:
            supply: What to sample. If the fit's datamodule has a buffer, that is filled.

        Raises:
            MisconfigurationException: If rows are to be made in the background and can't be.
        """
        processes = supply.fit.feed.processes
        if self.background and processes.size > 1:
            raise MisconfigurationException(
                f"`background=True` samples in a thread, and the {processes.size} processes of this run have to "
                "exchange what they sampled. Leave it out: each process samples only its part."
            )
        if self.background and not (type(supply.source) is FrozenCopy and self.generator.sampling.sampler is None):
            raise MisconfigurationException(
                "`background=True` samples a frozen copy of the model in a separate thread. It goes with "
                "`source='reference'`, `reference='copy'` and no `sampler`: another source changes while the model "
                "trains, and a sampler of your own may draw from the global random state. Leave it out."
            )
        self._failures = 0
        self._supply = supply
        self._given = None if supply.fit.data is None else supply.fit.data.buffer
        if self._given is not None:
            self.buffer = self._given

    def end(self) -> None:
        """Give up what is under way; no row of it has reached the buffer."""
        self._stop.set()
        if self._worker is not None:
            self._worker.shutdown(wait=True)
        self._worker = self._ahead = self._supply = None
        self._stop = Event()

    def forget(self) -> None:
        """Begin without rows, as if none had been sampled."""
        self.buffer = None
        self.uses.forget()

    def prepare(self, batch: Any) -> None:
        """Sample rows that have to last before the first step, whichever step draws the first of them."""
        supply = self._supply
        assert supply is not None
        if supply.lasting and not self.buffer:
            self._refill(supply, batch)

    def draw(self, rows: int, batch: Any) -> ReplayRows:
        """Draw rows; if all have been used ``uses`` times, sample new ones."""
        supply = self._supply
        assert supply is not None
        parts: list[ReplayRows] = []
        while rows:
            if self.uses.is_auto and self.buffer and rows > self.buffer.unused:
                self.uses.heed(supply.fit.reuse_gap, supply.fit.feed.processes)
            if not self._left(rows, supply):
                self._refill(supply, batch)
                assert self.buffer is not None
                if not self._left(rows, supply):
                    self.buffer.renew()  # its policy dropped all new rows: those that it keeps are used again
            assert self.buffer is not None
            parts.append(self.buffer.draw(min(rows, self._left(rows, supply))))
            rows -= len(parts[-1].tokens)
        return ReplayRows.cat(parts)

    def measures(self) -> dict[str, float]:
        """What to log of the buffer and of sampling so far."""
        if self.buffer is None:
            return {}
        generator = self.generator
        return {
            "replay/buffer_fill": len(self.buffer) / self.buffer.capacity,
            "replay/sampling_seconds": generator.seconds,
            "replay/rows_sampled": float(generator.rows),
        } | {f"replay/dropped/{name}": float(number) for name, number in generator.dropped.items()}

    @property
    def changed(self) -> dict[str, bool]:
        """Which arguments of ``SelfGeneratedReplay`` that only sampling heeds are not at their defaults."""
        return {
            "refill_rows": self.rows != "auto",
            "uses_per_sample": not self.uses.is_auto,
            "background": self.background,
        }

    def has_filled(self, buffer: ReplayBuffer | None) -> bool:
        """Whether a buffer that the user gave holds rows, some of which were sampled here."""
        return buffer is not None and buffer is self._given and len(buffer) > 0 and self.generator.rows > 0

    def tokens_since(self, rows: int) -> int:
        """Tokens in the rows of this fit, given how many had been sampled before it."""
        return 0 if self.buffer is None else (self.generator.rows - rows) * self.buffer.length

    def state_dict(self) -> dict[str, Any]:
        """The sampled rows. The state of a buffer that the user gave is the datamodule's to keep."""
        own = self.buffer if self._given is None else None
        return {"buffer": None if own is None else own.state_dict(), **self.uses.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the saved rows."""
        self.buffer = None if state["buffer"] is None else ReplayBuffer.from_state_dict(state["buffer"])
        self.uses.load_state_dict(state)

    def _left(self, wanted: int, supply: Supply) -> int:
        """How many of the rows wanted the buffer has to give."""
        if not self.buffer:
            return 0
        return wanted if supply.lasting else self.buffer.left(self.uses.now)

    def _refill(self, supply: Supply, batch: Any) -> None:
        """Put new rows in the place of the used ones."""
        trainer = supply.fit.trainer
        if self.buffer is None:
            self.buffer = self._new_buffer(supply, batch)
        buffer = self.buffer
        rows = buffer.capacity if self._given is None else min(buffer.capacity, self._refill_rows(supply, batch))
        if supply.lasting and supply.trained_by is not None:
            raise MisconfigurationException(
                "`reference='cached'` samples all rows before the first step, and the model that they come from is "
                f"gone: {supply.trained_by} has trained it. Resume from a full checkpoint, keep the callback of the "
                "first fit, or use another reference."
            )
        first = not self.generator.rows
        if first:
            rank_zero_info(f"Replay: sampling {rows} rows of {buffer.length} tokens{self._unasked_chat(supply.fit)}.")
        try:
            made = self._next(supply, rows, buffer)
        except Exception as error:
            self._keep_old_rows(buffer, trainer.global_step, error)
            return
        self._failures = 0
        # Interrupted between the two, a run that continues skips this refill's samples; it never draws them twice.
        self.generator = made.generator
        buffer.add(made.rows, step=trainer.global_step)
        if self.background:
            self._ahead = self._begin_ahead(supply, rows, buffer)
        if first:
            speed = made.rows.tokens.numel() / made.seconds
            rank_zero_info(
                f"Replay: sampled {len(made.rows.tokens)} rows of {buffer.length} tokens in {made.seconds:.1f} s "
                f"({speed:,.0f} tokens/s{self._how(supply.fit.model)})."
            )
        self._log(supply, made)

    def _next(self, supply: Supply, rows: int, buffer: ReplayBuffer) -> _Made:
        """The next refill, which may have been made ahead; time spent waiting for it counts as sampling."""
        if self._ahead is None and self.background and len(buffer):
            # After a resume or a failure: made as it would have been ahead, on one thread, to the last bit.
            self._ahead = self._begin_ahead(supply, rows, buffer)
        if self._ahead is not None:
            started, ahead = time.perf_counter(), self._ahead
            self._ahead = None
            made = _waited_for(ahead, supply.fit.trainer)
            made.generator.seconds = self.generator.seconds + time.perf_counter() - started
            return made
        processes = supply.fit.feed.processes
        tokens = rows * buffer.length // (1 if processes.lockstep else processes.size)
        with isolate_rng(), refill_bar(supply.fit.trainer, tokens) as advance:
            made = self._make(supply, self.generator.fork(), rows, buffer, advance)
        made.generator.seconds += made.seconds
        return made

    def _begin_ahead(self, supply: Supply, rows: int, buffer: ReplayBuffer) -> "Future[_Made]":
        """Let the worker make the next refill, on one thread, so that training keeps the others."""
        threads, stop, generator = torch.get_num_threads(), self._stop, self.generator.fork()

        def advance(tokens: int) -> None:
            if stop.is_set():
                raise CancelledError("The fit ended while rows were made ahead.")

        def make() -> _Made:
            torch.set_num_threads(1)
            try:
                return self._make(supply, generator, rows, buffer, advance)
            finally:
                torch.set_num_threads(threads)

        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="replay-refill")
        return self._worker.submit(make)

    def _make(
        self,
        supply: Supply,
        generator: RowGenerator,
        rows: int,
        buffer: ReplayBuffer,
        advance: Callable[[int], Any],
    ) -> _Made:
        started, processes = time.perf_counter(), supply.fit.feed.processes
        with supply.source.active() as active:
            made, quality = generator.generate(active, rows, buffer.length, supply.fit.seed, advance, processes)
            if buffer.top_k:  # on each rank: one forward a row costs less than sending its results
                between = functools.partial(advance, 0)
                cache = functools.partial(cache_reference, active, made, buffer.top_k, self.temperature, between)
                made = processes.run_on_all_ranks(cache)
        return _Made(made, quality, generator, time.perf_counter() - started)

    def _keep_old_rows(self, buffer: ReplayBuffer, step: int, error: Exception) -> None:
        """Go on with the rows that are there, if there are any and not too many refills have failed."""
        self._failures += 1
        hopeless = isinstance(error, (MemoryError, MisconfigurationException, LostProcessError))
        if hopeless or not len(buffer) or self._failures == _FAILURES:
            rank_zero_warn(
                f"Replay: the refill at step {step} failed (failures in a row: {self._failures}), and the run ends."
            )
            raise error
        buffer.renew()
        rank_zero_warn(
            f"Replay: the refill at step {step} failed with {type(error).__name__}: {error} The {len(buffer)} rows of "
            f"the one before are used again, then another refill is tried (failures in a row: {self._failures}; after "
            f"{_FAILURES} the run ends)."
        )

    def _new_buffer(self, supply: Supply, batch: Any) -> ReplayBuffer:
        processes = supply.fit.feed.processes
        length = self.length or max(length for (length,) in processes.gather_ints(row_length(batch)))
        self.generator.check_length(length, supply.narrowest)
        top_k = min(self.top_k, supply.fit.model.vocabulary)
        rows = self._refill_rows(supply, batch)
        if supply.lasting and self.rows == "auto":
            rows = max(1, min(rows, _CACHED_BYTES // (length * (4 + 6 * top_k))))
        return ReplayBuffer(rows, length, seed=order_seed(supply.fit.seed), top_k=top_k)

    def _refill_rows(self, supply: Supply, batch: Any) -> int:
        """How many rows to sample at a time."""
        used = None
        if self.rows == "auto" or not self.uses.now:
            used = rows_of_the_run(supply.fit.trainer, supply.fit.feed, supply.fit.data, batch)
        self.uses.begin(used)
        if self.rows != "auto":
            return self.rows
        if used is None:
            return _CACHED_ROWS if supply.lasting else _REFILL_ROWS
        needed = math.ceil(used / self.uses.now)
        if supply.lasting:
            return needed
        # In even parts, so that the last refill is not sampled for only a few steps.
        return math.ceil(needed / math.ceil(needed / _REFILL_ROWS))

    def _unasked_chat(self, fit: Fit) -> str:
        """What a user of a chat model may have missed."""
        sampling = self.generator.sampling
        is_asked = sampling.prompts is not None or sampling.sampler is not None
        if is_asked or getattr(fit.tokenizer, "chat_template", None) is None:
            return ""
        return "; the tokenizer has a chat template, and `Sampling(prompts='chat')` samples conversations"

    def _how(self, model: LanguageModel) -> str:
        if model.has_cache or self.generator.sampling.sampler is not None:
            return ""
        return (
            f"; {type(model.module).__name__} has no key-value cache, so each token takes a forward of the whole row "
            "before it"
        )

    def _log(self, supply: Supply, made: _Made) -> None:
        trainer, tokenizer = supply.fit.trainer, supply.fit.tokenizer
        step = next_step(trainer)
        quality, known = dict(made.quality), known_ids(tokenizer)
        if known is not None:
            quality["undecodable"] = undecodable_share(made.rows.tokens, made.rows.lengths, known)
        log_values(trainer, {f"replay/quality/{name}": value for name, value in quality.items()}, step)
        rows = made.rows.take(torch.arange(min(supply.fit.previews, len(made.rows.tokens))))
        samples = [row[:length] for row, length in zip(rows.tokens.tolist(), rows.lengths.tolist(), strict=True)]
        log_samples(trainer, [decoded(sample, tokenizer, known) for sample in samples], step)


def _waited_for(ahead: "Future[_Made]", trainer: pl.Trainer) -> _Made:
    """What the worker makes, once it is ready, unless the run is asked to end."""
    while True:
        try:
            return ahead.result(timeout=_LOOK_EVERY)
        except FutureTimeoutError:
            if ahead.done():  # it was the worker's own
                raise
            heed_sigterm(trainer)
