"""The callback that measures forgetting during training, on held-out prior data or on the model's own samples."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_replay.callbacks.measuring import measure_set
from lightning_replay.callbacks.monitor import Monitor
from lightning_replay.callbacks.own_samples import own_samples_of
from lightning_replay.callbacks.prior_sets import PriorSet, check_max_batches, check_set, named_sets
from lightning_replay.callbacks.self_generated_replay import SelfGeneratedReplay
from lightning_replay.data.batches import Batches, first_batches
from lightning_replay.data.prior import loader_of
from lightning_replay.models.head import OutputHeads
from lightning_replay.models.language_model import find_language_model
from lightning_replay.references.keeper import ReferenceKeeper
from lightning_replay.references.reference import Auto, Save
from lightning_replay.sampling.sampling import Sampling
from lightning_replay.utilities.distributed import is_sharded
from lightning_replay.utilities.logging import next_step, publish
from lightning_replay.utilities.progress import heed_sigterm
from lightning_replay.utilities.validation import check_package

__all__ = ["ForgettingMonitor"]

_SELF = "self"
"""The name of the set of the model's own samples."""
_TAKEN = {
    "seconds": "`forgetting/seconds` logs the time that measuring takes",
    _SELF: "it is the set of the model's own samples, which `self_rows` adds",
}
"""Names that no prior set can have, and why."""


class ForgettingMonitor(Monitor):
    """Measures what a language model forgets, before, during and after training, with and without prior data.

    Without prior data, ``ForgettingMonitor()``, it measures the model on rows that it sampled from itself before the
    first step: the set ``self``. It can be measured beside sets of your own.

    It evaluates each prior set at fit start, every ``every_n_steps`` optimizer steps and at the end, in evaluation mode
    and without changing the global random state. The values go to every logger, at the step at which Lightning logs the
    loss of the next batch, which is a loss of the same weights: ``trainer.global_step``, except for modules with
    several optimizers, whose steps that adds up. They also go to ``trainer.callback_metrics``, so ``ModelCheckpoint``
    and ``EarlyStopping`` can monitor them. For each set:

    - ``forgetting/<name>``: rise of the loss since fit start, in nats a token; positive is worse.
    - ``prior_loss/<name>``: next-token loss, in nats a token; ``prior_perplexity/<name>``: its exponential.
    - ``prior_accuracy/<name>``: share of next tokens that are the model's most likely ones.
    - ``prior_kl/<name>``: KL divergence from the model at fit start to the model now, in nats a token.

    Of the set ``self``:

    - ``forgetting/self``: KL divergence from the model at fit start, π, to the model now, θ, in nats a token. On
      samples of π the expected rise of the loss is KL(π‖θ), and the exact divergence over the vocabulary at each
      position has less noise than the rise on the tokens that were sampled. ``prior_kl`` would be the same figure.
    - ``forgetting_error/self``: its standard error, over samples. Half of it takes four times the rows.
    - ``prior_loss/self``, ``prior_perplexity/self``, ``prior_accuracy/self``: as for other sets.

    What π does not sample, ``self`` does not see. It is a distance: a model that becomes better at prior text, as by
    next-token loss on real prior rows, moves away from π too. With a temperature, truncation, filters or prompts, it is
    measured where such samples go.

    ``forgetting/seconds`` is the time that all monitors of the Trainer have spent on this so far.

    Note:
        With several processes, each reads every set in the same order and evaluates its share of the batches, and the
        values are those of the whole set. With sharded weights, each evaluates all batches.

    Note:
        If another callback swaps weights in the same hooks, as ``WeightAveraging`` does, the order of the callbacks
        determines which weights are measured.

    Note:
        Packed rows are measured as the model is trained on them: with their ``position_ids`` and, if the batch has one,
        their ``attention_mask``. Hugging Face models keep documents apart if there is no mask.

    Note:
        The rows of ``self`` have a random stream of their own, so those of ``SelfGeneratedReplay`` are as they would be
        without a monitor. They are sampled even if replay reads its rows from a folder. Checkpoints hold them, so that
        a resumed run measures on the same rows.

    Note:
        PEFT's comparison of its methods measures forgetting as the mean token loss on held-out texts, each cut to 768
        tokens, after finetuning minus before it, where the adapters are off before. That is ``forgetting/<name>`` at
        the end of a fit of fresh adapters, which change nothing at its start, on a set of these texts::

            rows = tokenizer(texts, truncation=True, max_length=768)["input_ids"]
            held_out = [{"input_ids": torch.tensor([row])} for row in rows]
            monitor = ForgettingMonitor({"wikitext": held_out}, every_n_steps=0, kl=False)

    Args:
        prior: Held-out sets by name; by default only ``self``. Each is a dataloader, or another iterable that can be
            read more than once, of batches as the model is trained on: a mapping with ``input_ids``, a
            ``(tokens, targets)`` pair, or a tensor of tokens. Or a datamodule, whose ``val_dataloader`` is measured.
        every_n_steps: Optimizer steps between measurements; 0 for fit start and end only.
        max_batches: The largest number of batches to read of each set of ``prior``; all by default. Required for a set
            without a length, which might never end.
        kl: Whether to measure ``prior_kl``. It needs the model at fit start, as the set ``self`` always does: free for
            fresh PEFT adapters, shared with ``SelfGeneratedReplay`` if that keeps it, else a copy of the weights.
        language_model: Where the language model is in the LightningModule, as an attribute path. By default that of the
            Trainer's ``SelfGeneratedReplay``; without one, it is found in the same way.
        save_reference: Where the monitor's own copy is saved: ``"inside"`` each checkpoint or ``"beside"`` them, as for
            ``Copy``.
        self_rows: Rows of the set ``self``; by default 64 without ``prior``, else 0: no such set. They cost their
            sampling before the first step and, at each measurement, a forward through two models, together about as
            much as a training step on two thirds as many rows.
        sampling: How these rows are sampled; by default as ``SelfGeneratedReplay`` of the Trainer does, so with
            ``Sampling(prompts="chat")`` they are conversations.
        sequence_length: Tokens in such a row; by default those of a replay row, else of a row of the first batch.

    Raises:
        TypeError: If ``prior`` holds something else, or one set is several loaders; before the first step, if the
            Trainer is not ``lightning``'s.
        ValueError: If ``prior`` is empty, two sets have the same name, a set can be read only once or has no length, a
            number is out of range, or an argument has no effect beside the others.
        MisconfigurationException: Before the first step, if a prior set has no batch, or a batch that can't be measured
            or that exceeds the model's context or vocabulary; if another monitor of the Trainer has a set of the same
            name; if no logits are found; or if rows can't be sampled, for want of a start token or of room.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> stories = DataLoader(torch.randint(100, (64, 16)), batch_size=8)
        >>> monitor = ForgettingMonitor({"stories": stories}, every_n_steps=50)
        >>> without_prior_data = ForgettingMonitor()
    """

    _seconds_key = "forgetting/seconds"

    def __init__(
        self,
        prior: Mapping[str, PriorSet] | Sequence[tuple[str, PriorSet]] | None = None,
        every_n_steps: int = 100,
        max_batches: int | None = None,
        kl: bool = True,
        language_model: str | None = None,
        save_reference: Save = "inside",
        self_rows: int | None = None,
        sampling: Sampling | None = None,
        sequence_length: int | None = None,
    ) -> None:
        sets = [] if prior is None else named_sets(prior)
        names = [name for name, _ in sets]
        if prior is not None and not sets:
            raise ValueError(
                "`prior` names at least one held-out set, as in {'stories': loader}; got none. Without prior data, "
                "leave it out: the model is then measured on its own samples."
            )
        for taken, reason in _TAKEN.items():
            if taken in names:
                raise ValueError(f"A prior set can't be named {taken!r}: {reason}.")
        if len(set(names)) < len(names):
            raise ValueError(f"Two prior sets have one name, so their values would overwrite each other: {names}.")
        super().__init__(every_n_steps, language_model)
        check_max_batches(max_batches)
        for name, loader in sets:
            check_set(name, loader, max_batches)
        self.prior = dict(sets)
        self.max_batches = max_batches
        self.kl = kl
        self.own_samples = own_samples_of(self_rows, sampling, sequence_length, prior is None, max_batches, kl)
        """The rows of the set ``self``, if it is measured."""

        self._names = sorted(names if self.own_samples is None else [*names, _SELF])
        self._own_reference = ReferenceKeeper(Auto(save=save_reference), owner=",".join(self._names))
        self._loaders: dict[str, Batches] = {}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(prior=self._names)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_package(trainer, "The Trainer")
        if stage != "fit":
            return
        # Not earlier: a checkpoint saved after the last fit still needs that fit's reference.
        self._own_reference.begin_fit(trainer)
        self._begin_fit(trainer)
        self._loaders = {}
        if self.own_samples is not None:
            self.own_samples.forget()
        others = [c for c in trainer.callbacks if isinstance(c, ForgettingMonitor) and c is not self]  # type: ignore[attr-defined]
        shared = sorted({name for other in others for name in other._names} & set(self._names))
        if shared:
            raise MisconfigurationException(
                f"Two ForgettingMonitors of this Trainer have prior sets of the same name: {shared}. Rename one, or "
                "leave it out."
            )
        with isolate_rng():
            for name, given in self.prior.items():
                if isinstance(given, pl.LightningDataModule):
                    self._loaders[name] = loader_of(given, "val_dataloader", trainer)
                    check_set(name, self._loaders[name], self.max_batches)
                else:
                    self._loaders[name] = given

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._own_reference.begin_training()
        self._heads = OutputHeads()
        self._model = find_language_model(pl_module, self._path_of_model(trainer))
        if self.own_samples is not None and self.own_samples.held is not None:
            self._loaders[_SELF] = self.own_samples.batches()
        if self._resumed:
            # Other callbacks may monitor the last values before the next measurement.
            publish(trainer, self._values)
            return
        if self.prior and self._keeper(trainer).resumed_from(trainer) is not None:
            rank_zero_warn(
                "The checkpoint was saved without this ForgettingMonitor: forgetting is measured from here on."
            )
        if self.own_samples is not None:
            self._keeper(trainer).get(trainer, self._model)  # a checkpoint may be saved before the first batch
        self._measure(trainer, pl_module, next_step(trainer))
        with isolate_rng():
            for name, loader in self._loaders.items():
                if next(first_batches(loader, 1), None) is None:
                    raise MisconfigurationException(
                        f"The prior set {name!r} gave its batches once and no more, but it is measured again and "
                        "again. Pass a loader that can be read more than once."
                    )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        own = self.own_samples
        if own is None or own.held is not None:
            return
        # Not earlier: rows are as long as those of the first batch.
        assert self._model is not None
        started = time.perf_counter()
        own.sample(trainer, pl_module, self._model, self._keeper(trainer).get(trainer, self._model), batch)
        self._loaders[_SELF] = own.batches()
        self._add_seconds(trainer, time.perf_counter() - started)
        self._measure(trainer, pl_module, next_step(trainer), [_SELF])

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._own_reference.save(trainer, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._keeper(trainer) is self._own_reference:
            self._own_reference.load(trainer, checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        own = None if self.own_samples is None else self.own_samples.state_dict()
        return {**super().state_dict(), "self_rows": own}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.own_samples is not None:
            self.own_samples.load_state_dict(state_dict["self_rows"])

    @override
    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, names: Sequence[str] | None = None
    ) -> None:
        """Evaluate some sets, by default all, and log the values."""
        names = list(self._loaders) if names is None else names
        if not names:
            return
        values: dict[str, float] = {}
        started = time.perf_counter()
        with isolate_rng():
            for name in names:
                values |= self._evaluate(trainer, pl_module, name)
        self._add_seconds(trainer, time.perf_counter() - started)
        self._log(trainer, values, step)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> dict[str, float]:
        model = self._model
        assert model is not None
        reference = self._keeper(trainer).get(trainer, model) if self.kl else None
        found = measure_set(
            name,
            self._own_share(trainer, name),
            model,
            reference,
            self._heads,
            pl_module.device,
            self.own_samples if name == _SELF else None,
            shared=not is_sharded(trainer),
            context=trainer.precision_plugin.val_step_context,
        )
        baseline = self.baseline.setdefault(name, found.loss)
        values = {
            f"forgetting/{name}": found.loss - baseline,
            f"prior_loss/{name}": found.loss,
            f"prior_perplexity/{name}": float(torch.tensor(found.loss, dtype=torch.float64).exp()),
            f"prior_accuracy/{name}": found.accuracy,
        }
        if found.kl is None:
            return values
        if found.kl_error is None:
            return values | {f"prior_kl/{name}": found.kl}
        return values | {f"forgetting/{name}": found.kl, f"forgetting_error/{name}": found.kl_error}

    def _own_share(self, trainer: pl.Trainer, name: str) -> Iterator[Any]:
        """The batches of a set that this process measures."""
        rank, processes = (0, 1) if is_sharded(trainer) else (trainer.global_rank, trainer.world_size)
        most = None if name == _SELF else self.max_batches
        for index, batch in enumerate(first_batches(self._loaders[name], most)):
            heed_sigterm(trainer)
            if index % processes == rank:
                yield batch

    def _keeper(self, trainer: pl.Trainer) -> ReferenceKeeper:
        """The replay callback's reference if that is the model at fit start, to keep no second copy."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        keepers = (callback.reference for callback in callbacks if isinstance(callback, SelfGeneratedReplay))
        return next((keeper for keeper in keepers if keeper.is_model_at_fit_start), self._own_reference)
