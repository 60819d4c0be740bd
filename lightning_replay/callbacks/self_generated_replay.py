"""The callback that replays the model's own samples."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.callbacks.budget import ForgettingBudget
from lightning_replay.callbacks.checks import (
    DEFAULT_COEFFICIENT,
    check_numbers,
    refuse_what_has_no_effect,
)
from lightning_replay.callbacks.refill import Fit, SampledRows
from lightning_replay.callbacks.replay_log import ReplayLog
from lightning_replay.callbacks.replay_loss import LossName, ReplayLoss, replay_loss_of
from lightning_replay.callbacks.run_length import steps_of_the_run
from lightning_replay.callbacks.supply import RowSupply, Source
from lightning_replay.callbacks.training_step import ReplayStep
from lightning_replay.data.feed import RowFeed
from lightning_replay.data.replay import ReplayDataModule
from lightning_replay.data.share import REPLAY_FRACTION, ReplayShare
from lightning_replay.data.sources import RowSource
from lightning_replay.models.language_model import LanguageModel, find_language_model, find_tokenizer
from lightning_replay.references.keeper import ReferenceKeeper
from lightning_replay.references.reference import Reference, ReferenceName, reference_of
from lightning_replay.sampling.rows import RowGenerator
from lightning_replay.sampling.sampling import Sampling
from lightning_replay.utilities.distributed import check_strategy
from lightning_replay.utilities.logging import log_hparams, log_verdict, next_step, plain
from lightning_replay.utilities.validation import check_choice, check_package

__all__ = ["SelfGeneratedReplay"]

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

    Logged at every logging step and after the last step: of the last step that had rows, ``replay/loss`` (nats a token,
    without the coefficient), ``replay/coefficient``, ``replay/age`` (optimizer steps since its rows were sampled) and
    ``replay/uses`` (how often they had been drawn); ``replay/buffer_fill``; ``replay/reuse_gap``, if rows are used
    again (how much lower the replay loss is on them than on rows drawn for the first time, in nats a token, as
    ``ReuseGap`` describes; above 0 if rows are learned by heart); what a ``ForgettingBudget`` logs; and, as totals,
    ``replay/sampling_seconds``, ``replay/loss_seconds`` (without the backward), ``replay/rows_sampled`` and
    ``replay/dropped/<filter>``. At each refill: a few samples as text, and ``replay/quality/<measure>`` (see
    ``lightning_replay.sampling.statistics``). The arguments are hyper-parameters under ``SelfGeneratedReplay/``.

    Note:
        If the replay fraction is 0, nothing is sampled, copied or wrapped, except for ``"lwf"``, which has no replay
        rows. Sampling touches neither the global random state nor the modes of the model.

    Note:
        With ``ReplayDataModule(buffer=folder)``, a folder that ``lightning-replay generate`` wrote, nothing is sampled:
        rows are read when they are due. ``reference="cached"`` takes the log-probabilities that are kept with them.

    Note:
        ``BatchSizeFinder`` and ``LearningRateFinder`` try steps before π is taken, so without replay and without a
        trace. Leave memory for the replay rows and the reference.

    Note:
        With several processes, each samples a part of a refill, and all have the rows that one process would have.
        Each logs the replay loss, age and uses of its own rows. With ``"mixed"`` and ``"lwf"``, the strategy averages
        the processes' losses as it averages the user's own, without weighing them by their rows.

    Args:
        loss: What is added to the loss of the step. ``"kl"``: divergence from the reference model to the trained one
            on replay rows, ``KL(direction, temperature)``. ``"ntp"``: next-token loss on them, ``NextToken()``.
            ``"mixed"``: rows join the batch of a ``ReplayDataModule``, and the user's own loss sees them. ``"lwf"``:
            the divergence on the *new* rows, ``LwF(temperature)``. Or a ``ReplayLoss`` of your own.
        coefficient: What the replay loss is multiplied by: a number, or a function of the optimizer step. High values
            protect more and slow the new task down. If batches are so small that some go without a replay row, the rows
            that join a later one are weighed for these too, so a coefficient means the same for batches of any size.
            The steps then differ in size, as with ``every_n_steps``: clipping gradients can undo this, unless batches
            are accumulated. Or ``ForgettingBudget(0.05)``: how much may be forgotten.
        reference: Which model is π. ``"auto"``: a fresh PEFT adapter switched off, which is exact and free; else
            ``"copy"``. ``"copy"``: a frozen copy of the weights at fit start, ``Copy(...)``: exact, for the memory of a
            second model. ``"adapter"``: the adapter switched off, or an error. ``"cached"``: log-probabilities kept
            beside the rows, ``Cached(top_k)``, so that training needs no second model. Without an adapter to switch
            off, all rows are then sampled before the first step, as many as the run uses, and never replaced.
            ``"ema"``: an exponential moving average of the weights, ``EMA(decay)``, which protects against sudden
            change, not against slow change. Or another model: a module, or ``Model(folder_or_name)``; or a
            ``Reference`` of your own.
        sampling: How rows are sampled.
        source: Whose samples to replay. ``"reference"``: those of the reference model, as the paper does.
            ``"live"``: those of the model as it trains. With ``"ntp"`` that needs no second model, but it replays what
            the model still knows, so what is lost stays lost. With ``"kl"``, the divergence to the reference on such
            rows pulls back what has drifted wherever the model still goes.
        replay_fraction: Share of replay rows among all rows, in [0, 1). By default 0.1, the least that kept 97% of what
            is forgotten without replay; the paper's is 0.2. A ``ReplayDataModule`` has its own.
        sequence_length: Tokens in a replay row. By default that of the rows in the first training batch, or of the
            datamodule's own buffer.
        refill_rows: Rows to sample at a time. Larger refills sample faster, up to 256 rows. ``"auto"``: up to 256, in
            even parts of what the run uses, or all of it if rows can't be replaced. How many of them are decoded
            together depends only on memory.
        uses_per_sample: How often a row is drawn before it is replaced; 1 in the paper. ``"auto"``: at first
            twice, or once in a run that would then have fewer than 170 different rows. Then the gap of each refill,
            ``replay/reuse_gap``, changes the number by one: less if it is above twice its standard error and a quarter
            of the replay loss, else more, up to 4; at 1 there is no gap, and the number stays. So it does if rows
            can't be replaced (``"cached"``) and with real prior rows. A loss without a reference, such as ``"ntp"``,
            learns rows by heart at once, so ``"auto"`` is 1; so it is for rows of a folder.
        every_n_steps: Replay rows go only with every so many optimizer steps: those of all steps since the last time,
            so the same rows in fewer and larger batches. Their loss is multiplied by the number of batches that they
            belong to, so that the gradient of a cycle of steps is the same in sum. The steps differ in size: gradient
            clipping and adaptive optimizers see the large gradients. With gradient accumulation, all batches of such a
            step take an equal part. Rows of a cycle that the run does not complete are left out.
        background: Whether a thread samples the next refill on one core while the model trains. It needs a frozen copy
            as the reference, and pays if a core is idle. The samples are the same.
        tokenizer: Decodes the previews and has start and end tokens. By default the datamodule's or the module's
            ``tokenizer`` attribute, if there is one.
        language_model: Where the language model is in the LightningModule, as an attribute path. By default its
            Hugging Face or PEFT model, else the child that holds all parameters, else the module itself.
        seed: Seed of sampling. By default the global seed at the first fit.

    Attributes:
        monitoring_seconds: What the monitors of the Trainer, of forgetting and of benchmarks, have taken in this fit;
            they add to it.

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
    resumed run samples new rows: it continues, but not bit for bit as if it had not stopped."""

    ignore_index: int = -100
    """The label that the user's loss leaves out, for ``loss="lwf"``; negative labels always are."""

    def __init__(
        self,
        loss: LossName | ReplayLoss = "kl",
        coefficient: float | Callable[[int], float] | ForgettingBudget = DEFAULT_COEFFICIENT,
        reference: ReferenceName | Reference | nn.Module = "auto",
        sampling: Sampling = Sampling(),  # noqa: B008
        source: Source = "reference",
        *,
        replay_fraction: float | None = None,
        sequence_length: int | None = None,
        refill_rows: int | Literal["auto"] = "auto",
        uses_per_sample: int | Literal["auto"] = "auto",
        every_n_steps: int = 1,
        background: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        language_model: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.hparams = plain({name: value for name, value in locals().items() if name != "self"})
        """The arguments as hyper-parameters: numbers and texts as they are, objects as mappings."""

        check_choice("source", source, Source)
        check_numbers(refill_rows, uses_per_sample, every_n_steps, sequence_length, seed)
        self._feed = RowFeed(ReplayShare(REPLAY_FRACTION if replay_fraction is None else replay_fraction))
        self.loss = replay_loss_of(loss)
        self.source: Source = source
        self.replay_fraction = replay_fraction
        self.every_n_steps = every_n_steps
        self.sequence_length = sequence_length
        self.tokenizer = tokenizer
        self.language_model = language_model
        self.seed = seed
        self.reference = ReferenceKeeper(reference_of(reference))
        if isinstance(coefficient, ForgettingBudget):
            coefficient.check(self.loss, self.reference.reference, source)
        self.step = ReplayStep(self.loss, coefficient)
        cached = self.loss.cached(self.reference.reference)
        self.rows = SampledRows(
            RowGenerator(sampling),
            rows=refill_rows,
            length=sequence_length,
            uses=1 if uses_per_sample == "auto" and not self.loss.needs_reference else uses_per_sample,
            top_k=0 if cached is None else cached.top_k,
            temperature=self.loss.temperature,
            background=background,
        )
        """The sampled rows."""
        refuse_what_has_no_effect(
            self.loss,
            coefficient,
            self.reference.reference,
            source,
            sampling,
            {
                "replay_fraction": replay_fraction is not None,
                "sequence_length": sequence_length is not None,
                "every_n_steps": every_n_steps != 1,
            }
            | self.rows.changed,
        )

        self._supply = RowSupply(self.loss, source, self.reference, self.rows, sequence_length)
        self._model: LanguageModel | None = None
        self._data: ReplayDataModule | None = None
        self._drawn_from: RowSource | None = None
        self._followed_step: int | None = None
        self._log = ReplayLog(self.step, self.rows)
        self._checkpoint_loaded = False
        self.monitoring_seconds = 0.0
        self._undo: list[Callable[[], object]] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_package(trainer, "The Trainer")
        if stage != "fit":
            return
        # Not earlier: a checkpoint saved after the last fit still needs that fit's reference.
        self.reference.begin_fit(trainer)
        self._followed_step, self._checkpoint_loaded, self.monitoring_seconds = None, False, 0.0
        self.step.forget()
        self._log.forget()
        if self.loss.rows != "batch" and not pl_module.automatic_optimization:
            pure = self.loss.pure_function
            function = f"add `lightning_replay.{pure}` to your loss" if pure else "add the loss"
            raise MisconfigurationException(
                f"{type(self.loss).__name__} is added to the loss that `training_step` returns, but "
                f"{type(pl_module).__name__} optimizes manually (`automatic_optimization=False`). Use `loss='mixed'` "
                f"with a ReplayDataModule, and {function} yourself."
            )
        self._data = self._find_data(trainer)
        if self.loss.rows == "new" or self.feed.share.fraction:
            check_strategy(trainer, "SelfGeneratedReplay")
        if self._data is not None:
            # Lightning logs them with the module's. Of two separate records, TensorBoard would show only one.
            self._data.save_hyperparameters({"SelfGeneratedReplay": self.hparams})
        elif self.loss.rows != "new":
            self._feed = RowFeed(ReplayShare(self._feed.share.fraction))
            self._feed.begin(trainer)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restored = not trainer.strategy.restore_checkpoint_after_setup
        if trainer.ckpt_path is not None and restored and not self._checkpoint_loaded:
            raise MisconfigurationException(
                f"The run can't continue from {trainer.ckpt_path}, which was saved with `save_weights_only=True`: it "
                "has the weights, but neither the state of the optimizers nor that of the callbacks, so the model "
                "before finetuning and the state of sampling are missing. Resume from a full checkpoint, or load the "
                "weights into the module and fit without `ckpt_path`: the reference is then the model as loaded."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.reference.begin_training()
        if self._data is None:
            log_hparams(trainer, {"SelfGeneratedReplay": self.hparams})
        if self.loss.rows != "new" and not self.feed.share.fraction:
            return
        self._model = model = find_language_model(pl_module, self.language_model)
        self._log.begin_training()
        if self.loss.rows == "new":
            self.reference.get(trainer, model)
            self._wrap_step(trainer, pl_module, model, None)
            self._follow(trainer, model)
            return
        if self.seed is None:
            self.seed = self.feed.processes.broadcast(torch.initial_seed())
        tokenizer = find_tokenizer(self, trainer.datamodule, pl_module)  # type: ignore[attr-defined]
        self._space_out(trainer)
        fit = Fit(trainer, model, self.feed, self._data, tokenizer, self.step.reuse_gap, self.seed, self.previews)
        self._drawn_from, disconnect = self._supply.connect(fit)
        self._undo.append(disconnect)
        if self.loss.rows == "replay":
            self._wrap_step(trainer, pl_module, model, self.feed)
        self._follow(trainer, model)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log.begin_epoch()

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
        self._log.write(pl_module, self.feed, self._drawn_from)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._model is not None:
            self._log.end(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._model is None:
            return
        feed = None if self.loss.rows == "new" else self.feed
        rank_zero_info(self._log.summary(feed, self.monitoring_seconds))
        if self.step.budget is not None:
            summary = self.step.budget.summary()
            rank_zero_info(summary)
            log_verdict(trainer, summary, next_step(trainer))

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
        rows = checkpoint.get(_ROWS_KEY, {"buffer": None, "uses_now": 0, "heeded": 0})
        if "left_out" in rows:
            rank_zero_warn(
                "The checkpoint was saved with `SelfGeneratedReplay.save_rows = False`, so new replay rows are "
                "sampled: the run does not continue bit for bit as if it had not stopped."
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
            "of_last_rows": dict(self._log.of_last_rows),
            **self.step.state_dict(),
            "share": self._feed.share.state_dict(),
            **self.rows.generator.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]
        self._followed_step = state_dict["followed_step"]
        self._log.of_last_rows = dict(state_dict["of_last_rows"])
        self.step.load_state_dict(state_dict)
        self._feed.share.load_state_dict(state_dict["share"])
        self.rows.generator.load_state_dict(state_dict)

    @property
    def drawn(self) -> ReplayRows | None:
        """This rank's replay rows of the current batch, on the CPU; None if it has none."""
        return self.feed.drawn

    @property
    def feed(self) -> RowFeed:
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

    def _space_out(self, trainer: pl.Trainer) -> None:
        """Let rows go with every n-th step only."""
        if self.every_n_steps == 1:
            return
        if self.feed.share.mode == "replace":
            raise MisconfigurationException(
                f"`mode='replace'` keeps the size of each batch, and `every_n_steps={self.every_n_steps}` makes some "
                "batches larger. Use `mode='append'`, or leave out `every_n_steps`."
            )
        steps = steps_of_the_run(trainer)
        if steps is not None and steps < self.every_n_steps:
            raise MisconfigurationException(
                f"With `every_n_steps={self.every_n_steps}` no replay row would join this run of {steps} optimizer "
                "steps. Use a smaller number."
            )
        self.feed.every_n_steps = self.every_n_steps
        self._undo.append(functools.partial(setattr, self.feed, "every_n_steps", 1))

    def _wrap_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: LanguageModel, feed: RowFeed | None
    ) -> None:
        reference = functools.partial(self.reference.get, trainer, model)
        if self.step.budget is not None and self.loss.cached(self.reference.reference) is None:
            reference()  # rows of a folder and the next-token loss do without, the drift does not
        only_sampled = feed is not None and (self._data is None or self._data.prior is None)
        gap = self.step.reuse_gap if only_sampled else None
        seed, ignored = self.seed or 0, self.ignore_index
        self._undo.append(self.step.wrap(trainer, pl_module, model, reference, feed, seed, ignored, gap))

    def _follow(self, trainer: pl.Trainer, model: LanguageModel) -> None:
        """Let an average and a budget take their step, once for each optimizer step, at which several batches may end.

        A checkpoint may have been saved between the optimizer's step and theirs, by a callback before this one.
        """
        if self._followed_step is not None and self._followed_step != trainer.global_step:
            self.reference.follow(model)
            if self.step.budget is not None:
                self.step.budget.update(trainer.global_step, self.feed.processes)
        self._followed_step = trainer.global_step

    def _release(self) -> None:
        """Leave the module and the datamodule as they were found."""
        while self._undo:
            self._undo.pop()()
        self._model = self._drawn_from = None
