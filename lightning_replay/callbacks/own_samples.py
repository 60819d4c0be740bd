"""Rows that the model itself wrote before it was trained, held out to measure what it forgets."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.callbacks.monitor import replay_of
from lightning_replay.callbacks.self_generated_replay import SelfGeneratedReplay
from lightning_replay.data.batches import row_length
from lightning_replay.data.replay import ReplayDataModule
from lightning_replay.data.targets import IGNORED
from lightning_replay.losses import forward_kl
from lightning_replay.metrics import KLDrift
from lightning_replay.models.language_model import LanguageModel, find_tokenizer
from lightning_replay.references.models import ReferenceModel
from lightning_replay.sampling.rows import RowGenerator
from lightning_replay.sampling.sampling import Sampling
from lightning_replay.utilities.distributed import Processes
from lightning_replay.utilities.progress import refill_bar
from lightning_replay.utilities.seeds import held_out_seed
from lightning_replay.utilities.validation import is_whole

__all__ = ["OwnSamples", "SampleDrift", "own_samples_of"]

_ROWS, _BATCH = 64, 8
"""Rows if nothing else is measured, and how many to measure at a time."""


class OwnSamples:
    """Rows sampled from the model as it was at fit start, never trained on.

    Args:
        rows: How many.
        sampling: How they are sampled; by default as the Trainer's ``SelfGeneratedReplay`` samples.
        length: Tokens in a row; by default those of its rows.

    Attributes:
        held: The rows; None before they are sampled.
    """

    def __init__(self, rows: int, sampling: Sampling | None, length: int | None) -> None:
        self.rows = rows
        self.sampling = sampling
        self.length = length
        self.held: ReplayRows | None = None
        self._rows_in_sample = 1

    def forget(self) -> None:
        """Hold no rows, so that others are sampled."""
        self.held = None

    def sample(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        model: LanguageModel,
        source: ReferenceModel,
        batch: Any,
    ) -> None:
        """Sample the rows; all processes call this.

        Args:
            trainer: The Trainer.
            pl_module: The user's module, which may have a tokenizer.
            model: The model that trains.
            source: The model to sample.
            batch: The first training batch: its rows are as long as those of replay, unless that has a length.

        Raises:
            MisconfigurationException: If no start token is known, the rows don't fit the model, or the rows are of
                fewer than two samples, which give no standard error.
            TypeError: If no length is known and the batch holds no tokens.
            RuntimeError: If filters drop every sample.
        """
        replay = replay_of(trainer)
        data = trainer.datamodule  # type: ignore[attr-defined]
        sampling = self.sampling or (Sampling() if replay is None else replay.rows.generator.sampling)
        generator = RowGenerator(sampling)
        generator.bind(model, find_tokenizer(replay, data, pl_module))
        processes = Processes.of(trainer)
        try:
            length = self.length or _replay_length(replay, data)
            if length is None:
                own = processes.run_on_all_ranks(functools.partial(row_length, batch))
                length = max(length for (length,) in processes.gather_ints(own))
            seed = torch.initial_seed() if replay is None or replay.seed is None else replay.seed
            seed = processes.broadcast(seed)
            with refill_bar(trainer, self.rows * length) as advance:
                self.draw(generator, model, source, length, seed, advance, processes)
        finally:
            processes.close()

    def draw(
        self,
        generator: RowGenerator,
        model: LanguageModel,
        source: ReferenceModel,
        length: int,
        seed: int,
        advance: Callable[[int], Any],
        processes: Processes = Processes(),  # noqa: B008
    ) -> None:
        """Sample the rows, given all that they depend on; all processes call this.

        Args:
            generator: Makes the rows; bound to the model.
            model: The model that trains.
            source: The model to sample.
            length: Tokens in a row.
            seed: Seed of the run: these rows have a random stream of their own beside it.
            advance: Called with the number of tokens drawn since it was last called.
            processes: Those that share the work.

        Raises:
            MisconfigurationException: As for ``sample``.
            RuntimeError: If filters drop every sample.
        """
        generator.check_length(length, model)
        with isolate_rng(), source.active() as active:
            held, _ = generator.generate(active, self.rows, length, held_out_seed(seed), advance, processes)
        self._rows_in_sample = 1 if generator.sampling.is_chat else generator.piece_length(length, model) // length
        if len(held.tokens) <= self._rows_in_sample:
            raise MisconfigurationException(
                f"The {len(held.tokens)} held-out rows are of one sample of {self._rows_in_sample * length} tokens, "
                "and the standard error of what is measured on them takes at least two. Raise `self_rows`."
            )
        self.held = held

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The rows as tokens and targets; whole samples in each batch. A row's last token is not read."""
        assert self.held is not None
        rows = self.held
        tokens, targets = rows.tokens[:, :-1], rows.tokens.masked_fill(~rows.target_tokens, IGNORED)[:, 1:]
        size = max(_BATCH // self._rows_in_sample, 1) * self._rows_in_sample
        return list(zip(torch.split(tokens, size), torch.split(targets, size), strict=True))

    def sizes(self, targets: Tensor) -> list[int]:
        """The number of tokens to predict in each sample of a batch, whose targets are ``(rows, positions)``."""
        return [int((part != IGNORED).sum()) for part in torch.split(targets, self._rows_in_sample)]

    def state_dict(self) -> dict[str, Any] | None:
        """The rows, at 4 bytes a token; None if there are none yet."""
        if self.held is None:
            return None
        tokens, lengths, targets = self.held.tokens.int(), self.held.lengths, self.held.targets
        return {"tokens": tokens, "lengths": lengths, "targets": targets, "rows_in_sample": self._rows_in_sample}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Hold the rows that were saved."""
        if state is None:
            self.held = None
            return
        self.held = ReplayRows(state["tokens"].long(), state["lengths"], state["targets"])
        self._rows_in_sample = state["rows_in_sample"]


class SampleDrift(KLDrift):
    """The KL divergence with its standard error over samples, since the tokens of one sample depend on each other.

    The mean over tokens is a ratio of two means over samples, of a sample's divergence and of its number of tokens; the
    error is that of a ratio estimate (Cochran 1977, Sampling Techniques, section 6.4).

    Args:
        sync_on_compute: Whether each process measures samples of its own, rather than all of them.
    """

    samples: Tensor
    squares: Tensor
    products: Tensor
    sizes: Tensor

    def __init__(self, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self._divergences: list[Tensor] = []
        for name in ("samples", "squares", "products", "sizes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, reference_logits: Tensor, targets: Tensor) -> None:
        """Add a part of a batch, as for ``KLDrift``; it counts once ``end_batch`` is called."""
        divergence = forward_kl(logits, reference_logits, reduction="none")
        self._divergences.append(divergence[targets != self.ignore_index].double())

    def end_batch(self, sizes: list[int]) -> None:
        """Count what was added since the last call, given the number of tokens of each sample in it."""
        added, self._divergences = self._divergences, []
        if not any(sizes):
            return
        # The last ones: a batch whose hidden states turn out to be of no use is measured again on whole logits.
        sums = torch.stack([part.sum() for part in torch.split(torch.cat(added)[-sum(sizes) :], sizes)])
        tokens = torch.tensor(sizes, dtype=torch.float64, device=sums.device)
        self.total += sums.sum()
        self.count += sum(sizes)
        self.samples += (tokens > 0).sum()
        self.squares += sums.square().sum()
        self.products += (sums * tokens).sum()
        self.sizes += tokens.square().sum()

    def standard_error(self) -> float:
        """The standard error of ``compute``; all processes call this."""
        with self.sync_context(should_sync=self.sync_on_compute):
            mean = self.total / self.count
            spread = self.squares - 2 * mean * self.products + mean.square() * self.sizes
            variance = spread.clamp(min=0) * self.samples / (self.samples - 1)
            return float(variance.sqrt() / self.count)


def own_samples_of(
    rows: int | None,
    sampling: Sampling | None,
    length: int | None,
    alone: bool,
    max_batches: int | None,
    kl: bool,
) -> OwnSamples | None:
    """The rows that the arguments of ``ForgettingMonitor`` ask for; None for none.

    Args:
        rows: How many; by default 64 if there is no other set, else none.
        sampling: How they are sampled.
        length: Tokens in a row.
        alone: Whether there is no other set.
        max_batches: The largest number of batches of other sets.
        kl: Whether the model at fit start is there to compare with.

    Raises:
        ValueError: If a number is out of its range, or an argument has no effect beside the others.
    """
    if rows is not None and not is_whole(rows, 0):
        raise ValueError(f"`self_rows` is how many rows to sample and hold out, or 0; got {rows!r}.")
    if length is not None and not is_whole(length, 2):
        raise ValueError(f"`sequence_length` is a number of tokens, at least 2; got {length!r}.")
    if rows is None:
        rows = _ROWS if alone else 0
    if alone and not rows:
        raise ValueError("Without `prior` and with `self_rows=0` there is nothing to measure. Give one of them.")
    if alone and max_batches is not None:
        raise ValueError("`max_batches` is for the sets of `prior`, and there are none. Set `self_rows`.")
    if rows and not kl:
        raise ValueError(
            "`kl=False` measures without the model at fit start, and `forgetting/self` is the KL divergence from it. "
            "Leave out `kl`, or measure only sets of `prior`."
        )
    unused = [name for name, given in {"sampling": sampling, "sequence_length": length}.items() if given is not None]
    if not rows and unused:
        raise ValueError(
            f"{' and '.join(f'`{name}`' for name in unused)} would have no effect: no rows of the model's own are "
            f"measured. Set `self_rows`, as in `self_rows={_ROWS}`."
        )
    return OwnSamples(rows, sampling, length) if rows else None


def _replay_length(replay: SelfGeneratedReplay | None, data: Any) -> int | None:
    """Tokens in the rows of replay, if they don't depend on the first batch."""
    if replay is not None and replay.sequence_length is not None:
        return replay.sequence_length
    if not isinstance(data, ReplayDataModule):
        return None
    if data.buffer is not None:
        return data.buffer.length
    return None if data.shards is None else data.shards.shards.length
