"""The callback that replays the model's own samples."""

import functools
import time
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_replay.buffers.buffer import ReplayBuffer
from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.callbacks.refill import SampledRows, Supply
from lightning_replay.callbacks.replay_loss import LossName, ReplayLoss, replay_loss_of
from lightning_replay.callbacks.training_step import ReplayStep
from lightning_replay.data.feed import RowFeed
from lightning_replay.data.replay import ReplayDataModule
from lightning_replay.data.share import REPLAY_FRACTION, ReplayShare
from lightning_replay.data.sources import RowSource, ShardRows
from lightning_replay.models.language_model import LanguageModel, check_tokens, find_language_model
from lightning_replay.references.adapters import adapter_is_idle
from lightning_replay.references.cached import cache_reference
from lightning_replay.references.keeper import ReferenceKeeper
from lightning_replay.references.models import LiveModel, ReferenceModel
from lightning_replay.references.reference import Cached, Reference, ReferenceName, reference_of
from lightning_replay.sampling.rows import RowGenerator
from lightning_replay.sampling.sampling import Sampling
from lightning_replay.utilities.distributed import check_strategy
from lightning_replay.utilities.logging import plain
from lightning_replay.utilities.validation import check_choice, check_package, is_whole

__all__ = ["SelfGeneratedReplay"]

Source = Literal["reference", "live"]

_COEFFICIENT = 10.0
_ROWS_KEY = "lightning_replay_rows"
"""Where a checkpoint holds the sampled rows."""


class SelfGeneratedReplay(Callback):
    r"""Replays rows that the model itself wrote, so that finetuning does not make it forget (arXiv 2605.26097).

    Before the first step it samples rows from the model, and whenever all of them have been used it samples new ones.
    It adds

    .. math:: \text{coefficient} \cdot \text{replay loss}

    to what ``training_step`` returns. The step itself is not edited, and replay rows are hidden from the user's code,
    so any loss, metric or logging in ``training_step`` is as it was.

    It works with any loader or datamodule. Wrap the data in a ``ReplayDataModule`` for what touches the data: rows that
    join the batch, real prior rows, folders of rows that were generated ahead, a buffer of your own.

    Logged on every logging step: ``replay/loss`` (nats a token, without the coefficient), ``replay/coefficient``,
    ``replay/buffer_fill`` (share of the buffer that is filled), ``replay/age`` (optimizer steps since the rows of this
    step were sampled) and ``replay/uses`` (how often they have been drawn), ``replay/sampling_seconds``,
    ``replay/loss_seconds`` (forwards and losses of replay, without their backward), ``replay/rows_sampled`` and
    ``replay/dropped/<filter>`` (totals so far). At each refill: ``replay/quality/`` with ``distinct_1`` and
    ``distinct_2`` (distinct n-grams over all n-grams), ``repetition`` (share of a sample's 4-grams that repeat earlier
    ones), ``log_prob`` (nats a token under the model sampled, which is π for ``source="reference"``), ``ended`` (share
    of samples with the end token), ``length`` and ``degenerate`` (share of samples that are empty or one repeated
    token); a few samples go to TensorBoard, Weights & Biases and MLflow as text. The arguments are logged as
    hyper-parameters, under ``SelfGeneratedReplay/``.

    Note:
        If the replay fraction is 0, nothing is sampled, copied or wrapped, except for ``"lwf"``, which has no replay
        rows. Sampling touches neither the global random state nor the modes of the model.

    Note:
        With a folder of rows that ``lightning-replay generate`` wrote, ``ReplayDataModule(buffer=folder)``, nothing is
        sampled: each row is read when it is due. ``reference="cached"`` takes the log-probabilities that were generated
        with them. The folder keeps the settings of sampling.

    Note:
        ``BatchSizeFinder`` and ``LearningRateFinder`` try steps before π is taken, so without replay, and what they try
        leaves no trace. Leave memory for the replay rows and the reference.

    Note:
        With several processes, each samples a part of a refill, and all have the rows that one process would have.
        Each logs the replay loss, age and uses of its own rows. With ``"mixed"`` and ``"lwf"``, the processes' losses
        are averaged as the strategy averages the user's own, whatever the number of rows behind each.

    Args:
        loss: What is added to the loss of the step. ``"kl"``: divergence from the reference model to the trained one
            on replay rows, ``KL(direction, temperature)``. ``"ntp"``: next-token loss on them, ``NextToken()``.
            ``"mixed"``: rows join the batch of a ``ReplayDataModule``, and the user's own loss sees them. ``"lwf"``:
            the divergence on the *new* rows, ``LwF(temperature)``. Or a ``ReplayLoss`` of your own.
        coefficient: What the replay loss is multiplied by: a number, or a function of the optimizer step. High values
            protect more and slow the new task down.
        reference: Which model is π. ``"auto"``: a fresh PEFT adapter switched off, which is exact and free; else
            ``"copy"``. ``"copy"``: a frozen copy of the weights at fit start, ``Copy(...)``: exact, for the memory of a
            second model. ``"adapter"``: the adapter switched off, or an error. ``"cached"``: log-probabilities kept
            beside the rows, ``Cached(top_k)``, so that training needs no second model. Without an adapter to switch
            off, all rows are then sampled before the first step, as many as the run uses, and never replaced.
            ``"ema"``: an exponential moving average of the weights, ``EMA(decay)``, which protects against sudden
            change, not against slow change. Or a ``Reference`` of your own.
        sampling: How rows are sampled.
        source: Whose samples to replay. ``"reference"``: those of the reference model, as the paper does.
            ``"live"``: those of the model as it trains. With ``"ntp"`` that needs no second model, but it replays what
            the model still knows, so what is lost stays lost. With ``"kl"``, the divergence to the reference on such
            rows pulls back what has drifted wherever the model still goes.
        replay_fraction: Share of replay rows among all rows, in [0, 1). By default 0.2, the paper's; a
            ``ReplayDataModule`` has its own.
        sequence_length: Tokens in a replay row. By default that of the rows in the first training batch, or of the
            datamodule's own buffer.
        refill_rows: Rows to sample at a time. Larger refills sample faster, up to 256 rows. ``"auto"``: up to 256, in
            even parts of what the run uses, or all of it if rows can't be replaced. How many of them are decoded
            together depends on memory alone.
        uses_per_sample: How often a row is drawn before it is replaced; 1 in the paper.
        background: Whether a thread samples the next refill on one core while the model trains. It needs a frozen copy
            as the reference, and pays if a core is idle. The samples are the same.
        tokenizer: Decodes the previews and has start and end tokens. By default the datamodule's or the module's
            ``tokenizer`` attribute, if there is one.
        language_model: Where the language model is in the LightningModule, as an attribute path. By default its
            Hugging Face or PEFT model, else the child that holds all parameters, else the module itself.
        seed: Seed of sampling. By default the global seed at the first fit.

    Attributes:
        monitoring_seconds: What the ``ForgettingMonitor`` callbacks of the Trainer have taken in
            this fit; they add to it.

    Raises:
        ValueError: If an argument is out of its range, or has no effect beside another.
        MisconfigurationException: Before the first step, if the run can't work: manual optimization with an added
            loss, no logits found, samples that don't fit the model, a reference that can't be had, a strategy under
            which the model can't be called outside of training.
        RuntimeError: If the filters drop every sample.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> replay = SelfGeneratedReplay(coefficient=3.0)
        >>> trainer = Trainer(callbacks=[replay], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    previews: int = 3
    """How many samples of each refill to log as text; 0 for none."""

    save_rows: bool = True
    """Whether checkpoints hold the sampled rows, at 4 bytes a token and 6 a cached log-probability. Without them, a
    resumed run samples anew: it continues well, but not bit for bit as if it had not stopped."""

    ignore_index: int = -100
    """The label that the user's loss leaves out, for ``loss="lwf"``; negative labels always are."""

    def __init__(
        self,
        loss: LossName | ReplayLoss = "kl",
        coefficient: float | Callable[[int], float] = _COEFFICIENT,
        reference: ReferenceName | Reference = "auto",
        sampling: Sampling = Sampling(),  # noqa: B008
        source: Source = "reference",
        *,
        replay_fraction: float | None = None,
        sequence_length: int | None = None,
        refill_rows: int | Literal["auto"] = "auto",
        uses_per_sample: int = 1,
        background: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        language_model: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.hparams = plain({name: value for name, value in locals().items() if name != "self"})
        """The arguments as hyper-parameters: numbers and texts as they are, objects as mappings."""

        check_choice("source", source, Source)
        if refill_rows != "auto" and not is_whole(refill_rows, 1):
            raise ValueError(f"`refill_rows` is how many rows to sample at a time, at least 1; got {refill_rows!r}.")
        if not is_whole(uses_per_sample, 1):
            raise ValueError(f"`uses_per_sample` is at least 1; got {uses_per_sample!r}.")
        if sequence_length is not None and not is_whole(sequence_length, 2):
            raise ValueError(f"`sequence_length` is a number of tokens, at least 2; got {sequence_length!r}.")
        if seed is not None and not is_whole(seed, 0):
            raise ValueError(f"`seed` is a whole number, at least 0, or None; got {seed!r}.")
        self._feed = RowFeed(ReplayShare(REPLAY_FRACTION if replay_fraction is None else replay_fraction))
        self.loss = replay_loss_of(loss)
        self.source: Source = source
        self.replay_fraction = replay_fraction
        self.sequence_length = sequence_length
        self.tokenizer = tokenizer
        self.language_model = language_model
        self.seed = seed
        self.reference = ReferenceKeeper(reference_of(reference))
        self.step = ReplayStep(self.loss, coefficient, self.ignore_index)
        self.rows = SampledRows(
            RowGenerator(sampling),
            rows=refill_rows,
            length=sequence_length,
            uses=uses_per_sample,
            top_k=self._cached.top_k if self._cached is not None else 0,
            temperature=self.loss.temperature,
            background=background,
        )
        """The sampled rows."""
        self._refuse_what_has_no_effect(reference)

        self._model: LanguageModel | None = None
        self._data: ReplayDataModule | None = None
        self._drawn_from: RowSource | None = None
        self._followed_step: int | None = None
        self._checkpoint_loaded = False
        self.monitoring_seconds = 0.0
        self._compared: str | None = None
        self._began, self._tokens_before = (0.0, 0.0, 0.0), 0
        self._undo: list[Callable[[], object]] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_package(trainer, "The Trainer")
        if stage != "fit":
            return
        # Not earlier: a checkpoint saved after the last fit still needs that fit's reference.
        self.reference.begin_fit(trainer)
        self._followed_step, self._checkpoint_loaded, self.monitoring_seconds = None, False, 0.0
        if self.loss.rows != "batch" and not pl_module.automatic_optimization:
            function = (
                f"add `lightning_replay.{self.loss.pure_function}` to your loss"
                if self.loss.pure_function
                else ("add the loss")
            )
            raise MisconfigurationException(
                f"{type(self.loss).__name__} is added to the loss that `training_step` returns, but "
                f"{type(pl_module).__name__} optimizes manually (`automatic_optimization=False`). Use `loss='mixed'` "
                f"with a ReplayDataModule, and {function} yourself."
            )
        self._data = self._find_data(trainer)
        if self.loss.rows == "new" or self._feed_of_fit.share.fraction:
            check_strategy(trainer, "SelfGeneratedReplay")
        if self._data is not None:
            # Lightning logs them with the module's: of two records, TensorBoard would show one alone.
            self._data.save_hyperparameters({"SelfGeneratedReplay": self.hparams})
        elif self.loss.rows != "new":
            self._feed = RowFeed(ReplayShare(self._feed.share.fraction))
            self._feed.joins_batch = False
            self._feed.begin(trainer)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restored = not trainer.strategy.restore_checkpoint_after_setup
        if trainer.ckpt_path is not None and restored and not self._checkpoint_loaded:
            raise MisconfigurationException(
                f"The run can't go on from {trainer.ckpt_path}, which was saved with `save_weights_only=True`: it has "
                "the weights, but neither the state of the optimizers nor that of the callbacks, so both the model "
                "before finetuning and how far sampling has come are missing. Resume from a full checkpoint, or load "
                "the weights into the module and fit without `ckpt_path`: the reference is then the model as loaded."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.reference.begin_training()
        if self._data is None:
            self._log_hparams(trainer, pl_module)
        if self.loss.rows != "new" and not self._feed_of_fit.share.fraction:
            return
        self._model = model = find_language_model(pl_module, self.language_model)
        self._began, self._tokens_before = self._seconds_so_far(), self.rows.tokens_sampled
        if self.loss.rows == "new":
            self.reference.get(trainer, model)
            self._wrap_step(trainer, pl_module, model, None)
            self._follow(trainer, model)
            return
        if self.seed is None:
            self.seed = self._feed_of_fit.processes.broadcast(torch.initial_seed())
        shards = None if self._data is None else self._data.shards
        if shards is None:
            self._begin_sampling(trainer, model)
        else:
            self._begin_reading(trainer, model, shards)
        if self.loss.rows == "replay":
            self._wrap_step(trainer, pl_module, model, self._feed_of_fit)
        self._follow(trainer, model)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._model is not None and self._data is None and self.loss.rows == "replay":
            self._feed.next(batch)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._model is None:
            return
        self._follow(trainer, self._model)
        values: dict[str, Any] = {}
        if self.step.last_loss is not None:
            values |= {
                "replay/loss": self.step.last_loss,
                "replay/coefficient": self.step.last_coefficient,
                "replay/loss_seconds": self.step.seconds,
            }
        if self._drawn_from is not None:
            values |= self._drawn_from.measures()
            drawn = self._feed_of_fit.drawn
            if drawn is not None and drawn.uses is not None and drawn.steps is not None:
                values["replay/uses"] = float(drawn.uses.double().mean())
                values["replay/age"] = trainer.global_step - float(drawn.steps.double().mean())
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._model is None:
            return
        total, sampling, loss = (now - then for now, then in zip(self._seconds_so_far(), self._began, strict=True))
        line = f"Replay: of {total:,.1f} s, {loss / total:.1%} went into the replay loss (without its backward)"
        if self.loss.rows != "new":
            feed = self._feed_of_fit
            line += (
                f", {sampling / total:.1%} into sampling {self.rows.tokens_sampled - self._tokens_before:,} tokens; "
                f"trained on {feed.new_tokens:,} new and {feed.replay_tokens:,} replayed tokens"
            )
        rank_zero_info(f"{line}; monitoring took {self.monitoring_seconds / total:.1%}.")

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.reference.save(trainer, checkpoint)
        # Not in `state_dict`, which Lightning copies when it is loaded.
        checkpoint[_ROWS_KEY] = self.rows.state_dict() if self.save_rows else {"left_out": True}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._checkpoint_loaded = True
        self.reference.load(trainer, checkpoint)
        rows = checkpoint.get(_ROWS_KEY, {"buffer": None})
        if "left_out" in rows:
            rank_zero_warn(
                "The checkpoint was saved with `SelfGeneratedReplay.save_rows = False`, so replay rows are sampled "
                "anew: the run does not continue bit for bit as if it had not stopped."
            )
        else:
            self.rows.load_state_dict(rows)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()
        if stage == "fit" and self._data is None:
            self._feed.end()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "followed_step": self._followed_step,
            "loss_seconds": self.step.seconds,
            "share": self._feed.share.state_dict(),
            **self.rows.generator.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]
        self._followed_step = state_dict["followed_step"]
        self.step.seconds = state_dict["loss_seconds"]
        self._feed.share.load_state_dict(state_dict["share"])
        self.rows.generator.load_state_dict(state_dict)

    @property
    def drawn(self) -> ReplayRows | None:
        """This rank's replay rows of the current batch, on the CPU; None if it has none."""
        return self._feed_of_fit.drawn

    @property
    def _cached(self) -> Cached | None:
        """How much of the reference rows carry with them; None if they carry nothing."""
        reference = self.reference.reference
        return reference if self.loss.takes_cached and isinstance(reference, Cached) else None

    @property
    def _feed_of_fit(self) -> RowFeed:
        """Draws the replay rows of this fit."""
        return self._feed if self._data is None else self._data.feed

    def _find_data(self, trainer: pl.Trainer) -> ReplayDataModule | None:
        """The ReplayDataModule of the Trainer, if it has one and it is used."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self.loss.rows == "new":
            return None
        if isinstance(data, ReplayDataModule):
            if self.replay_fraction is not None:
                raise MisconfigurationException(
                    f"SelfGeneratedReplay was given `replay_fraction={self.replay_fraction}`, and the ReplayDataModule "
                    f"has {data.replay_fraction}. Leave out that of SelfGeneratedReplay."
                )
            return data
        if self.loss.rows == "batch":
            given = "no datamodule" if data is None else type(data).__name__
            raise MisconfigurationException(
                f"`loss='mixed'` joins replay rows to the batches of a ReplayDataModule, but the Trainer was given "
                f"{given}. Wrap your data: "
                "`trainer.fit(module, datamodule=ReplayDataModule(your_datamodule_or_loader))`."
            )
        return None

    def _begin_sampling(self, trainer: pl.Trainer, model: LanguageModel) -> None:
        """Draw rows that are sampled when they are due."""
        data, feed = self._data, self._feed_of_fit
        assert self.seed is not None
        if self.reference.resumed_from(trainer) is None and self.reference.reference.since == "fit":
            self.rows.forget()  # rows of an earlier fit came from another reference
        lasting = self._never_refills(model)
        live = self.source == "live" or lasting
        source: ReferenceModel = LiveModel(model) if live else self.reference.get(trainer, model)
        if self.loss.needs_reference and self._cached is None:
            self.reference.get(trainer, model)
        tokenizer = self._find_tokenizer(trainer)
        self._check_fit(model, tokenizer)
        if self._cached is not None:
            self._cache_prior(trainer, source, self._cached.top_k)
        resumed = self._trained_by(trainer)
        self.rows.begin(
            Supply(trainer, model, feed, source, tokenizer, self.seed, lasting, resumed, self.previews),
            None if data is None else data.buffer,
        )
        self._undo.append(self.rows.end)
        self._drawn_from = self.rows
        if data is None:
            feed.source = self.rows
        else:
            self._undo.append(data.attach(self.rows, joins_batch=self.loss.rows == "batch"))

    def _begin_reading(self, trainer: pl.Trainer, model: LanguageModel, rows: ShardRows) -> None:
        """Draw rows that were generated ahead, if they are the reference's."""
        data, shards = self._data, rows.shards
        assert data is not None
        given = [f"sampling.{name}" for name in self.rows.generator.sampling.changed]
        given += [
            name
            for name, value in {
                "source='live'": self.source == "live",
                "background": self.rows.background,
                "refill_rows": self.rows.rows != "auto",
            }.items()
            if value
        ]
        shards.check_options(given, self.sequence_length, self.loss.temperature if self._cached else None)
        # Once the model has trained, its weights no longer show whether it wrote the rows.
        kept = self.reference.reference.since == "first" and self._compared == shards.manifest.identity
        shards.check_fits(model, adapter_is_idle(model), known=self.reference.resumed_from(trainer) is not None or kept)
        self._compared = shards.manifest.identity
        # Rows that were generated ahead take no second model, unless the loss does.
        if self._cached is not None:
            self._check_prior(model)
            source = LiveModel(model) if self._never_refills(model) else self.reference.get(trainer, model)
            self._cache_prior(trainer, source, shards.top_k)
        elif self.loss.needs_reference:
            self.reference.get(trainer, model)
            self._check_prior(model)
        rows.use(self.rows.uses, log_probs=self._cached is not None)
        self._drawn_from = rows
        self._undo.append(data.attach(rows, joins_batch=self.loss.rows == "batch"))

    def _wrap_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: LanguageModel, feed: RowFeed | None
    ) -> None:
        reference = functools.partial(self.reference.get, trainer, model)
        self._undo.append(self.step.wrap(trainer, pl_module, model, reference, feed))

    def _seconds_so_far(self) -> tuple[float, float, float]:
        """Of the clock, in sampling, and in the replay loss."""
        return time.perf_counter(), self.rows.generator.seconds, self.step.seconds

    def _never_refills(self, model: LanguageModel) -> bool:
        """Whether the reference is gone as soon as the model trains, so that rows have to last."""
        cached = isinstance(self.reference.reference, Cached)
        return cached and self.source == "reference" and self.reference.adapter(model) is None

    def _trained_by(self, trainer: pl.Trainer) -> str | None:
        """What has trained the model before this fit began, since its reference was taken."""
        if (checkpoint := self.reference.resumed_from(trainer)) is not None:
            return f"the run up to {checkpoint}"
        return "an earlier fit" if self.reference.reference.since == "first" and self.rows.generator.rows else None

    def _cache_prior(self, trainer: pl.Trainer, source: ReferenceModel, top_k: int) -> None:
        """Let real prior rows carry the reference's log-probabilities, as the sampled ones will."""
        prior = None if self._data is None else self._data.prior
        kept = self.reference.resumed_from(trainer) is not None or self.reference.reference.since == "first"
        if self._data is None or prior is None or (prior.top_k and kept):
            return
        temperature = self.loss.temperature
        with isolate_rng(), source.active() as active:
            self._data.cache_prior(lambda rows: cache_reference(active, rows, top_k, temperature))

    def _check_fit(self, model: LanguageModel, tokenizer: Any) -> None:
        """Refuse rows that the model has no room or no tokens for."""
        buffer = None if self._data is None else self._data.buffer
        if buffer is not None:
            self._check_buffer(buffer, model)
        self._check_prior(model)
        if self._data is not None and self._data.prior is not None and self._data.prior_share == 1:
            return  # nothing will be sampled
        self.rows.generator.bind(model, tokenizer)
        length = buffer.length if buffer is not None else self.sequence_length
        if length is not None:
            self.rows.generator.check_length(length, model)

    def _check_buffer(self, buffer: ReplayBuffer, model: LanguageModel) -> None:
        if self.sequence_length not in (None, buffer.length):
            raise MisconfigurationException(
                f"`sequence_length={self.sequence_length}`, but the datamodule's buffer holds rows of {buffer.length} "
                "tokens. Leave one of them out."
            )
        if self._cached is not None and not buffer.top_k:
            raise MisconfigurationException(
                "`reference='cached'` keeps log-probabilities beside the rows, but the datamodule's buffer keeps "
                f"none. Make it with `ReplayBuffer(..., top_k={self._cached.top_k})`, or leave it to the callback."
            )
        check_tokens(buffer.max_token, "The replay buffer holds", model)

    def _check_prior(self, model: LanguageModel) -> None:
        prior = None if self._data is None else self._data.prior
        if prior is None:
            return
        check_tokens(prior.max_token, "The prior rows hold", model)
        # The last token of a row is a target and no more.
        if model.context is not None and prior.length - 1 > model.context:
            raise MisconfigurationException(
                f"The prior rows have up to {prior.length} tokens, but {type(model.module).__name__} takes "
                f"{model.context} at most. Cut them to that."
            )

    def _refuse_what_has_no_effect(self, reference: ReferenceName | Reference) -> None:
        """Refuse arguments of the constructor that would be ignored beside others."""
        sampling = self.rows.generator.sampling
        if isinstance(self.reference.reference, Cached) and (self.source == "live" or self.loss.rows == "new"):
            raise ValueError(
                "`reference='cached'` keeps what the reference says of its own samples. Rows of "
                f"{'the live model' if self.source == 'live' else 'the new task'} are not among them: use another "
                "reference."
            )
        if self.source == "live" and getattr(sampling.sampler, "reference_only", False):
            raise ValueError(
                f"{type(sampling.sampler).__name__} samples a model whose weights stay as they are, and "
                "`source='live'` asks for samples of the model as it trains. Use `source='reference'`."
            )
        changed = [f"sampling.{name}" for name in sampling.changed]
        values = {
            "source": self.source != "reference",
            "replay_fraction": self.replay_fraction is not None,
            "sequence_length": self.sequence_length is not None,
            "refill_rows": self.rows.rows != "auto",
            "uses_per_sample": self.rows.uses != 1,
            "background": self.rows.background,
        }
        changed += [name for name, value in values.items() if value]
        if self.loss.rows == "new" and changed:
            raise ValueError(
                f"{type(self.loss).__name__} takes the loss on the new rows and samples nothing, so "
                f"{', '.join(f'`{name}`' for name in changed)} would have no effect. Leave it out."
            )
        if self.loss.rows == "batch" and self.step.coefficient != _COEFFICIENT:
            raise ValueError(
                "With `loss='mixed'` the user's own loss sees the replay rows and nothing is added to it, so "
                "`coefficient` would have no effect. Leave it out."
            )
        if self.source == "live" and not self.loss.needs_reference and reference != "auto":
            raise ValueError(
                f"With `source='live'`, {type(self.loss).__name__} asks no reference, so `reference` would have no "
                "effect. Leave it out."
            )

    def _find_tokenizer(self, trainer: pl.Trainer) -> Any:
        holders = (self, trainer.datamodule, trainer.lightning_module)  # type: ignore[attr-defined]
        return next((held for holder in holders if (held := getattr(holder, "tokenizer", None)) is not None), None)

    def _log_hparams(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the arguments together with the user's own hyper-parameters, since TensorBoard shows one record alone."""
        users: dict[str, Any] = {}
        for holder in (trainer.datamodule, pl_module):  # type: ignore[attr-defined]
            if holder is not None and getattr(holder, "_log_hyperparams", False):
                users |= dict(holder.hparams_initial)
        for logger in trainer.loggers:
            logger.log_hyperparams(users | {"SelfGeneratedReplay": self.hparams})

    def _follow(self, trainer: pl.Trainer, model: LanguageModel) -> None:
        """Let an average take its step, once for each optimizer step, at which several batches may end.

        A checkpoint may have been saved between the optimizer's step and the average's, by a callback before this one.
        """
        if self._followed_step is not None and self._followed_step != trainer.global_step:
            self.reference.follow(model)
        self._followed_step = trainer.global_step

    def _release(self) -> None:
        """Leave the module and the datamodule as they were found."""
        while self._undo:
            self._undo.pop()()
        self._model = self._drawn_from = None
        self._feed.source = None
