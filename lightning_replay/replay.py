"""The callback that replays the model's own samples."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_replay.arguments import check_package, is_number, is_whole
from lightning_replay.batches import inputs_and_targets, row_length
from lightning_replay.buffer import ReplayBuffer, ReplayRows
from lightning_replay.datamodule import ReplayDataModule
from lightning_replay.filters import Filter
from lightning_replay.generation import LossOn, RowGenerator, cache_reference, check_tokens, stream
from lightning_replay.joint_forward import ObservedForward, joint_forward, observed_forward
from lightning_replay.language_model import LanguageModel, find_language_model
from lightning_replay.losses import (
    Divergence,
    divergence_from_top_k,
    forward_kl,
    jensen_shannon,
    next_token_loss,
    reverse_kl,
)
from lightning_replay.progress import refill_bar
from lightning_replay.prompts import PromptsLike
from lightning_replay.reference import LiveModel, Reference, ReferenceFrom, ReferenceKeeper, ReferenceModel
from lightning_replay.sampling import Sampler

__all__ = ["SelfGeneratedReplay"]

Loss = Literal["kl", "ntp", "mixed", "lwf"]
Source = Literal["reference", "live"]

_REFILL_ROWS = 256
"""Rows of a refill, where the user leaves it to us."""
_CACHED_ROWS, _CACHED_BYTES = 4096, 2**30
"""Rows sampled for a run of unknown length when there can be no refill, and what they may take in memory at most."""


class SelfGeneratedReplay(Callback):
    r"""Replays rows that the model itself wrote, so that finetuning does not make it forget (arXiv 2605.26097).

    Before the first step it fills the buffer of the :class:`~lightning_replay.ReplayDataModule` with samples, and
    whenever all of them have been used it samples new ones. With ``loss="kl"`` or ``"ntp"`` it adds

    .. math:: \text{coefficient} \cdot \text{replay loss}

    to what ``training_step`` returns. The step itself is not edited: replay rows travel with the language model's
    forward, hidden from the user's code, so any loss, metric or logging in ``training_step`` is as it was.

    Logged on every logging step: ``replay/loss`` (nats a token, without the coefficient), ``replay/coefficient``,
    ``replay/buffer_fill`` (share of the buffer that is filled), ``replay/age`` (optimizer steps since the rows of this
    step were sampled) and ``replay/uses`` (how often they have been drawn), ``replay/sampling_seconds``,
    ``replay/rows_sampled`` and ``replay/dropped/<filter>`` (totals so far). At each refill: ``replay/quality/`` with
    ``distinct_1`` and ``distinct_2`` (distinct n-grams over all n-grams), ``repetition`` (share of a sample's 4-grams
    that repeat earlier ones), ``log_prob`` (nats a token under the model sampled, which is π for
    ``source="reference"``), ``ended`` (share of samples with the end token) and ``length``; a few samples go to
    TensorBoard and Weights & Biases as text.

    Note:
        Nothing is sampled, copied or wrapped where ``replay_fraction`` is 0, except for ``"lwf"``, which has no replay
        rows. Sampling touches neither the global random state nor the modes of the model.

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
        refill_rows: Rows to sample at a time. Larger refills sample faster and need more memory for keys and values.
            ``"auto"``: 256, or all that the run uses where rows can't be replaced.
        uses_per_sample: How often a row is drawn before it is replaced; 1 in the paper.
        temperature: Sampling temperature; 1, nothing truncated, is the model's own distribution.
        top_k: Sample from the likeliest ``top_k`` tokens alone.
        top_p: Sample from the likeliest tokens that together reach this probability.
        min_p: Sample from tokens that reach this share of the likeliest one's probability.
        stop_at_eos: Whether the end token ends a sample. By default it doesn't, as in the paper. Shorter samples
            follow one another in a row, as documents in packed text do.
        filters: Which samples to keep; see :mod:`lightning_replay.filters`.
        sampler: A function to sample with instead of :func:`~lightning_replay.sampling.sample_rows`; see
            :data:`~lightning_replay.sampling.Sampler`. It sees to temperature, truncation and end tokens itself.
        tokenizer: Decodes the previews and tells start and end tokens. By default the datamodule's or the module's
            ``tokenizer`` attribute, where there is one.
        language_model: Where the language model is in the LightningModule, as an attribute path. By default its
            Hugging Face or PEFT model, else the child that holds all parameters, else the module itself.
        ignore_index: The label that the user's loss leaves out, where the model computes the loss itself.
        previews: How many samples of each refill to log as text.
        seed: Seed of sampling. By default the global seed at the first fit.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: Before the first step, if the run can't work: no ``ReplayDataModule``, manual
            optimization with a loss of ours, no logits found, samples that don't fit the model, a reference
            that can't be had.
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
        reference: Reference = "auto",
        reference_dtype: str | torch.dtype | None = None,
        reference_device: str | torch.device | None = None,
        reference_from: ReferenceFrom = "fit",
        reference_top_k: int = 64,
        ema_decay: float = 0.999,
        prompts: PromptsLike | None = None,
        loss_on: LossOn = "sample",
        sequence_length: int | None = None,
        sample_length: int | None = None,
        refill_rows: int | Literal["auto"] = "auto",
        uses_per_sample: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop_at_eos: bool = False,
        filters: Sequence[Filter] = (),
        sampler: Sampler | None = None,
        tokenizer: Any = None,
        language_model: str | None = None,
        ignore_index: int = -100,
        previews: int = 3,
        seed: int | None = None,
    ) -> None:
        _check_choice("loss", loss, Loss)
        _check_choice("source", source, Source)
        _check_choice("divergence", divergence, Divergence)
        if not callable(coefficient):
            _check_coefficient(coefficient, "`coefficient`")
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
        if reference == "cached" and (source == "live" or loss == "lwf"):
            raise ValueError(
                "`reference='cached'` keeps what the reference says of its own samples. Rows of "
                f"{'the live model' if source == 'live' else 'the new task'} are not among them: use another reference."
            )
        self.loss: Loss = loss
        self.coefficient = coefficient
        self.source: Source = source
        self.divergence: Divergence = divergence
        self.divergence_temperature = divergence_temperature
        self.reference_top_k = reference_top_k
        self.sequence_length = sequence_length
        self.refill_rows = refill_rows
        self.uses_per_sample = uses_per_sample
        self.tokenizer = tokenizer
        self.language_model = language_model
        self.ignore_index = ignore_index
        self.previews = previews
        self.seed = seed
        self.reference = ReferenceKeeper(
            reference, _dtype(reference_dtype), reference_device, reference_from, ema_decay
        )
        self.generator = RowGenerator(
            prompts, sample_length, temperature, top_k, top_p, min_p, stop_at_eos, loss_on, filters, sampler
        )

        self._model: LanguageModel | None = None
        self._data: ReplayDataModule | None = None
        self._own_buffer: ReplayBuffer | None = None
        self._last_loss: Tensor | None = None
        self._last_coefficient = 0.0
        self._followed_step = 0
        self._undo: list[Callable[[], None]] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_package(trainer, "The Trainer")
        if stage != "fit":
            return
        # Not earlier: a checkpoint saved after the last fit still needs that fit's reference.
        self.reference.begin_fit()
        self._data = None if self.loss == "lwf" else _replay_datamodule(trainer)
        if self.loss != "mixed" and not pl_module.automatic_optimization:
            function = {"kl": "forward_kl", "lwf": "forward_kl", "ntp": "next_token_loss"}[self.loss]
            raise MisconfigurationException(
                f"`loss={self.loss!r}` is added to the loss that `training_step` returns, but "
                f"{type(pl_module).__name__} optimizes manually (`automatic_optimization=False`). Use `loss='mixed'` "
                f"and add `lightning_replay.{function}` to your loss yourself where you want it."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = self._data
        if self.loss != "lwf" and (data is None or not data.replay_fraction):
            return
        self._model = model = find_language_model(pl_module, self.language_model)
        self._followed_step = trainer.global_step
        if data is None:
            self.reference.get(trainer, model)
            self._wrap_training_step(trainer, pl_module, self._with_learning_without_forgetting)
            return
        if self.seed is None:
            self.seed = torch.initial_seed()
        if trainer.ckpt_path is None and data.buffer is self._own_buffer and self.reference.since == "fit":
            data.buffer = None  # what an earlier fit left in it came from another reference
        source = self._source(trainer, model)
        if self.loss == "kl" and not self._caches:
            self.reference.get(trainer, model)
        self._check_fit(pl_module, model, data)
        if self._caches:
            self._cache_prior(trainer, model, data, source)

        data.refill = functools.partial(self._refill, trainer, pl_module, source)
        data.uses_per_sample = None if self._never_refills(model) else self.uses_per_sample
        data.joins_batch = self.loss == "mixed"
        self._undo.append(functools.partial(_disconnect, data))
        if self.loss != "mixed":
            self._wrap_training_step(trainer, pl_module, self._with_replay_loss)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._model is None:
            return
        if trainer.global_step != self._followed_step:  # several batches may end at one step
            self._followed_step = trainer.global_step
            self.reference.follow(self._model)
        values: dict[str, Any] = {}
        if self._last_loss is not None:
            values |= {"replay/loss": self._last_loss, "replay/coefficient": self._last_coefficient}
        if self._data is not None and self._data.buffer is not None:
            buffer, drawn = self._data.buffer, self._data.drawn
            values |= {
                "replay/buffer_fill": len(buffer) / buffer.capacity,
                "replay/sampling_seconds": self.generator.seconds,
                "replay/rows_sampled": float(self.generator.rows),
            }
            values |= {f"replay/dropped/{name}": float(number) for name, number in self.generator.dropped.items()}
            if drawn is not None and drawn.uses is not None and drawn.steps is not None:
                values["replay/uses"] = float(drawn.uses.double().mean())
                values["replay/age"] = trainer.global_step - float(drawn.steps.double().mean())
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.reference.save(checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.reference.load(checkpoint)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, **self.generator.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]
        self.generator.load_state_dict(state_dict)

    @property
    def _caches(self) -> bool:
        """Whether rows carry the reference's log-probabilities."""
        return self.loss == "kl" and self.reference.kind == "cached"

    def _never_refills(self, model: LanguageModel) -> bool:
        """Whether the reference is gone as soon as the model trains, so that rows have to last."""
        cached = self.reference.kind == "cached"
        return cached and self.source == "reference" and self.reference.adapter(model) is None

    def _source(self, trainer: pl.Trainer, model: LanguageModel) -> ReferenceModel:
        if self.source == "live" or self._never_refills(model):
            return LiveModel(model)
        return self.reference.get(trainer, model)

    def _wrap_training_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, with_loss: Callable[..., tuple[Any, Tensor | None]]
    ) -> None:
        """Put a step that adds the replay loss in the place of the module's own, as an attribute of the instance.

        It runs wherever Lightning runs `training_step`: inside DDP's forward, inside autocast, before the loss is
        divided for gradient accumulation. So the replay loss is scaled and synchronised as the user's is.
        """
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output, loss = with_loss(trainer, functools.partial(original, *args, **kwargs), args[0])
            if output is None or loss is None:  # None is Lightning's way to skip a step
                return output
            coefficient = self._coefficient(trainer.global_step)
            self._last_loss, self._last_coefficient = loss.detach(), coefficient
            return _with_added_loss(output, coefficient * loss)

        of_instance = vars(pl_module).get("training_step")
        pl_module.training_step = training_step  # type: ignore[method-assign]
        self._undo.append(functools.partial(_restore_training_step, pl_module, of_instance))

    def _with_replay_loss(self, trainer: pl.Trainer, step: Callable[[], Any], batch: Any) -> tuple[Any, Tensor | None]:
        """What the user's step returns, and the loss on the rows drawn for it."""
        model, data = self._model, self._data
        assert model is not None
        assert data is not None
        if data.drawn is None:
            return step(), None
        rows = data.drawn.to(model.device)
        # The last token of a row predicts nothing in it.
        with joint_forward(model, rows.tokens[:, :-1], self.ignore_index) as joint:
            output = step()
        if output is None:
            return None, None
        if joint.logits is None:
            raise _never_called(model)
        if self.loss == "ntp":
            return output, next_token_loss(joint.logits, rows.tokens[:, 1:], rows.targets_mask)
        if rows.top_ids is not None and rows.top_log_probs is not None:
            return output, divergence_from_top_k(
                joint.logits,
                rows.top_ids,
                rows.top_log_probs,
                rows.targets_mask,
                kind=self.divergence,
                temperature=self.divergence_temperature,
            )
        with self.reference.get(trainer, model).active() as reference:
            reference_logits = reference.logits(rows.tokens[:, :-1])
        return output, self._divergence(joint.logits, reference_logits, rows.targets_mask)

    def _with_learning_without_forgetting(
        self, trainer: pl.Trainer, step: Callable[[], Any], batch: Any
    ) -> tuple[Any, Tensor | None]:
        """What the user's step returns, and the divergence on the rows of its own batch."""
        model = self._model
        assert model is not None
        with observed_forward(model) as observed:
            output = step()
        if output is None:
            return None, None
        if observed.logits is None:
            raise _never_called(model)
        with self.reference.get(trainer, model).active() as reference:
            reference_logits = observed.ask(reference)
        mask = _new_targets(batch, observed, self.ignore_index)
        return output, self._divergence(observed.logits, reference_logits, mask)

    def _divergence(self, logits: Tensor, reference_logits: Tensor, mask: Tensor | None) -> Tensor:
        function = {"forward": forward_kl, "reverse": reverse_kl, "jensen_shannon": jensen_shannon}[self.divergence]
        return function(logits, reference_logits, mask, temperature=self.divergence_temperature)

    def _coefficient(self, step: int) -> float:
        if not callable(self.coefficient):
            return self.coefficient
        value = self.coefficient(step)
        _check_coefficient(value, f"What the schedule `coefficient` returned for step {step}")
        return float(value)

    def _refill(self, trainer: pl.Trainer, pl_module: pl.LightningModule, source: ReferenceModel, batch: Any) -> None:
        """Sample rows and put them in the place of the used ones."""
        data, model = self._data, self._model
        assert data is not None
        assert model is not None
        assert self.seed is not None
        if data.buffer is None:
            data.buffer = self._own_buffer = self._new_buffer(trainer, model, data, batch)
        buffer, generator = data.buffer, self.generator
        rows = min(buffer.capacity, _REFILL_ROWS if self.refill_rows == "auto" else self.refill_rows)
        if self._never_refills(model):
            rows = buffer.capacity
            later_fit = self.reference.since == "first" and generator.rows > 0
            if trainer.ckpt_path is not None or later_fit:
                raise MisconfigurationException(
                    "`reference='cached'` samples all rows before the first step, and the model that they come from is "
                    f"gone: {'an earlier fit has' if later_fit else f'the run up to {trainer.ckpt_path} has'} trained "
                    "it. Resume from a full checkpoint, keep the datamodule of the first fit, or use another reference."
                )
        started, first = time.perf_counter(), not generator.rows
        key = (self.seed, trainer.global_rank)
        with isolate_rng(), source.active() as active, refill_bar(trainer, rows * buffer.length) as advance:
            made, quality = generator.generate(active, rows, buffer.length, key, advance)
            if buffer.top_k:
                made = cache_reference(active, made, buffer.top_k, self.divergence_temperature)
        buffer.add(made, step=trainer.global_step)
        seconds = time.perf_counter() - started
        generator.seconds += seconds
        if first:
            speed = made.tokens.numel() / seconds
            rank_zero_info(
                f"Replay: sampled {len(made.tokens)} rows of {buffer.length} tokens in {seconds:.1f} s "
                f"({speed:,.0f} tokens/s)."
            )
        values = {f"replay/quality/{name}": value for name, value in quality.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
        self._log_previews(trainer, pl_module, made.take(torch.arange(min(self.previews, len(made.tokens)))))

    def _new_buffer(
        self, trainer: pl.Trainer, model: LanguageModel, data: ReplayDataModule, batch: Any
    ) -> ReplayBuffer:
        assert self.seed is not None
        length = self.sequence_length or row_length(batch)
        self.generator.check_length(length, model)
        top_k = min(self.reference_top_k, model.vocabulary) if self._caches else 0
        rows = _REFILL_ROWS if self.refill_rows == "auto" else self.refill_rows
        if self.refill_rows == "auto" and self._never_refills(model):
            affordable = _CACHED_BYTES // (length * (4 + 6 * top_k))
            rows = max(1, min(_rows_of_the_run(trainer, data, batch) or _CACHED_ROWS, affordable))
        order = stream(self.seed, trainer.global_rank, 0)
        return ReplayBuffer(rows, length, seed=order.initial_seed(), top_k=top_k)

    def _cache_prior(
        self, trainer: pl.Trainer, model: LanguageModel, data: ReplayDataModule, source: ReferenceModel
    ) -> None:
        """Let real prior rows carry the reference's log-probabilities, as the sampled ones will."""
        prior = data.prior
        kept = trainer.ckpt_path is not None or self.reference.since == "first"
        if prior is None or (prior.top_k and kept):
            return
        with isolate_rng(), source.active() as active:
            data.prior = prior.with_cache(
                lambda rows: cache_reference(active, rows, self.reference_top_k, self.divergence_temperature)
            )

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
        self.generator.bind(model, self._find_tokenizer(pl_module, data))
        length = buffer.length if buffer is not None else self.sequence_length
        if length is not None:
            self.generator.check_length(length, model)

    def _find_tokenizer(self, pl_module: pl.LightningModule, data: ReplayDataModule) -> Any:
        holders = (self, data, pl_module)
        return next((held for holder in holders if (held := getattr(holder, "tokenizer", None)) is not None), None)

    def _log_previews(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: ReplayRows) -> None:
        assert self._data is not None
        tokenizer = self._find_tokenizer(pl_module, self._data)
        samples = [row[:length] for row, length in zip(rows.tokens.tolist(), rows.lengths.tolist(), strict=True)]
        texts = [tokenizer.decode(sample) if tokenizer is not None else str(sample) for sample in samples]
        for logger in trainer.loggers if texts else ():
            if isinstance(logger, TensorBoardLogger):
                fenced = "\n\n".join(f"```\n{text}\n```" for text in texts)
                logger.experiment.add_text("replay/samples", fenced, trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_text("replay/samples", columns=["sample"], data=[[text] for text in texts])

    def _release(self) -> None:
        """Leave the module and the datamodule as they were found."""
        while self._undo:
            self._undo.pop()()
        self._model = self._last_loss = None


def _replay_datamodule(trainer: pl.Trainer) -> ReplayDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ReplayDataModule):
        given = "no datamodule" if data is None else type(data).__name__
        raise MisconfigurationException(
            f"SelfGeneratedReplay needs the batches of a ReplayDataModule, but the Trainer was given {given}. Wrap "
            "your data: `trainer.fit(module, datamodule=ReplayDataModule(your_datamodule_or_loader))`."
        )
    return data


def _restore_training_step(pl_module: pl.LightningModule, of_instance: Any) -> None:
    """Give back the step that the instance had of its own, or else that of its class."""
    del pl_module.training_step
    if of_instance is not None:
        pl_module.training_step = of_instance  # type: ignore[method-assign]


def _disconnect(data: ReplayDataModule) -> None:
    data.refill = None
    data.uses_per_sample = 1
    data.joins_batch = True
    data.drawn = None


def _rows_of_the_run(trainer: pl.Trainer, data: ReplayDataModule, batch: Any) -> int | None:
    """How many replay rows the whole fit will draw, where its length is known."""
    batches = float(trainer.num_training_batches)
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    steps = math.inf if trainer.max_steps == -1 else float(trainer.max_steps * trainer.accumulate_grad_batches)
    total = min(batches * epochs, steps)
    share = data.replay_fraction / (1 - data.replay_fraction) if data.mode == "append" else data.replay_fraction
    return None if math.isinf(total) else math.ceil(total * data.count(batch) * share)


def _new_targets(batch: Any, observed: ObservedForward, ignore_index: int) -> Tensor | None:
    """True where the next token of a new row is neither padding nor left out of the user's loss; None if unknown.

    The batch knows best; where it is of a kind of its own, the arguments of the model's call may tell.
    """
    assert observed.logits is not None
    rows, positions = observed.logits.shape[:2]
    targets: Tensor | None
    try:
        targets = inputs_and_targets(batch)[2]
    except TypeError:
        targets = observed.argument("labels")
        attention = observed.argument("attention_mask")
        if targets is None and attention is not None:
            targets = attention.long() - 1  # padding counts as left out
        targets = None if targets is None else F.pad(targets[:, 1:], (0, 1), value=-100)
    if targets is None or len(targets) != rows or targets.shape[1] < positions:
        return None
    targets = targets[:, :positions]
    return (targets >= 0) & (targets != ignore_index)


def _never_called(model: LanguageModel) -> MisconfigurationException:
    return MisconfigurationException(
        f"`training_step` never called {type(model.module).__name__}, whose logits replay needs. Call the "
        "module itself, not its `forward`, or say with `language_model` which module it does call."
    )


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"`{name}` is one of {', '.join(map(repr, get_args(choices)))}; got {value!r}.")


def _check_coefficient(value: Any, what: str) -> None:
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{what} is what the replay loss is multiplied by, at least 0 and finite; got {value!r}.")


def _dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`reference_dtype` is a floating-point type of torch, such as 'bfloat16'; got {given!r}.")
    return dtype


def _with_added_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] + loss}
    return output + loss
