"""Taking the reference model in a fit and saving it in checkpoints."""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.adapters import DisabledAdapter, adapter_is_idle
from lightning_replay.references.checkpoint import SavesReferenceBeside, read_reference
from lightning_replay.references.models import ReferenceModel, SavedReference
from lightning_replay.references.reference import EMA, Reference

__all__ = ["ReferenceKeeper", "saved_reference"]

_CHECKPOINT_KEY = "lightning_replay_reference"


_UNTRAINED_KEY = "lightning_replay_untrained"
"""In checkpoints whose weights are those at fit start."""
_AVERAGE_KEY = "lightning_replay_average"
"""In checkpoints whose reference is no longer the model at fit start, but an average."""


class _NotTaken(NamedTuple):
    """This fit has no reference yet: it will be taken from the model."""


class _Taken(NamedTuple):
    """The reference of this fit, or of an earlier one for ``since="first"``."""

    reference: ReferenceModel


class _Restored(NamedTuple):
    """A checkpoint held the reference: its weights, or None for one that needs none, such as an adapter off."""

    weights: Mapping[str, Tensor] | None


class _Weights(Enum):
    """Which weights a model or a checkpoint has."""

    AT_FIT_START = auto()
    TRAINED = auto()


class ReferenceKeeper:
    """Takes the reference model π in each fit and saves it in checkpoints.

    After a resume, π is the saved one: the weights in the checkpoint are half trained.

    Args:
        reference: Which model is π.
        owner: The name of the callback whose reference this is, if a checkpoint may hold several.

    Attributes:
        reference: Which model is π.
    """

    def __init__(self, reference: Reference, owner: str = "") -> None:
        self.reference = reference
        self._key = f"{_CHECKPOINT_KEY}/{owner}" if owner else _CHECKPOINT_KEY
        self._state: _NotTaken | _Taken | _Restored = _NotTaken()
        self._model = _Weights.AT_FIT_START
        self._checkpoint: _Weights | None = None
        """Of the checkpoint that this fit has loaded last; None before it has loaded one."""

    @property
    def is_model_at_fit_start(self) -> bool:
        """Whether π gives exactly the logits that the model gave when the fit began, on every input."""
        return self.reference.is_model_at_fit_start

    @property
    def taken(self) -> ReferenceModel | None:
        """The reference model; None as long as this fit has not taken it."""
        return self._state.reference if isinstance(self._state, _Taken) else None

    def begin_fit(self, trainer: pl.Trainer) -> None:
        """Forget the reference of the last fit, unless that of the first one is to be kept."""
        if self.reference.saves_beside:
            self._save_beside(trainer)
        if self.reference.since == "fit" or not isinstance(self._state, _Taken):
            self._state = _NotTaken()
        self._model, self._checkpoint = _Weights.AT_FIT_START, None

    def begin_training(self) -> None:
        """From here on, the model and the checkpoints of this fit have trained weights."""
        self._model = _Weights.TRAINED

    def resumed_from(self, trainer: pl.Trainer) -> Any:
        """The path of the checkpoint whose training this fit continues; None if it starts anew.

        Callbacks such as ``LearningRateFinder`` save a checkpoint at fit start, try some steps and restore it.
        """
        return None if self._checkpoint is _Weights.AT_FIT_START else trainer.ckpt_path

    def get(self, trainer: pl.Trainer, model: LanguageModel) -> ReferenceModel:
        """The reference model; taken from the model if this fit has none yet.

        Raises:
            MisconfigurationException: If the run resumes from a checkpoint without the reference's weights, or the
                reference can't be taken from this model.
        """
        if not isinstance(self._state, _Taken):
            self._state = _Taken(self._take(trainer, model))
        return self._state.reference

    def adapter(self, model: LanguageModel) -> DisabledAdapter | None:
        """The model with its adapters off, if that is the reference or will be."""
        if isinstance(self._state, _Taken):
            return self._state.reference if isinstance(self._state.reference, DisabledAdapter) else None
        if not self.reference.switches_adapter_off:
            return None
        # After a resume the adapter is trained, but the base under it is still the reference.
        restored = isinstance(self._state, _Restored) and self._state.weights is None
        return DisabledAdapter(model) if restored or adapter_is_idle(model) else None

    def follow(self, model: LanguageModel) -> None:
        """Let a moving average take its step. Call it after each optimizer step."""
        if isinstance(self._state, _Taken):
            self._state.reference.follow(model)

    def save(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Put the weights of the reference into a checkpoint, or None if it needs none."""
        if self._model is _Weights.AT_FIT_START and self.resumed_from(trainer) is None:
            checkpoint[_UNTRAINED_KEY] = True
        if isinstance(self._state, _Taken):
            reference = self._state.reference
            checkpoint[self._key] = reference.state_dict() if isinstance(reference, SavedReference) else None
        elif isinstance(self._state, _Restored):
            checkpoint[self._key] = self._state.weights
        if isinstance(self.reference, EMA):
            checkpoint[_AVERAGE_KEY] = True

    def load(self, trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> None:
        """Take the reference from a checkpoint, if it holds or names one.

        Raises:
            MisconfigurationException: If the file that it names is missing or was altered.
        """
        self._checkpoint = _Weights.AT_FIT_START if _UNTRAINED_KEY in checkpoint else _Weights.TRAINED
        # Before references had owners, all callbacks saved theirs under one key.
        key = self._key if self._key in checkpoint else _CHECKPOINT_KEY
        if key not in checkpoint:
            return
        self._state = _Restored(_read(checkpoint[key], trainer.ckpt_path))

    def _take(self, trainer: pl.Trainer, model: LanguageModel) -> ReferenceModel:
        weights = self._state.weights if isinstance(self._state, _Restored) else None
        if isinstance(self._state, _Restored) and weights is None and (adapter := self.adapter(model)) is not None:
            return adapter
        reference = self.reference.take(model, trainer)
        if not isinstance(reference, SavedReference):
            return reference
        if weights is not None:
            reference.load_state_dict(weights)
        elif reference.comes_from_model and self.resumed_from(trainer) is not None:
            raise MisconfigurationException(
                f"The run resumes from {trainer.ckpt_path}, which holds no reference model: it was saved with "
                "`save_weights_only=True` or without replay, and the model before finetuning can't be told from its "
                "weights. Resume from a full checkpoint of a run with replay, or load the weights into the module "
                "and fit without `ckpt_path`: the reference is then the model as loaded."
            )
        return reference

    def _save_beside(self, trainer: pl.Trainer) -> None:
        """Let this Trainer write the reference beside its checkpoints from now on."""
        outermost = io = trainer.strategy.checkpoint_io
        while isinstance(io, SavesReferenceBeside):
            if io.key == self._key:
                io.forget()
                return
            io = io.wrapped
        trainer.strategy.checkpoint_io = SavesReferenceBeside(outermost, self._key)


def saved_reference(checkpoint: Mapping[str, Any], path: Any) -> Mapping[str, Tensor] | None:
    """The weights of the model before the fit, of a checkpoint that holds or names them.

    Args:
        checkpoint: The checkpoint.
        path: Its path.

    Returns:
        None if it needs none, as if they are the model's own under a fresh adapter; empty if it holds no reference.

    Raises:
        MisconfigurationException: If its reference is not the model before the fit, or a file is missing or altered.
    """
    keys = [key for key in checkpoint if key.partition("/")[0] == _CHECKPOINT_KEY]
    if not keys:
        return {}
    # A monitor has one of its own if that of replay is not exactly the model before.
    key = next((key for key in keys if key != _CHECKPOINT_KEY), _CHECKPOINT_KEY)
    saved = _read(checkpoint[key], path)
    other = "a moving average" if key == _CHECKPOINT_KEY and _AVERAGE_KEY in checkpoint else None
    if saved is not None and saved.keys() == {"logits"}:
        other = "another model than the one that trained"
    if other is not None:
        raise MisconfigurationException(
            f"The reference in {path} is {other}, not the model before the fit. Pass that as `base`."
        )
    return saved


def _read(saved: Any, path: Any) -> Mapping[str, Tensor] | None:
    """What a checkpoint holds of a reference, or what is in the file that it names."""
    # The name of a file is text. A weight never is.
    if saved is not None and isinstance(saved.get("file"), str):
        return read_reference(saved, path)
    weights: Mapping[str, Tensor] | None = saved
    return weights
