"""Taking the reference model at fit start and carrying it through checkpoints."""

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.checkpoint import SavesReferenceBeside, read_reference
from lightning_replay.references.models import (
    DisabledAdapter,
    FrozenCopy,
    MovingAverage,
    ReferenceModel,
    adapter_is_idle,
)
from lightning_replay.references.sharded import ShardedCopy
from lightning_replay.utilities.distributed import is_sharded

__all__ = ["Reference", "ReferenceCheckpoint", "ReferenceFrom", "ReferenceKeeper"]

Reference = Literal["auto", "copy", "adapter", "cached", "ema"]


ReferenceFrom = Literal["fit", "first"]


ReferenceCheckpoint = Literal["inside", "beside"]

_CHECKPOINT_KEY = "lightning_replay_reference"


_UNTRAINED_KEY = "lightning_replay_untrained"
"""In checkpoints whose weights are those at fit start."""


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

    def __init__(self, reference, owner=""):
        self.reference = reference
        dtype = getattr(reference, "dtype", None)
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.device = getattr(reference, "device", None)
        self.kind = reference.kind
        self.since = reference.since
        self.ema_decay = getattr(reference, "decay", 0.999)
        self.checkpoint = getattr(reference, "save", "inside")
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
