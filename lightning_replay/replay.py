"""The callback that replays the model's own samples."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_replay.batches import row_length
from lightning_replay.buffer import ReplayBuffer, ReplayRows
from lightning_replay.datamodule import ReplayDataModule
from lightning_replay.joint_forward import joint_forward
from lightning_replay.language_model import LanguageModel, find_language_model
from lightning_replay.losses import forward_kl, next_token_loss
from lightning_replay.progress import refill_bar
from lightning_replay.reference import LiveModel, ReferenceKeeper, ReferenceModel
from lightning_replay.sampling import Sampler, sample_rows, start_token

__all__ = ["SelfGeneratedReplay"]

Loss = Literal["kl", "ntp", "mixed"]
Source = Literal["reference", "live"]


class SelfGeneratedReplay(Callback):
    r"""Replays rows that the model itself wrote, so that finetuning does not make it forget (arXiv 2605.26097).

    Before the first step it fills the buffer of the :class:`~lightning_replay.ReplayDataModule` with samples, and
    whenever all of them have been used it samples new ones. With ``loss="kl"`` or ``"ntp"`` it adds

    .. math:: \text{coefficient} \cdot \text{replay loss}

    to what ``training_step`` returns. The step itself is not edited: replay rows travel with the language model's
    forward, hidden from the user's code, so any loss, metric or logging in ``training_step`` is as it was.

    Logged on every logging step: ``replay/loss`` (nats a token, without the coefficient), ``replay/buffer_fill``
    (share of the buffer that is filled), ``replay/sampling_seconds`` and ``replay/rows_sampled`` (totals so far).
    A few samples of each refill go to TensorBoard and Weights & Biases as text.

    Note:
        Nothing is sampled, copied or wrapped where ``replay_fraction`` is 0. Sampling touches neither the global
        random state nor the modes of the model.

    Args:
        loss: ``"kl"``: forward KL from the reference model to the trained one on replay rows, over the full
            vocabulary. ``"ntp"``: next-token loss on them. ``"mixed"``: rows join the batch, and the user's own loss
            sees them; nothing is wrapped, and ``coefficient`` is not used.
        coefficient: What the replay loss is multiplied by. High values protect more and slow the new task down.
        source: Whose samples to replay. ``"reference"``: the model before finetuning, as the paper does.
            ``"live"``: the model as it trains, which needs no second model for sampling, but replays
            what it has forgotten less and less.
        prompts: Token ids that rows begin with, all of one length; rows take them in turn, so each begins an even
            share. By default the beginning-of-sequence token, else the end-of-text token.
        sequence_length: Tokens in a replay row. By default that of the rows in the first training batch, or of the
            datamodule's own buffer.
        sample_length: Tokens sampled in one piece, a multiple of the row's. Longer pieces are cut into rows, so that
            some rows begin in mid-text, as rows of packed text do; without them, what the model knows of such rows
            is not protected. By default two rows, where the model's context allows it and no prompts are given; with
            the row's own length every row begins with its prompt, as in the paper.
        refill_rows: Rows to sample at a time. Larger refills sample faster and need more memory for keys and values.
        temperature: Sampling temperature.
        sampler: A function to sample with instead of :func:`~lightning_replay.sampling.sample_rows`; called with
            the :class:`~lightning_replay.LanguageModel`, prompts of shape ``(samples, prompt length)``, the sample
            length and a CPU generator, it returns token ids of shape ``(samples, sample length)``.
        tokenizer: Decodes the previews and tells the start token. By default the datamodule's or the module's
            ``tokenizer`` attribute, where there is one.
        language_model: Where the language model is in the LightningModule, as an attribute path. By default its
            Hugging Face or PEFT model, else the child that holds all parameters, else the module itself.
        ignore_index: The label that the user's loss leaves out, where the model computes the loss itself.
        previews: How many samples of each refill to log as text.
        seed: Seed of sampling. By default the global seed at the first fit.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: Before the first step, if the run can't work: no ``ReplayDataModule``, manual
            optimization with ``"kl"`` or ``"ntp"``, no logits found, samples that don't fit the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> replay = SelfGeneratedReplay(loss="kl", coefficient=3.0)
        >>> trainer = Trainer(callbacks=[replay], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        loss: Loss = "kl",
        coefficient: float = 10.0,
        source: Source = "reference",
        prompts: Sequence[Sequence[int]] | None = None,
        sequence_length: int | None = None,
        sample_length: int | None = None,
        refill_rows: int = 256,
        temperature: float = 1.0,
        sampler: Sampler | None = None,
        tokenizer: Any = None,
        language_model: str | None = None,
        ignore_index: int = -100,
        previews: int = 3,
        seed: int | None = None,
    ) -> None:
        if loss not in get_args(Loss):
            raise ValueError(f"`loss` is one of {', '.join(map(repr, get_args(Loss)))}; got {loss!r}.")
        if source not in get_args(Source):
            raise ValueError(f"`source` is one of {', '.join(map(repr, get_args(Source)))}; got {source!r}.")
        if not coefficient >= 0:
            raise ValueError(f"`coefficient` is what the replay loss is multiplied by, at least 0; got {coefficient}.")
        if refill_rows < 1:
            raise ValueError(f"`refill_rows` is how many rows to sample at a time, at least 1; got {refill_rows}.")
        for name, tokens in {"sequence_length": sequence_length, "sample_length": sample_length}.items():
            if tokens is not None and tokens < 2:
                raise ValueError(f"`{name}` is a number of tokens, at least 2; got {tokens}.")
        if not temperature > 0:
            raise ValueError(f"`temperature` is above 0; got {temperature}.")
        if prompts is not None and (not prompts or len({len(prompt) for prompt in prompts}) != 1 or not prompts[0]):
            raise ValueError(f"`prompts` is a list of lists of token ids, all of one length; got {prompts!r}.")
        self.loss: Loss = loss
        self.coefficient = coefficient
        self.source: Source = source
        self.prompts = prompts
        self.sequence_length = sequence_length
        self.sample_length = sample_length
        self.refill_rows = refill_rows
        self.temperature = temperature
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.language_model = language_model
        self.ignore_index = ignore_index
        self.previews = previews
        self.seed = seed
        self.reference = ReferenceKeeper()

        self._refills = 0
        self._pieces_sampled = 0
        self._rows_sampled = 0
        self._sampling_seconds = 0.0
        self._model: LanguageModel | None = None
        self._data: ReplayDataModule | None = None
        self._own_buffer: ReplayBuffer | None = None
        self._last_loss: Tensor | None = None
        self._undo: list[Callable[[], None]] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # Not earlier: a checkpoint saved after the last fit still needs that fit's reference.
        self.reference.release()
        self._data = _replay_datamodule(trainer)
        if self.loss != "mixed" and not pl_module.automatic_optimization:
            function = {"kl": forward_kl, "ntp": next_token_loss}[self.loss]
            raise MisconfigurationException(
                f"`loss={self.loss!r}` is added to the loss that `training_step` returns, but "
                f"{type(pl_module).__name__} optimizes manually (`automatic_optimization=False`). Use `loss='mixed'` "
                f"and add `lightning_replay.{function.__name__}` to your loss yourself where you want it."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = self._data
        if data is None or not data.replay_fraction:
            return
        if trainer.ckpt_path is None and data.buffer is self._own_buffer:
            data.buffer = None  # what an earlier fit left in it came from another reference
        self._model = model = find_language_model(pl_module, self.language_model)
        if self.seed is None:
            self.seed = torch.initial_seed()
        source = LiveModel(model) if self.source == "live" else self.reference.get(trainer, model)
        if self.loss == "kl":
            self.reference.get(trainer, model)
        self._check_fit(model, data)

        data.refill = functools.partial(self._refill, trainer, pl_module, source)
        data.joins_batch = self.loss == "mixed"
        self._undo.append(functools.partial(_disconnect, data))
        if self.loss != "mixed":
            self._wrap_training_step(trainer, pl_module, model, data)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._model is None or self._data is None or self._data.buffer is None:
            return
        values: dict[str, Any] = {
            "replay/buffer_fill": len(self._data.buffer) / self._data.buffer.capacity,
            "replay/sampling_seconds": self._sampling_seconds,
            "replay/rows_sampled": float(self._rows_sampled),
        }
        if self._last_loss is not None:
            values["replay/loss"] = self._last_loss
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
        return {
            "seed": self.seed,
            "refills": self._refills,
            "pieces_sampled": self._pieces_sampled,
            "rows_sampled": self._rows_sampled,
            "sampling_seconds": self._sampling_seconds,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]
        self._refills = state_dict["refills"]
        self._pieces_sampled = state_dict["pieces_sampled"]
        self._rows_sampled = state_dict["rows_sampled"]
        self._sampling_seconds = state_dict["sampling_seconds"]

    def _wrap_training_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: LanguageModel, data: ReplayDataModule
    ) -> None:
        """Put a step that adds the replay loss in the place of the module's own, as an attribute of the instance.

        It runs wherever Lightning runs `training_step`: inside DDP's forward, inside autocast, before the loss is
        divided for gradient accumulation. So the replay loss is scaled and synchronised as the user's is.
        """
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            rows, data.drawn = data.drawn, None
            if rows is None:
                return original(*args, **kwargs)
            rows = rows.to(pl_module.device)
            # The last token of a row predicts nothing in it.
            with joint_forward(model, rows.tokens[:, :-1], self.ignore_index) as joint:
                output = original(*args, **kwargs)
            if output is None:  # Lightning's way to skip a step
                return None
            if joint.logits is None:
                raise MisconfigurationException(
                    f"`training_step` never called {type(model.module).__name__}, whose logits replay needs. Call the "
                    "module itself, not its `forward`, or say with `language_model` which module it does call."
                )
            loss = self._replay_loss(trainer, model, joint.logits, rows)
            self._last_loss = loss.detach()
            return _with_added_loss(output, self.coefficient * loss)

        of_instance = vars(pl_module).get("training_step")
        pl_module.training_step = training_step  # type: ignore[method-assign]
        self._undo.append(functools.partial(_restore_training_step, pl_module, of_instance))

    def _replay_loss(self, trainer: pl.Trainer, model: LanguageModel, logits: Tensor, rows: ReplayRows) -> Tensor:
        if self.loss == "ntp":
            return next_token_loss(logits, rows.tokens[:, 1:], rows.targets_mask)
        with self.reference.get(trainer, model).active() as reference:
            reference_logits = reference.logits(rows.tokens[:, :-1])
        return forward_kl(logits, reference_logits, rows.targets_mask)

    def _refill(self, trainer: pl.Trainer, pl_module: pl.LightningModule, source: ReferenceModel, batch: Any) -> None:
        """Sample rows and put them in the place of the used ones."""
        data, model = self._data, self._model
        assert data is not None
        assert model is not None
        assert self.seed is not None
        if data.buffer is None:
            length = self.sequence_length or row_length(batch)
            self._check_length(length, model)
            order = _stream(self.seed, trainer.global_rank, 0)
            data.buffer = self._own_buffer = ReplayBuffer(self.refill_rows, length, seed=order.initial_seed())
        length = data.buffer.length
        piece = self.sample_length or length * (2 if self._cuts(length, model) else 1)
        pieces = max(1, min(self.refill_rows, data.buffer.capacity) * length // piece)
        prompts = self._prompts(model)
        prompts = prompts[(self._pieces_sampled + torch.arange(pieces)) % len(prompts)]
        self._refills += 1
        generator = _stream(self.seed, trainer.global_rank, self._refills)
        started = time.perf_counter()
        with isolate_rng(), source.active() as active, refill_bar(trainer, pieces * piece) as advance:
            if self.sampler is not None:
                rows = self.sampler(active, prompts, piece, generator)
            else:
                rows = sample_rows(active, prompts, piece, generator, temperature=self.temperature, progress=advance)
        if rows.shape[1] > length:
            rows = rows.reshape(-1, length)
        data.buffer.add(rows)
        seconds = time.perf_counter() - started
        if not self._rows_sampled:
            speed = rows.numel() / seconds
            rank_zero_info(
                f"Replay: sampled {len(rows)} rows of {length} tokens in {seconds:.1f} s ({speed:,.0f} tokens/s)."
            )
        self._sampling_seconds += seconds
        self._pieces_sampled += pieces
        self._rows_sampled += len(rows)
        self._log_previews(trainer, pl_module, rows[: self.previews])

    def _cuts(self, length: int, model: LanguageModel) -> bool:
        """Whether samples of two rows' length are cut in two, where the user has not said."""
        return self.prompts is None and (model.context is None or 2 * length <= model.context)

    def _check_fit(self, model: LanguageModel, data: ReplayDataModule) -> None:
        """Refuse samples that the model has no room or no tokens for."""
        buffer = data.buffer
        if buffer is not None and self.sequence_length not in (None, buffer.length):
            raise MisconfigurationException(
                f"`sequence_length={self.sequence_length}`, but the datamodule's buffer holds rows of {buffer.length} "
                "tokens. Leave one of them out."
            )
        if buffer is not None:
            _check_tokens(buffer.max_token, "The replay buffer holds", model)
        length = buffer.length if buffer is not None else self.sequence_length
        if length is not None:
            self._check_length(length, model)
        _check_tokens(int(self._prompts(model).max()), "Prompts hold", model)

    def _check_length(self, length: int, model: LanguageModel) -> None:
        piece = self.sample_length or length
        if piece % length:
            raise MisconfigurationException(
                f"`sample_length={piece}` is not a multiple of the {length} tokens of a replay row."
            )
        if model.context is not None and piece > model.context:
            raise MisconfigurationException(
                f"Samples of {piece} tokens don't fit {type(model.module).__name__}, which takes {model.context} at "
                f"most. Set `sequence_length` (and `sample_length`) to {model.context} or fewer."
            )

    def _prompts(self, model: LanguageModel) -> Tensor:
        """What samples begin with, shape ``(prompts, length)``."""
        if self.prompts is not None:
            return torch.tensor([list(prompt) for prompt in self.prompts])
        token = start_token(model, self._find_tokenizer())
        if token is None:
            raise MisconfigurationException(
                "Samples begin with the beginning-of-sequence or end-of-text token, but neither a tokenizer nor the "
                f"configuration of {type(model.module).__name__} tells which that is. Pass `prompts=[[token_id]]`."
            )
        return torch.tensor([[token]])

    def _find_tokenizer(self) -> Any:
        return self.tokenizer if self.tokenizer is not None else getattr(self._data, "tokenizer", None)

    def _log_previews(self, trainer: pl.Trainer, pl_module: pl.LightningModule, tokens: Tensor) -> None:
        tokenizer = self._find_tokenizer() or getattr(pl_module, "tokenizer", None)
        texts = [tokenizer.decode(row) if tokenizer is not None else str(row) for row in tokens.tolist()]
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
    data.joins_batch = True
    data.drawn = None


def _check_tokens(largest: int, what: str, model: LanguageModel) -> None:
    if largest >= model.vocabulary:
        raise MisconfigurationException(
            f"{what} the token id {largest}, but {type(model.module).__name__} has a vocabulary of "
            f"{model.vocabulary}. Use rows and prompts made by its own tokenizer."
        )


def _stream(*key: int) -> torch.Generator:
    """A generator of its own for each key, independent of the others and of the global random state."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


def _with_added_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] + loss}
    return output + loss
