"""The models that rows come from and are compared with: before finetuning, as it trains, or an average of the way."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any, Literal, Protocol, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_replay.arguments import check_choice, is_number
from lightning_replay.language_model import LanguageModel, evaluating, is_adapted
from lightning_replay.processes import is_sharded
from lightning_replay.reference_file import SavesReferenceBeside, read_reference
from lightning_replay.sharded_copy import ShardedCopy

__all__ = [
    "DisabledAdapter",
    "FrozenCopy",
    "LiveModel",
    "MovingAverage",
    "ReferenceKeeper",
    "ReferenceModel",
    "adapter_is_idle",
]

Reference = Literal["auto", "copy", "adapter", "cached", "ema"]
ReferenceFrom = Literal["fit", "first"]
ReferenceCheckpoint = Literal["inside", "beside"]

_CHECKPOINT_KEY = "lightning_replay_reference"
_UNTRAINED_KEY = "lightning_replay_untrained"
"""In checkpoints whose weights are those at fit start."""


class ReferenceModel(Protocol):
    """Something that becomes a language model in evaluation mode, without gradients, for as long as it is needed."""

    def active(self) -> AbstractContextManager[LanguageModel]:
        """A context that yields the language model and leaves everything as it was."""
        ...


class LiveModel:
    """The model as it trains."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the model itself, in evaluation mode."""
        with evaluating(self._model.module):
            yield self._model


class FrozenCopy:
    """A copy of the model's weights as they are now: exact for every model, at the price of a second one in memory.

    It is nobody's submodule, so optimizers, strategies and checkpoints of the user's module don't see it.

    Args:
        model: The model to copy.
        dtype: What the copy's weights are kept in; by default as the model's. Half the bits take half the memory, and
            what they round away is no longer protected.
        device: Where the copy is kept; by default where the model is. Tokens go there and logits come back.
    """

    def __init__(
        self, model: LanguageModel, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        module = deepcopy(model.module).eval().requires_grad_(False)
        self._model = model.on(module.to(device=device, dtype=dtype))

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the copy."""
        with torch.no_grad():
            yield self._model

    def state_dict(self) -> dict[str, Tensor]:
        """The copy's weights."""
        state: dict[str, Tensor] = self._model.module.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put other weights in the copy's place."""
        self._model.module.load_state_dict(dict(state))


class MovingAverage(FrozenCopy):
    """An exponential moving average of the weights, as a reference that follows the model slowly.

    It protects against sudden change: what the model loses within about ``1 / (1 - decay)`` steps is pulled back. It
    does not protect against slow change: what has been lost for longer is lost to the average as well.

    Args:
        model: The model to follow.
        decay: Share of the average that an update keeps.
        dtype: As for ``FrozenCopy``; 16 bits round small updates away.
        device: As for ``FrozenCopy``.
    """

    def __init__(
        self,
        model: LanguageModel,
        decay: float,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(model, dtype, device)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: LanguageModel) -> None:
        """Take a step towards the model's weights: average ← decay · average + (1 - decay) · weights."""
        for average, weight in zip(self._model.module.parameters(), model.module.parameters(), strict=True):
            average.lerp_(weight.to(average), 1 - self.decay)
        for ours, theirs in zip(self._model.module.buffers(), model.module.buffers(), strict=True):
            ours.copy_(theirs)


class DisabledAdapter:
    """A PEFT model with its adapters switched off: the exact base model, for no memory at all."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the model, its adapters off; what PEFT does to `requires_grad` on the way is undone."""
        module: Any = self._model.module
        trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        try:
            with evaluating(module), module.disable_adapter():
                yield self._model
        finally:
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)


class ReferenceKeeper:
    """Takes the reference model π at the start of a fit and carries it through checkpoints.

    With ``"auto"``, a fresh PEFT adapter is switched off, and every other model is copied. Log-probabilities are cached
    only where that is asked for: they are exact for the likeliest tokens alone, and without an adapter to switch off
    they end the supply of fresh rows. After a resume, π is the saved one: the weights that the checkpoint brings are
    half trained.

    Args:
        kind: ``"auto"``, ``"copy"``, ``"adapter"``, ``"ema"`` or ``"cached"``, for which nothing is kept here unless an
            adapter can be switched off.
        dtype: Of a copy.
        device: Of a copy.
        since: ``"fit"`` takes π again in each fit, ``"first"`` keeps the first fit's.
        ema_decay: Decay of ``"ema"``.
        checkpoint: Where a copy is saved: ``"inside"`` each checkpoint, which is then whole by itself wherever it is
            moved or uploaded, or once ``"beside"`` them. An average changes, so it is always inside.
        owner: Whose reference this is, where a checkpoint may hold several.

    Raises:
        ValueError: If an argument is not one of those named, or ``ema_decay`` is outside [0, 1).
    """

    def __init__(
        self,
        kind: Reference = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        since: ReferenceFrom = "fit",
        ema_decay: float = 0.999,
        checkpoint: ReferenceCheckpoint = "inside",
        owner: str = "",
    ) -> None:
        check_choice("reference", kind, Reference)
        if since not in get_args(ReferenceFrom):
            raise ValueError(f"`reference_from` is 'fit' or 'first'; got {since!r}.")
        if not is_number(ema_decay) or not 0 <= ema_decay < 1:
            raise ValueError(f"`ema_decay` is the share that the average keeps, from 0 to below 1; got {ema_decay!r}.")
        if checkpoint not in get_args(ReferenceCheckpoint):
            raise ValueError(f"`reference_checkpoint` is 'inside' or 'beside'; got {checkpoint!r}.")
        self.kind: Reference = kind
        self.dtype = dtype
        self.device = device
        self.since: ReferenceFrom = since
        self.ema_decay = ema_decay
        self.checkpoint: ReferenceCheckpoint = checkpoint
        self._key = f"{_CHECKPOINT_KEY}/{owner}" if owner else _CHECKPOINT_KEY
        self._reference: FrozenCopy | ShardedCopy | DisabledAdapter | None = None
        self._restored: Mapping[str, Tensor] | None = None
        self._restored_idle_adapter = False
        self._training = False
        self._restored_untrained = False

    @property
    def is_model_at_fit_start(self) -> bool:
        """Whether what is kept here is the model as it was when the fit began, on every input."""
        return self.kind in ("auto", "copy", "adapter") and self.since == "fit" and self.dtype is None

    def begin_fit(self, trainer: pl.Trainer) -> None:
        """Forget the last fit's reference, unless the first one's is to be kept."""
        if self.checkpoint == "beside" and self.kind != "ema":
            self._save_beside(trainer)
        if self.since == "fit":
            self._reference = None
        self._restored = None
        self._restored_idle_adapter = False
        self._training = self._restored_untrained = False

    def begin_training(self) -> None:
        """From here on, checkpoints of this fit hold weights that it has trained."""
        self._training = True

    def resumed_from(self, trainer: pl.Trainer) -> Any:
        """The checkpoint whose training the fit goes on with; None where it begins anew.

        Callbacks such as ``LearningRateFinder`` save one at fit start, try something and restore it.
        """
        return None if self._restored_untrained else trainer.ckpt_path

    def get(self, trainer: pl.Trainer, model: LanguageModel) -> ReferenceModel:
        """The reference; taken from the model if this fit has none yet.

        Raises:
            MisconfigurationException: If the run resumes from a checkpoint that holds no reference, or
                ``"adapter"`` was asked for and there is none to switch off, or the weights are sharded and the copy is
                to be another than they.
        """
        if self._reference is None:
            self._reference = self.adapter(model)
        if self._reference is None:
            if self.kind == "adapter":
                raise MisconfigurationException(
                    f"`reference='adapter'` switches a fresh PEFT adapter off, but {type(model.module).__name__} has "
                    "none, or it has been trained before, or weights under it train as well. Use `reference='copy'`."
                )
            self._reference = self._copy(trainer, model)
        return self._reference

    def adapter(self, model: LanguageModel) -> DisabledAdapter | None:
        """The model with its adapters off, where that is the reference and this kind of reference may be that."""
        if isinstance(self._reference, DisabledAdapter):
            return self._reference
        if self.kind in ("copy", "ema"):
            return None
        # After a resume the adapter is trained, but the base under it is still the reference.
        return DisabledAdapter(model) if self._restored_idle_adapter or adapter_is_idle(model) else None

    def follow(self, model: LanguageModel) -> None:
        """Let a moving average take its step; call it after each optimizer step."""
        if isinstance(self._reference, MovingAverage):
            self._reference.update(model)

    def save(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Put a copied reference into a checkpoint; an adapter switched off needs no saving."""
        if not self._training and self.resumed_from(trainer) is None:
            checkpoint[_UNTRAINED_KEY] = True
        if isinstance(self._reference, (FrozenCopy, ShardedCopy)):
            checkpoint[self._key] = self._reference.state_dict()
        elif isinstance(self._reference, DisabledAdapter) or self._restored_idle_adapter:
            checkpoint[self._key] = None
        elif self._restored is not None:
            checkpoint[self._key] = self._restored

    def load(self, trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> None:
        """Take the reference from a checkpoint, if it holds or names one.

        Raises:
            MisconfigurationException: If the file that it names is missing, or another one than was saved.
        """
        self._restored_untrained = _UNTRAINED_KEY in checkpoint
        # Before references had owners, all of a run were saved under one key.
        key = self._key if self._key in checkpoint else _CHECKPOINT_KEY
        if key not in checkpoint:
            return
        saved = checkpoint[key]
        self._reference = None
        self._restored_idle_adapter = saved is None
        # A name is text, and a weight never is.
        named = saved is not None and isinstance(saved.get("file"), str)
        self._restored = read_reference(saved, trainer.ckpt_path) if named else saved

    def _save_beside(self, trainer: pl.Trainer) -> None:
        """See to it that this Trainer's checkpoints leave the reference beside them, for as long as it lives."""
        outermost = io = trainer.strategy.checkpoint_io
        while isinstance(io, SavesReferenceBeside):
            if io.key == self._key:
                io.forget()
                return
            io = io.wrapped
        trainer.strategy.checkpoint_io = SavesReferenceBeside(outermost, self._key)

    def _copy(self, trainer: pl.Trainer, model: LanguageModel) -> FrozenCopy | ShardedCopy:
        if self.resumed_from(trainer) is not None and self._restored is None:
            raise MisconfigurationException(
                f"The run resumes from {trainer.ckpt_path}, which holds no reference model: it was saved with "
                "`save_weights_only=True` or without replay, and the model before finetuning can't be told from its "
                "weights. Resume from a full checkpoint of a run with replay, or load the weights into the module "
                "and fit without `ckpt_path`: the reference is then the model as loaded."
            )
        reference: FrozenCopy | ShardedCopy
        if is_sharded(trainer):
            if self.kind == "ema" or self.dtype is not None or self.device is not None:
                raise MisconfigurationException(
                    "Of a model whose weights are sharded each process keeps its part of the reference, beside the "
                    "model's and of its type. Leave out `reference='ema'`, `reference_dtype` and `reference_device`."
                )
            reference = ShardedCopy(model)
        elif self.kind == "ema":
            reference = MovingAverage(model, self.ema_decay, self.dtype, self.device)
        else:
            reference = FrozenCopy(model, self.dtype, self.device)
        if self._restored is not None:
            reference.load_state_dict(self._restored)
            self._restored = None
        return reference


def adapter_is_idle(model: LanguageModel) -> bool:
    """Whether switching the adapters off gives the model as it is now, for as long as it trains.

    True for a PEFT model whose adapters are fresh (they change nothing yet) and whose base weights are frozen.
    An adapter that has been trained before is a part of the model to remember, so it must not be switched off.

    Args:
        model: The model, before finetuning.
    """
    if not is_adapted(model.module):
        return False
    tokens = torch.arange(min(model.vocabulary, model.context or 64, 64), device=model.device).unsqueeze(0)
    with evaluating(model.module):
        now = model.logits(tokens)
    with DisabledAdapter(model).active() as base:
        before = base.logits(tokens)
        # Not bit for bit: a fresh DoRA divides by the norm that it multiplies with.
        idle = bool((now - before).abs().max() <= 16 * torch.finfo(now.dtype).eps * before.abs().max())
        # Switched off, PEFT freezes its adapters: what still trains now is a base weight.
        return idle and not any(parameter.requires_grad for parameter in model.module.parameters())
