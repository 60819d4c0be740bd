"""Where the replay rows of a fit come from: samples of a model, or a folder of rows that were generated ahead."""

import math
from collections.abc import Callable
from typing import Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_replay.callbacks.checks import changed_settings, check_buffer, check_prior
from lightning_replay.callbacks.refill import Fit, SampledRows, Supply
from lightning_replay.callbacks.replay_loss import ReplayLoss
from lightning_replay.data.replay import ReplayDataModule
from lightning_replay.data.sources import RowSource, ShardRows
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.adapters import adapter_is_idle
from lightning_replay.references.cached import cache_reference
from lightning_replay.references.keeper import ReferenceKeeper
from lightning_replay.references.models import LiveModel, ReferenceModel
from lightning_replay.references.own import OwnModel
from lightning_replay.references.reference import Cached

__all__ = ["RowSupply", "Source"]

Source = Literal["reference", "live"]


class RowSupply:
    """Connects a fit with the source of its replay rows, after checking that the rows fit.

    Args:
        loss: The loss on the rows.
        source: Whose samples are replayed.
        reference: Keeps the reference model.
        rows: Samples rows.
        sequence_length: Tokens in a row, if given.
    """

    def __init__(
        self,
        loss: ReplayLoss,
        source: Source,
        reference: ReferenceKeeper,
        rows: SampledRows,
        sequence_length: int | None,
    ) -> None:
        self.loss = loss
        self.source: Source = source
        self.reference = reference
        self.rows = rows
        self.sequence_length = sequence_length
        self._compared: str | None = None

    def connect(self, fit: Fit) -> tuple[RowSource, Callable[[], None]]:
        """Let a fit draw its rows.

        Returns:
            The source of the rows, and a function that disconnects it.

        Raises:
            MisconfigurationException: If the rows don't fit the model, or the reference can't be had.
        """
        shards = None if fit.data is None else fit.data.shards
        return self._sample(fit) if shards is None else self._read(fit, shards)

    @property
    def _cached(self) -> Cached | None:
        """How much of the reference rows carry with them; None if they carry nothing."""
        return self.loss.cached(self.reference.reference)

    def _sample(self, fit: Fit) -> tuple[RowSource, Callable[[], None]]:
        """Draw rows that are sampled when they are due."""
        if self.reference.resumed_from(fit.trainer) is None and self.reference.reference.since == "fit":
            self.rows.forget()  # rows of an earlier fit came from another reference
            if self._cached is not None and fit.data is not None and self.rows.has_filled(fit.data.buffer):
                raise MisconfigurationException(
                    "The datamodule's buffer holds rows that an earlier fit sampled, with the log-probabilities of "
                    "that fit's reference, and the reference of this fit is the model as it is now. Give each fit a "
                    "new ReplayBuffer, or keep the first reference with `reference=Cached(since='first')`."
                )
        lasting = self._never_refills(fit.model)
        live = self.source == "live" or lasting
        source: ReferenceModel = LiveModel(fit.model) if live else self.reference.get(fit.trainer, fit.model)
        if self.loss.needs_reference and self._cached is None:
            self.reference.get(fit.trainer, fit.model)
        narrowest = self._narrowest(fit.model)
        self._check_fit(fit, narrowest)
        if self._cached is not None:
            self._cache_prior(fit, source, self._cached.top_k)
        self.rows.begin(Supply(fit, source, narrowest, lasting, self._trained_by(fit.trainer)))
        detach = fit.feed.attach(self.rows) if fit.data is None else self._attach(fit.data, self.rows)

        def disconnect() -> None:
            detach()
            self.rows.end()

        return self.rows, disconnect

    def _read(self, fit: Fit, rows: ShardRows) -> tuple[RowSource, Callable[[], None]]:
        """Draw rows that were generated ahead, if they are the reference's."""
        data, shards, model = fit.data, rows.shards, fit.model
        assert data is not None
        unused = {"source='live'": self.source == "live"} | self.rows.changed
        del unused["uses_per_sample"]  # it has its effect on rows of a folder, too
        given = changed_settings(self.rows.generator.sampling, unused)
        shards.check_options(given, self.sequence_length, self.loss.temperature if self._cached else None)
        # Once the model has trained, its weights no longer show whether it wrote the rows.
        kept = self.reference.reference.since == "first" and self._compared == shards.manifest.identity
        known = self.reference.resumed_from(fit.trainer) is not None or kept
        shards.check_fits(model, adapter_is_idle(model), known=known)
        self._compared = shards.manifest.identity
        if data.prior is not None:
            check_prior(data.prior, self._narrowest(model))
        # Rows that were generated ahead take no second model, unless the loss does.
        if self._cached is not None:
            live = self._never_refills(model)
            self._cache_prior(fit, LiveModel(model) if live else self.reference.get(fit.trainer, model), shards.top_k)
        elif self.loss.needs_reference:
            self.reference.get(fit.trainer, model)
        # Sampled already, so there is nothing to save by using rows again.
        rows.use(1 if self.rows.uses.given == "auto" else self.rows.uses.given, log_probs=self._cached is not None)
        return rows, self._attach(data, rows)

    def _attach(self, data: ReplayDataModule, rows: RowSource) -> Callable[[], None]:
        return data.attach(rows, joins_batch=self.loss.rows == "batch")

    def _never_refills(self, model: LanguageModel) -> bool:
        """Whether the reference is gone as soon as the model trains, so that rows have to last."""
        cached = isinstance(self.reference.reference, Cached)
        return cached and self.source == "reference" and self.reference.adapter(model) is None

    def _trained_by(self, trainer: pl.Trainer) -> str | None:
        """What has trained the model before this fit began, since its reference was taken."""
        if (checkpoint := self.reference.resumed_from(trainer)) is not None:
            return f"the run up to {checkpoint}"
        return "an earlier fit" if self.reference.reference.since == "first" and self.rows.generator.rows else None

    def _cache_prior(self, fit: Fit, source: ReferenceModel, top_k: int) -> None:
        """Let real prior rows carry the reference's log-probabilities, as the sampled ones will."""
        data = fit.data
        prior = None if data is None else data.prior
        kept = self.reference.resumed_from(fit.trainer) is not None or self.reference.reference.since == "first"
        if data is None or prior is None or (prior.top_k and kept):
            return
        temperature = self.loss.temperature
        with isolate_rng(), source.active() as active:
            data.cache_prior(lambda rows: cache_reference(active, rows, top_k, temperature))

    def _narrowest(self, model: LanguageModel) -> LanguageModel:
        """The model or, if that is another one and takes shorter rows, the reference."""
        taken = self.reference.taken
        both = [model, taken.model] if isinstance(taken, OwnModel) else [model]
        return min(both, key=lambda each: math.inf if each.context is None else each.context)

    def _check_fit(self, fit: Fit, model: LanguageModel) -> None:
        """Refuse rows that the model has no room or no tokens for."""
        data = fit.data
        buffer, prior = (None, None) if data is None else (data.buffer, data.prior)
        if buffer is not None:
            check_buffer(buffer, self.sequence_length, self._cached, model)
        if prior is not None:
            check_prior(prior, model)
        if data is not None and prior is not None and data.prior_share == 1:
            return  # nothing will be sampled
        self.rows.generator.bind(fit.model, fit.tokenizer)
        length = buffer.length if buffer is not None else self.sequence_length
        if length is not None:
            self.rows.generator.check_length(length, model)
