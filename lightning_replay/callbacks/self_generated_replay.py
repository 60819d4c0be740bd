"""The callback that replays the model's own samples."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_replay.buffers.shards import ReplayShards
from lightning_replay.callbacks.refill import Refiller, Supply
from lightning_replay.callbacks.training_step import Forward, ReplayObjective
from lightning_replay.data.replay import ReplayDataModule
from lightning_replay.losses import Divergence
from lightning_replay.models.language_model import LanguageModel, check_tokens, find_language_model
from lightning_replay.references.adapters import adapter_is_idle
from lightning_replay.references.cached import cache_reference
from lightning_replay.references.keeper import ReferenceKeeper
from lightning_replay.references.models import LiveModel, ReferenceModel
from lightning_replay.references.reference import EMA, Adapter, Auto, Cached, Copy, Reference, ReferenceName
from lightning_replay.sampling.prompts import PromptsLike
from lightning_replay.sampling.rows import LossOn, RowGenerator
from lightning_replay.sampling.samples import Filter, Sampler
from lightning_replay.utilities.distributed import check_strategy
from lightning_replay.utilities.logging import plain
from lightning_replay.utilities.validation import check_choice, check_package, is_number, is_whole

__all__ = ["SelfGeneratedReplay"]

Loss = Literal["kl", "ntp", "mixed", "lwf"]
Source = Literal["reference", "live"]


class SelfGeneratedReplay(Callback):
    r"""Replays rows that the model itself wrote, so that finetuning does not make it forget (arXiv 2605.26097).

    Before the first step it fills the buffer of the ``ReplayDataModule`` with samples, and whenever all of them have
    been used it samples new ones. With ``loss="kl"`` or ``"ntp"`` it adds

    .. math:: \text{coefficient} \cdot \text{replay loss}

    to what ``training_step`` returns. The step itself is not edited, and replay rows are hidden from the user's code,
    so any loss, metric or logging in ``training_step`` is as it was.

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
        Nothing is sampled, copied or wrapped where ``replay_fraction`` is 0, except for ``"lwf"``, which has no replay
        rows. Sampling touches neither the global random state nor the modes of the model.

    Note:
        With a folder of rows that ``lightning-replay generate`` wrote, ``ReplayDataModule(buffer=folder)``, nothing is
        sampled: each row is read when it is due. ``reference="cached"`` takes the log-probabilities that were generated
        with them. What is said below of sampling then holds of that command, whose settings the folder keeps.

    Note:
        ``BatchSizeFinder`` and ``LearningRateFinder`` try steps before π is taken, so without replay, and what they try
        leaves no trace. Leave memory for the replay rows and the reference.

    Note:
        Of several processes, each samples a part of a refill, and all have the rows that one process would have.
        Each logs the replay loss, age and uses of its own rows. With ``"mixed"`` and ``"lwf"``, the processes' losses
        are averaged as the strategy averages the user's own, whatever the number of rows behind each.

    Args:
        loss: ``"kl"``: divergence from the reference model to the trained one on replay rows, over the full
            vocabulary. ``"ntp"``: next-token loss on them. ``"mixed"``: rows join the batch, and the user's own loss
            sees them; nothing is wrapped, and ``coefficient`` is not used. ``"lwf"``: the divergence on the *new* rows
            (learning without forgetting, Li & Hoiem 2016); there are no replay rows, so no sampling, and a
            ``ReplayDataModule`` is not needed. It protects what the reference says of the new text, and prior text only
            as far as that goes.
        coefficient: What the replay loss is multiplied by: a number, or a function of the optimizer step. High values
            protect more and slow the new task down.
        source: Whose samples to replay. ``"reference"``: those of the reference model, as the paper does.
            ``"live"``: the model as it trains. With ``"ntp"`` that needs no second model, but it replays what the model
            still knows, so what is lost stays lost; with ``"kl"``, the divergence to the reference on such rows is an
            anchor, which pulls back what has drifted wherever the model still goes.
        divergence: ``"forward"``: KL(π‖θ). ``"reverse"``: KL(θ‖π). ``"jensen_shannon"``: the symmetric one of both.
        divergence_temperature: Divides the logits of both models in the divergence.
        reference: Which model is π. ``"auto"``: a fresh PEFT adapter switched off, which is exact and free; else
            ``"copy"``. ``"copy"``: a frozen copy of the weights at fit start: exact, for the memory of a second model.
            ``"adapter"``: the adapter switched off, or an error. ``"cached"``: log-probabilities kept beside the rows,
            so that no second model and no reference forward is needed in training: exact for the ``reference_top_k``
            likeliest tokens of a position, one figure for all others together. Without an adapter to switch off, all
            rows are then sampled before the first step, as many as the run uses, and never replaced. ``"ema"``: an
            exponential moving average of the weights, which protects against sudden change, not against slow change.
        reference_dtype: What a copy's weights are kept in, as ``"bfloat16"``; by default as the model's.
        reference_device: Where a copy is kept; by default where the model is.
        reference_from: ``"fit"``: each ``trainer.fit`` takes π again, as the paper does for each task of a sequence.
            ``"first"``: keep that of the first fit.
        reference_checkpoint: Where a copy is saved. ``"inside"``: in each checkpoint, which is larger by the model's
            weights and whole by itself: it can be moved, uploaded and saved to any path, as checkpoints are.
            ``"beside"``: once in each folder of checkpoints, as ``reference-<hash>.safetensors``, which the checkpoints
            name; move the folder as a whole. A missing or altered file is refused. An average is always inside;
            adapters and cached log-probabilities need no copy.
        reference_top_k: Log-probabilities kept for each position with ``"cached"``, at 6 bytes each.
        ema_decay: Share of the average that each optimizer step keeps, with ``"ema"``.
        prompts: What samples begin with. By default the beginning-of-sequence token, else the end-of-text token. A
            list of lists of token ids; a list of texts, or a column of a dataset; each in turn, in random order, so
            that each begins an even share. ``"chat"``: the tokenizer's chat template up to the user's turn: the model
            writes the instruction, and after the template's opening of the reply the answer, one conversation a row.
            Replay losses are not taken on what the model was given.
        loss_on: With ``prompts="chat"``, ``"sample"`` takes the replay loss on instruction and answer, ``"answer"``
            on the answer alone.
        sequence_length: Tokens in a replay row. By default that of the rows in the first training batch, or of the
            datamodule's own buffer.
        sample_length: Tokens sampled in one piece, a multiple of the row's. Longer pieces are cut into rows, so that
            some rows begin in mid-text, as rows of packed text do; without them, what the model knows of such rows
            is not protected. By default two rows, where the model's context allows it and no prompts are given; with
            the row's own length every row begins with its prompt, as in the paper.
        refill_rows: Rows to sample at a time. Larger refills sample faster, up to 256 rows. ``"auto"``: up to 256, in
            even parts of what the run uses, or all of it where rows can't be replaced. How many of them are decoded
            together depends on memory alone: what keys and values take, and less where memory runs out.
        background: Whether the next refill is sampled by a thread on one core while the model trains. It needs a
            frozen copy as the reference, and pays where a core is idle. The samples are the same.
        compile_sampling: Whether sampling goes through `torch.compile`, with keys and values of a fixed size; on CUDA
            with CUDA graphs. The compiler takes its time once for each shape; on a CPU it has gained nothing here.
        forward: ``"separate"``: replay rows take a forward of their own, after the user's. ``"joint"``: they travel
            with the model's call in ``training_step``, which saves an accelerator the second call. The gradients are
            the same but for rounding. ``"auto"``: separate on a CPU, where it is faster, joint elsewhere.
        uses_per_sample: How often a row is drawn before it is replaced; 1 in the paper.
        temperature: Sampling temperature; 1, nothing truncated, is the model's own distribution.
        top_k: Sample from the likeliest ``top_k`` tokens alone.
        top_p: Sample from the likeliest tokens that together reach this probability.
        min_p: Sample from tokens that reach this share of the likeliest one's probability.
        stop_at_eos: Whether the end token ends a sample. By default it doesn't, as in the paper. Shorter samples
            follow one another in a row, as documents in packed text do.
        filters: Which samples to keep; see ``lightning_replay.filters``.
        sampler: A function to sample with instead of ``sample_rows``; see ``lightning_replay.sampling.Sampler``. It
            sees to temperature, truncation and end tokens itself. Of several processes, each calls it with prompts and
            a generator of its own.
        tokenizer: Decodes the previews and tells start and end tokens. By default the datamodule's or the module's
            ``tokenizer`` attribute, where there is one.
        language_model: Where the language model is in the LightningModule, as an attribute path. By default its
            Hugging Face or PEFT model, else the child that holds all parameters, else the module itself.
        ignore_index: The label that the user's loss leaves out, where the model computes the loss itself.
        previews: How many samples of each refill to log as text; 0 for none.
        seed: Seed of sampling. By default the global seed at the first fit.

    Attributes:
        monitoring_seconds: What the ``ForgettingMonitor`` callbacks of the Trainer have taken in
            this fit; they add to it.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: Before the first step, if the run can't work: no ``ReplayDataModule``, manual
            optimization with a loss of ours, no logits found, samples that don't fit the model, a reference
            that can't be had, a strategy under which the model can't be called outside of training.
        RuntimeError: If the filters drop every sample.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> replay = SelfGeneratedReplay(loss="kl", coefficient=3.0)
        >>> trainer = Trainer(callbacks=[replay], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        loss: Loss = "kl",
        coefficient: float | Callable[[int], float] = 10.0,
        source: Source = "reference",
        *,
        divergence: Divergence = "forward",
        divergence_temperature: float = 1.0,
        reference: ReferenceName | Reference = "auto",
        reference_dtype: str | torch.dtype | None = None,
        reference_device: str | torch.device | None = None,
        reference_from: Literal["fit", "first"] = "fit",
        reference_checkpoint: Literal["inside", "beside"] = "inside",
        reference_top_k: int = 64,
        ema_decay: float = 0.999,
        prompts: PromptsLike | None = None,
        loss_on: LossOn = "sample",
        sequence_length: int | None = None,
        sample_length: int | None = None,
        refill_rows: int | Literal["auto"] = "auto",
        background: bool = False,
        compile_sampling: bool = False,
        forward: Forward = "auto",
        uses_per_sample: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop_at_eos: bool = False,
        filters: Sequence[Filter] = (),
        sampler: Sampler | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        language_model: str | None = None,
        ignore_index: int = -100,
        previews: int = 3,
        seed: int | None = None,
    ) -> None:
        self.hparams = plain({name: value for name, value in locals().items() if name != "self"})
        """The arguments as hyper-parameters: numbers and texts as they are, all else by its name."""

        check_choice("loss", loss, Loss)
        check_choice("source", source, Source)
        check_choice("divergence", divergence, Divergence)
        check_choice("forward", forward, Forward)
        if not is_number(divergence_temperature) or not divergence_temperature > 0:
            raise ValueError(f"`divergence_temperature` is above 0; got {divergence_temperature!r}.")
        if refill_rows != "auto" and not is_whole(refill_rows, 1):
            raise ValueError(f"`refill_rows` is how many rows to sample at a time, at least 1; got {refill_rows!r}.")
        for name, number in {"uses_per_sample": uses_per_sample, "reference_top_k": reference_top_k}.items():
            if not is_whole(number, 1):
                raise ValueError(f"`{name}` is at least 1; got {number!r}.")
        if sequence_length is not None and not is_whole(sequence_length, 2):
            raise ValueError(f"`sequence_length` is a number of tokens, at least 2; got {sequence_length!r}.")
        if not is_whole(previews, 0):
            raise ValueError(f"`previews` is how many samples to log as text, at least 0; got {previews!r}.")
        if seed is not None and not is_whole(seed, 0):
            raise ValueError(f"`seed` is a whole number, at least 0, or None; got {seed!r}.")
        if not isinstance(reference, Reference):
            check_choice("reference", reference, ReferenceName)
            copied: dict[str, Any] = {"dtype": reference_dtype, "device": reference_device, "since": reference_from}
            kinds: dict[str, Reference] = {
                "auto": Auto(save=reference_checkpoint, **copied),
                "copy": Copy(save=reference_checkpoint, **copied),
                "adapter": Adapter(since=reference_from),
                "cached": Cached(top_k=reference_top_k, since=reference_from),
                "ema": EMA(decay=ema_decay, **copied),
            }
            reference = kinds[reference]
        if isinstance(reference, Cached):
            reference_top_k = reference.top_k
        if isinstance(reference, Cached) and (source == "live" or loss == "lwf"):
            raise ValueError(
                "`reference='cached'` keeps what the reference says of its own samples. Rows of "
                f"{'the live model' if source == 'live' else 'the new task'} are not among them: use another reference."
            )
        if source == "live" and getattr(sampler, "reference_only", False):
            raise ValueError(
                f"{type(sampler).__name__} samples a model whose weights stay as they are, and `source='live'` asks "
                "for samples of the model as it trains. Use `source='reference'`."
            )
        self.loss: Loss = loss
        self.source: Source = source
        self.reference_top_k = reference_top_k
        self.sequence_length = sequence_length
        self.uses_per_sample = uses_per_sample
        self.tokenizer = tokenizer
        self.language_model = language_model
        self.seed = seed

        self.reference = ReferenceKeeper(reference)
        self.objective = ReplayObjective(
            loss, coefficient, divergence, divergence_temperature, self.reference, forward, ignore_index
        )
        generator = RowGenerator(
            prompts=prompts,
            sample_length=sample_length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            stop_at_eos=stop_at_eos,
            loss_on=loss_on,
            filters=filters,
            sampler=sampler,
            compile_sampling=compile_sampling,
        )
        self.refiller = Refiller(
            generator,
            rows=refill_rows,
            length=sequence_length,
            uses=uses_per_sample,
            top_k=reference_top_k if self._caches else 0,
            temperature=divergence_temperature,
            background=background,
            previews=previews,
        )

        self._model: LanguageModel | None = None
        self._data: ReplayDataModule | None = None
        self._followed_step: int | None = None
        self._checkpoint_loaded = False
        self.monitoring_seconds = 0.0
        self._compared: str | None = None
        self._began, self._rows_before = (0.0, 0.0, 0.0), 0
        self._undo: list[Callable[[], None]] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_package(trainer, "The Trainer")
        if stage != "fit":
            return
        # Not earlier: a checkpoint saved after the last fit still needs that fit's reference.
        self.reference.begin_fit(trainer)
        self._followed_step, self._checkpoint_loaded, self.monitoring_seconds = None, False, 0.0
        self._data = None if self.loss == "lwf" else _replay_datamodule(trainer)
        if self._data is None or self._data.replay_fraction:
            check_strategy(trainer, "SelfGeneratedReplay")
        if self._data is not None:
            # Lightning logs them with the module's: of two records, TensorBoard would show one alone.
            self._data.save_hyperparameters({"SelfGeneratedReplay": self.hparams})
        if self.loss != "mixed" and not pl_module.automatic_optimization:
            function = {"kl": "forward_kl", "lwf": "forward_kl", "ntp": "next_token_loss"}[self.loss]
            raise MisconfigurationException(
                f"`loss={self.loss!r}` is added to the loss that `training_step` returns, but "
                f"{type(pl_module).__name__} optimizes manually (`automatic_optimization=False`). Use `loss='mixed'` "
                f"and add `lightning_replay.{function}` to your loss yourself where you want it."
            )

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
        data = self._data
        if self.loss != "lwf" and (data is None or not data.replay_fraction):
            return
        self._model = model = find_language_model(pl_module, self.language_model)
        self._began, self._rows_before = self._seconds_so_far(), self.refiller.generator.rows
        if data is None:
            for logger in trainer.loggers:
                logger.log_hyperparams({"SelfGeneratedReplay": self.hparams})
            self.reference.get(trainer, model)
            self._undo.append(self.objective.wrap(trainer, pl_module, model, None))
            return
        if self.seed is None:
            self.seed = data.processes.first(torch.initial_seed())
        if self.reference.resumed_from(trainer) is None and self.reference.reference.since == "fit":
            self.refiller.forget(data)  # what an earlier fit left in it came from another reference
        if data.shards is not None:
            self._check_shards(trainer, model, data.shards)
        # Rows that were generated ahead take no second model, unless the divergence does.
        source = self._source(trainer, model) if data.shards is None or self._caches else None
        if self.loss == "kl" and not self._caches:
            self.reference.get(trainer, model)
        self._check_fit(pl_module, model, data)
        if self._caches and source is not None:
            self._cache_prior(trainer, model, data, source)

        lasting = data.shards is None and self._never_refills(model)
        if data.shards is None and source is not None:
            tokenizer, resumed = self._find_tokenizer(pl_module, data), self._trained_by(trainer)
            self.refiller.begin(Supply(trainer, model, data, source, tokenizer, self.seed, lasting, resumed))
        data.uses_per_sample = None if lasting else self.uses_per_sample
        data.joins_batch = self.loss == "mixed"
        self._undo += [functools.partial(_disconnect, data), self.refiller.end]
        if self.loss != "mixed":
            self._undo.append(self.objective.wrap(trainer, pl_module, model, data))
        self._follow(trainer, model)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._model is None:
            return
        self._follow(trainer, self._model)
        values: dict[str, Any] = {}
        if self.objective.last_loss is not None:
            values |= {
                "replay/loss": self.objective.last_loss,
                "replay/coefficient": self.objective.last_coefficient,
                "replay/loss_seconds": self.objective.seconds,
            }
        if self._data is not None and self._data.buffer is not None:
            buffer, drawn, generator = self._data.buffer, self._data.drawn, self.refiller.generator
            values |= {
                "replay/buffer_fill": len(buffer) / buffer.capacity,
                "replay/sampling_seconds": generator.seconds,
                "replay/rows_sampled": float(generator.rows),
            }
            values |= {f"replay/dropped/{name}": float(number) for name, number in generator.dropped.items()}
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
        if self._data is not None:
            rows = self.refiller.generator.rows - self._rows_before
            length = self._data.buffer.length if self._data.buffer is not None else 0
            line += (
                f", {sampling / total:.1%} into sampling {rows * length:,} tokens; trained on "
                f"{self._data.new_tokens:,} new and {self._data.replay_tokens:,} replayed tokens"
            )
        rank_zero_info(f"{line}; monitoring took {self.monitoring_seconds / total:.1%}.")

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.reference.save(trainer, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._checkpoint_loaded = True
        self.reference.load(trainer, checkpoint)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "followed_step": self._followed_step,
            "loss_seconds": self.objective.seconds,
            **self.refiller.generator.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]
        self._followed_step = state_dict.get("followed_step")
        self.objective.seconds = state_dict.get("loss_seconds", 0.0)
        self.refiller.generator.load_state_dict(state_dict)

    @property
    def _caches(self) -> bool:
        """Whether rows carry the reference's log-probabilities."""
        return self.loss == "kl" and isinstance(self.reference.reference, Cached)

    def _seconds_so_far(self) -> tuple[float, float, float]:
        """Of the clock, in sampling, and in the replay loss."""
        return time.perf_counter(), self.refiller.generator.seconds, self.objective.seconds

    def _never_refills(self, model: LanguageModel) -> bool:
        """Whether the reference is gone as soon as the model trains, so that rows have to last."""
        cached = isinstance(self.reference.reference, Cached)
        return cached and self.source == "reference" and self.reference.adapter(model) is None

    def _source(self, trainer: pl.Trainer, model: LanguageModel) -> ReferenceModel:
        if self.source == "live" or self._never_refills(model):
            return LiveModel(model)
        return self.reference.get(trainer, model)

    def _trained_by(self, trainer: pl.Trainer) -> str | None:
        """What has trained the model before this fit began, since its reference was taken."""
        if (checkpoint := self.reference.resumed_from(trainer)) is not None:
            return f"the run up to {checkpoint}"
        return "an earlier fit" if self.reference.reference.since == "first" and self.refiller.generator.rows else None

    def _cache_prior(
        self, trainer: pl.Trainer, model: LanguageModel, data: ReplayDataModule, source: ReferenceModel
    ) -> None:
        """Let real prior rows carry the reference's log-probabilities, as the sampled ones will."""
        prior = data.prior
        kept = self.reference.resumed_from(trainer) is not None or self.reference.reference.since == "first"
        if prior is None or (prior.top_k and kept):
            return
        top_k = self.reference_top_k if data.shards is None else data.shards.top_k
        with isolate_rng(), source.active() as active:
            data.prior = prior.with_cache(lambda rows: cache_reference(active, rows, top_k, self.refiller.temperature))

    def _check_shards(self, trainer: pl.Trainer, model: LanguageModel, shards: ReplayShards) -> None:
        """Refuse a folder of rows that this run can't use, or whose rows are not the reference's."""
        generator = self.refiller.generator
        sampling = {
            "source='live'": self.source == "live",
            "prompts": generator.prompts,
            "sampler": generator.sampler,
            "filters": generator.filters,
            "background": self.refiller.background,
        }
        given = [name for name, value in sampling.items() if value]
        shards.check_options(given, self.sequence_length, self.refiller.temperature if self._caches else None)
        # Once the model has trained, its weights no longer tell whether it wrote the rows.
        kept = self.reference.reference.since == "first" and self._compared == shards.manifest.identity
        shards.check_fits(model, adapter_is_idle(model), known=self.reference.resumed_from(trainer) is not None or kept)
        self._compared = shards.manifest.identity
        shards.with_log_probs = self._caches

    def _check_fit(self, pl_module: pl.LightningModule, model: LanguageModel, data: ReplayDataModule) -> None:
        """Refuse samples that the model has no room or no tokens for."""
        buffer = data.buffer
        if buffer is not None and self.sequence_length not in (None, buffer.length):
            raise MisconfigurationException(
                f"`sequence_length={self.sequence_length}`, but the datamodule's buffer holds rows of {buffer.length} "
                "tokens. Leave one of them out."
            )
        if self._caches and buffer is not None and not buffer.top_k:
            raise MisconfigurationException(
                "`reference='cached'` keeps log-probabilities beside the rows, but the datamodule's buffer keeps "
                f"none. Make it with `ReplayBuffer(..., top_k={self.reference_top_k})`, or leave it to the callback."
            )
        if buffer is not None:
            check_tokens(buffer.max_token, "The replay buffer holds", model)
        if data.prior is not None:
            check_tokens(data.prior.max_token, "The prior rows hold", model)
            # The last token of a row is a target and no more.
            if model.context is not None and data.prior.length - 1 > model.context:
                raise MisconfigurationException(
                    f"The prior rows have up to {data.prior.length} tokens, but {type(model.module).__name__} takes "
                    f"{model.context} at most. Cut them to that."
                )
            if data.prior_share == 1:
                return  # nothing will be sampled
        if data.shards is not None:
            return
        self.refiller.generator.bind(model, self._find_tokenizer(pl_module, data))
        length = buffer.length if buffer is not None else self.sequence_length
        if length is not None:
            self.refiller.generator.check_length(length, model)

    def _find_tokenizer(self, pl_module: pl.LightningModule, data: ReplayDataModule) -> Any:
        holders = (self, data, pl_module)
        return next((held for holder in holders if (held := getattr(holder, "tokenizer", None)) is not None), None)

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
        self._model = None


def _replay_datamodule(trainer: pl.Trainer) -> ReplayDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ReplayDataModule):
        given = "no datamodule" if data is None else type(data).__name__
        raise MisconfigurationException(
            f"SelfGeneratedReplay needs the batches of a ReplayDataModule, but the Trainer was given {given}. Wrap "
            "your data: `trainer.fit(module, datamodule=ReplayDataModule(your_datamodule_or_loader))`."
        )
    return data


def _disconnect(data: ReplayDataModule) -> None:
    data.refill = None
    data.uses_per_sample = 1
    data.joins_batch = True
    data.drawn = None
