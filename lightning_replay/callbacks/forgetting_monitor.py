"""The callback that measures forgetting on held-out prior data during training."""

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric
from typing_extensions import override

from lightning_replay.callbacks.measuring import update_metrics
from lightning_replay.callbacks.self_generated_replay import SelfGeneratedReplay
from lightning_replay.data.batches import Batches, ModelInputs, inputs_and_targets
from lightning_replay.data.prior import loader_of
from lightning_replay.metrics import KLDrift, TokenAccuracy, TokenLoss
from lightning_replay.models.head import OutputHeads
from lightning_replay.models.language_model import LanguageModel, check_tokens, find_language_model
from lightning_replay.references.keeper import ReferenceKeeper
from lightning_replay.references.reference import Auto, Save
from lightning_replay.utilities.distributed import check_strategy, is_sharded
from lightning_replay.utilities.logging import log_values, next_step, publish
from lightning_replay.utilities.progress import heed_sigterm
from lightning_replay.utilities.validation import check_package, is_whole

__all__ = ["ForgettingMonitor"]

PriorSet = pl.LightningDataModule | Batches


class ForgettingMonitor(Callback):
    """Measures a language model on held-out prior data before, during and after training.

    It evaluates each prior set at fit start, every ``every_n_steps`` optimizer steps and at the end, in evaluation mode
    and without changing the global random state. The values go to every logger, at the step at which Lightning logs the
    loss of the next batch, which is a loss of the same weights: ``trainer.global_step``, except for modules with
    several optimizers, whose steps that adds up. They also go to ``trainer.callback_metrics``, so ``ModelCheckpoint``
    and ``EarlyStopping`` can monitor them. For each set:

    - ``forgetting/<name>``: rise of the loss since fit start, in nats a token; positive is worse.
    - ``prior_loss/<name>``: next-token loss, in nats a token; ``prior_perplexity/<name>``: its exponential.
    - ``prior_accuracy/<name>``: share of next tokens that are the model's most likely ones.
    - ``prior_kl/<name>``: KL divergence from the model at fit start to the model now, in nats a token.

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

    Args:
        prior: Held-out sets by name. Each is a dataloader, or another iterable that can be read more than once, of
            batches as the model is trained on: a mapping with ``input_ids``, a ``(tokens, targets)`` pair, or a tensor
            of tokens. Or a datamodule, whose ``val_dataloader`` is measured.
        every_n_steps: Optimizer steps between measurements; 0 for fit start and end only.
        max_batches: The largest number of batches to read of each set; all by default. Required for a set without a
            length, which might never end.
        kl: Whether to measure ``prior_kl``. It needs the model at fit start: free for fresh PEFT adapters, shared with
            ``SelfGeneratedReplay`` if that keeps it, else a copy of the weights.
        language_model: Where the language model is in the LightningModule, as an attribute path. By default that of the
            Trainer's ``SelfGeneratedReplay``; without one, it is found in the same way.
        save_reference: Where the monitor's own copy is saved: ``"inside"`` each checkpoint or ``"beside"`` them, as for
            ``Copy``.

    Raises:
        TypeError: If ``prior`` holds something else, or one set is several loaders; before the first step, if the
            Trainer is not ``lightning``'s.
        ValueError: If ``prior`` is empty, two sets have the same name, a set can be read only once or has no length, or
            a number is out of range.
        MisconfigurationException: Before the first step, if a prior set has no batch, or a batch that can't be measured
            or that exceeds the model's context or vocabulary; if another monitor of the Trainer has a set of the same
            name; or if no logits are found.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> stories = DataLoader(torch.randint(100, (64, 16)), batch_size=8)
        >>> monitor = ForgettingMonitor({"stories": stories}, every_n_steps=50)
    """

    def __init__(
        self,
        prior: Mapping[str, PriorSet] | Sequence[tuple[str, PriorSet]],
        every_n_steps: int = 100,
        max_batches: int | None = None,
        kl: bool = True,
        language_model: str | None = None,
        save_reference: Save = "inside",
    ) -> None:
        sets = list(prior.items() if isinstance(prior, Mapping) else _pairs(prior))
        names = [name for name, _ in sets]
        if not sets:
            raise ValueError("`prior` names at least one held-out set, as in {'stories': loader}; got none.")
        if "seconds" in names:
            raise ValueError(
                "A prior set can't be named 'seconds': `forgetting/seconds` logs the time that measuring takes."
            )
        if len(set(names)) < len(names):
            raise ValueError(f"Two prior sets have one name, so their values would overwrite each other: {names}.")
        if not is_whole(every_n_steps, 0):
            raise ValueError(
                f"`every_n_steps` is the optimizer steps between measurements or 0; got {every_n_steps!r}."
            )
        if max_batches is not None and not is_whole(max_batches, 1):
            raise ValueError(f"`max_batches` is at least 1, or None for all; got {max_batches!r}.")
        for name, loader in sets:
            _check_set(name, loader, max_batches)
        self.prior = dict(sets)
        self.every_n_steps = every_n_steps
        self.max_batches = max_batches
        self.kl = kl
        self.language_model = language_model
        self.baseline: dict[str, float] = {}
        """Loss on each set at fit start, in nats a token."""

        self.seconds = 0.0
        """Wall-clock time spent on measuring, over all fits."""

        self._own_reference = ReferenceKeeper(Auto(save=save_reference), owner=",".join(sorted(names)))
        self._loaders: dict[str, Batches] = {}
        self._resumed = False
        self._measured_at = -1
        self._values: dict[str, float] = {}
        self._model: LanguageModel | None = None
        self._heads = OutputHeads()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(prior=sorted(self.prior))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_package(trainer, "The Trainer")
        if stage != "fit":
            return
        # Not earlier: a checkpoint saved after the last fit still needs that fit's reference.
        self._own_reference.begin_fit(trainer)
        self.baseline, self._resumed = {}, False
        check_strategy(trainer, "ForgettingMonitor")
        others = [c for c in trainer.callbacks if isinstance(c, ForgettingMonitor) and c is not self]  # type: ignore[attr-defined]
        shared = sorted({name for other in others for name in other.prior} & set(self.prior))
        if shared:
            raise MisconfigurationException(
                f"Two ForgettingMonitors of this Trainer have prior sets of the same name: {shared}. Rename one."
            )
        with isolate_rng():
            for name, given in self.prior.items():
                if isinstance(given, pl.LightningDataModule):
                    self._loaders[name] = loader_of(given, "val_dataloader", trainer)
                    _check_set(name, self._loaders[name], self.max_batches)
                else:
                    self._loaders[name] = given

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._own_reference.begin_training()
        self._heads = OutputHeads()
        self._model = find_language_model(pl_module, self._language_model(trainer))
        if self._resumed:
            # Other callbacks may monitor the last values before the next measurement.
            publish(trainer, self._values)
            return
        if self._keeper(trainer).resumed_from(trainer) is not None:
            rank_zero_warn(
                "The checkpoint was saved without this ForgettingMonitor: forgetting is measured from here on."
            )
        self._measure(trainer, pl_module, next_step(trainer))
        with isolate_rng():
            for name, loader in self._loaders.items():
                if next(iter(loader), None) is None:
                    raise MisconfigurationException(
                        f"The prior set {name!r} gave its batches once and no more, but it is measured again and "
                        "again. Pass a loader that can be read more than once."
                    )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        # With gradient accumulation, several batches end at one global step.
        if due and trainer.global_step != self._measured_at:
            # Lightning counts this batch only after its hooks.
            self._measure(trainer, pl_module, next_step(trainer) + 1)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._measured_at:
            self._measure(trainer, pl_module, next_step(trainer))

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
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._model, self._heads = None, OutputHeads()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._model, self._heads = None, OutputHeads()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "measured_at": self._measured_at,
            "values": self._values,
            "seconds": self.seconds,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.baseline = dict(state_dict["baseline"])
        self._measured_at = state_dict["measured_at"]
        self._values = dict(state_dict.get("values", {}))
        self.seconds = state_dict.get("seconds", 0.0)
        self._resumed = bool(self.baseline)  # empty if it was saved before the first step

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Evaluate every prior set, log the values and publish them to other callbacks."""
        values: dict[str, float] = {}
        started = time.perf_counter()
        with isolate_rng():
            if trainer.world_size > 1:
                torch.manual_seed(0)  # a loader that shuffles does so equally in every process
            for name in self.prior:
                values |= self._evaluate(trainer, pl_module, name)
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        values["forgetting/seconds"] = sum(each.seconds for each in callbacks if isinstance(each, ForgettingMonitor))
        for callback in callbacks:
            if isinstance(callback, SelfGeneratedReplay):
                callback.monitoring_seconds += elapsed
        self._measured_at = trainer.global_step
        self._values = values
        log_values(trainer, values, step)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> dict[str, float]:
        model = self._model
        assert model is not None
        reference = self._keeper(trainer).get(trainer, model) if self.kl else None
        loss, accuracy = TokenLoss().to(pl_module.device), TokenAccuracy().to(pl_module.device)
        drift = KLDrift().to(pl_module.device)
        rank, processes = (0, 1) if is_sharded(trainer) else (trainer.global_rank, trainer.world_size)
        for index, batch in enumerate(self._loaders[name]):
            if index == self.max_batches:
                break
            heed_sigterm(trainer)
            if index % processes != rank:
                continue
            inputs = self._checked(name, batch, model)
            targets = inputs.targets.to(pl_module.device)
            with trainer.precision_plugin.val_step_context():
                call = functools.partial(_logits, inputs=inputs, device=pl_module.device)
                update_metrics(self._heads, model, reference, call, targets, loss, accuracy, drift)
        with loss.sync_context():
            empty = not loss.count
        if empty:
            raise MisconfigurationException(
                f"The prior set {name!r} gave no batch with a token to predict, so nothing can be measured on it. Pass "
                "a loader that can be read more than once, with at least one row of two tokens."
            )
        prior_loss = _value(loss)
        baseline = self.baseline.setdefault(name, prior_loss)
        values = {
            f"forgetting/{name}": prior_loss - baseline,
            f"prior_loss/{name}": prior_loss,
            f"prior_perplexity/{name}": float(torch.tensor(prior_loss, dtype=torch.float64).exp()),
            f"prior_accuracy/{name}": _value(accuracy),
        }
        return values if reference is None else values | {f"prior_kl/{name}": _value(drift)}

    def _checked(self, name: str, batch: Any, model: LanguageModel) -> ModelInputs:
        """What the model is given for a batch and what it is to predict, if both are valid."""
        try:
            inputs = inputs_and_targets(batch, model.vocabulary).right_padded()
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"The prior set {name!r} can't be measured. {error}") from error
        tokens, targets = inputs.tokens, inputs.targets
        if inputs.has_own_positions and not model.takes_positions:
            raise MisconfigurationException(
                f"The prior set {name!r} can't be measured. Its rows have `position_ids` of their own, as packed rows "
                f"do, and {type(model.module).__name__} takes no argument of that name. Give each document a row of "
                "its own, or add the argument."
            )
        if tokens.numel() and int(tokens.min()) < 0:
            raise MisconfigurationException(
                f"The prior set {name!r} holds the token id {int(tokens.min())}. Pad `input_ids` with a token and mark "
                "the padding in `attention_mask`; -100 is for `labels`."
            )
        if tokens.numel():
            check_tokens(int(torch.maximum(tokens, targets).max()), f"The prior set {name!r} holds", model)
        if model.context is not None and tokens.shape[1] > model.context:
            raise MisconfigurationException(
                f"The prior set {name!r} has rows of {tokens.shape[1]} tokens, but {type(model.module).__name__} takes "
                f"{model.context} at most. Cut the rows to that."
            )
        return inputs

    def _language_model(self, trainer: pl.Trainer) -> str | None:
        """The path of the language model: this callback's, or else that of the Trainer's ``SelfGeneratedReplay``."""
        if self.language_model is not None:
            return self.language_model
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        paths = (callback.language_model for callback in callbacks if isinstance(callback, SelfGeneratedReplay))
        return next((path for path in paths if path is not None), None)

    def _keeper(self, trainer: pl.Trainer) -> ReferenceKeeper:
        """The replay callback's reference if that is the model at fit start, to keep no second copy."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        keepers = (callback.reference for callback in callbacks if isinstance(callback, SelfGeneratedReplay))
        return next((keeper for keeper in keepers if keeper.is_model_at_fit_start), self._own_reference)


def _pairs(prior: Any) -> list[tuple[str, PriorSet]]:
    """Sets given as pairs of a name and a loader."""
    pairs = list(prior) if isinstance(prior, Sequence) and not isinstance(prior, str) else [prior]
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise TypeError(
            f"`prior` names held-out sets, as in {{'stories': loader}} or [('stories', loader)]; got {prior!r}."
        )
    return pairs


def _logits(model: LanguageModel, inputs: ModelInputs, device: torch.device) -> Tensor:
    """The logits of a model on a batch, given what the user's own call gives it.

    Padding on the right needs no mask. Packed rows keep theirs: whether a model then keeps documents apart is up to it.
    """
    if not inputs.has_own_positions:
        return model.logits(inputs.tokens.to(device))
    mask, positions = inputs.attention_mask, inputs.position_ids
    assert positions is not None
    return model.logits(inputs.tokens.to(device), None if mask is None else mask.to(device), positions.to(device))


def _check_set(name: Any, loader: Any, max_batches: int | None) -> None:
    """Raise an error for a prior set that is no loader or can't be read repeatedly."""
    check_package(loader, f"The prior set {name!r}")
    kinds = (pl.LightningDataModule, Iterable)
    if not isinstance(name, str) or not isinstance(loader, kinds) or isinstance(loader, str):
        raise TypeError(
            f"`prior` has a loader of batches or a datamodule under each name; got {loader!r} under {name!r}."
        )
    several = isinstance(loader, (list, tuple)) and any(isinstance(each, DataLoader) for each in loader)
    if several or isinstance(loader, (CombinedLoader, Mapping)):
        raise TypeError(
            f"A prior set is one dataloader, but {name!r} is a {type(loader).__name__} of several. Give each a name of "
            "its own, as in `{'stories': first_loader, 'code': second_loader}`."
        )
    if isinstance(loader, pl.LightningDataModule):
        return  # its loader is checked once it is set up
    if isinstance(loader, Iterator):
        raise ValueError(
            f"The prior set {name!r} is a {type(loader).__name__}, which can be read only once, but it is measured "
            "repeatedly. Pass a loader, or a list of its batches."
        )
    if max_batches is None and sized_len(loader) is None:
        raise ValueError(
            f"The prior set {name!r} has no length, so it might never end. Set `max_batches`, the batches to read of "
            "each set at most."
        )


def _value(metric: Metric) -> float:
    value: Tensor = metric.compute()
    return float(value)
