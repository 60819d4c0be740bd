"""A reference that is another model than the one that trains: loading it, and checking that it can be compared."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typing_extensions import override

from lightning_replay.models.language_model import LanguageModel, find_language_model
from lightning_replay.references.independence import check_unused
from lightning_replay.references.models import LiveModel, SavedReference
from lightning_replay.references.probe import probe_logits, probe_tokens

__all__ = ["OwnModel", "check_same_tokens", "load_own"]

_KEPT = 256
"""Logits of a position that checkpoints hold, to know the model again."""


class OwnModel(LiveModel, SavedReference):
    """A model that is loaded or given. Checkpoints hold a few of its logits, and a run that resumes compares them.

    Args:
        model: The model.
        trained: The model that trains.

    Raises:
        MisconfigurationException: If they have other vocabularies, or it uses weights of the model that trains.
    """

    comes_from_model: ClassVar[bool] = False

    def __init__(self, model: LanguageModel, trained: LanguageModel) -> None:
        if model.vocabulary != trained.vocabulary:
            raise MisconfigurationException(
                f"The reference, a {type(model.module).__name__}, has {model.vocabulary:,} logits a token, and the "
                f"model that trains, a {type(trained.module).__name__}, has {trained.vocabulary:,}: their "
                "distributions can't be compared. Use a reference with the model's own tokenizer and vocabulary, or "
                "next-token loss on rows of your own (`ReplayDataModule(prior=...)`, `loss='ntp'`)."
            )
        check_unused(trained, model)
        super().__init__(model)
        logits = probe_logits(model, probe_tokens(model, 16)).float()
        self._known = logits[..., :: -(-model.vocabulary // _KEPT)].cpu()

    @property
    def model(self) -> LanguageModel:
        """The model."""
        return self._model

    @override
    def state_dict(self) -> dict[str, Tensor]:
        """Some of its logits on fixed tokens."""
        return {"logits": self._known}

    @override
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Compare the model with the one that the checkpoint was saved with.

        Raises:
            MisconfigurationException: If it is another one.
        """
        before = state.get("logits")
        rounding = torch.finfo(next(self.model.module.parameters()).dtype).eps ** 0.5 * float(self._known.abs().max())
        if (
            before is None
            or before.shape != self._known.shape
            or not bool(((before - self._known).abs() <= rounding).all())
        ):
            raise MisconfigurationException(
                f"The run resumes with another reference than it was saved with: {type(self.model.module).__name__} "
                "now gives other logits. Resume with the model that the run began with."
            )


def load_own(
    given: str | os.PathLike[str] | nn.Module, path: str | None, options: Mapping[str, Any], device: torch.device
) -> LanguageModel:
    """The language model that is given, or in a folder or of a name, on a device.

    Raises:
        MisconfigurationException: If it can't be loaded or moved, or no logits are found.
    """
    module: Any = given
    if not isinstance(given, nn.Module):
        try:
            module = AutoModelForCausalLM.from_pretrained(given, **options)
        except Exception as error:  # whatever stands in the way of loading is the reason to show
            raise MisconfigurationException(
                f"The reference {str(given)!r} can't be loaded: {type(error).__name__}: {error}"
            ) from error
    # What accelerate has placed, or bitsandbytes has quantized, stays where it is.
    if not hasattr(module, "hf_device_map"):
        module.to(device)
    return find_language_model(module, path)


def check_same_tokens(given: str | os.PathLike[str] | nn.Module, ours: Any) -> None:
    """Refuse a folder or name whose tokenizer has other tokens than that of the run, as far as both are known.

    Args:
        given: The folder or name; of a module, no tokenizer is known.
        ours: The tokenizer of the run; None if it is not known.

    Raises:
        MisconfigurationException: With a token that differs.
    """
    if isinstance(given, nn.Module) or ours is None:
        return
    if Path(given).is_dir() and not any(Path(given).glob("tokenizer*")):
        return  # transformers would make an empty tokenizer for some kinds of models
    try:
        theirs = AutoTokenizer.from_pretrained(given)
    except (OSError, ValueError):  # a name without a tokenizer, or one that can't be loaded: the model will tell
        return
    ids, other = ours.get_vocab(), theirs.get_vocab()
    differs = sorted(token for token in ids.keys() | other.keys() if ids.get(token) != other.get(token))
    if differs:
        raise MisconfigurationException(
            f"The model in {str(given)!r} has another tokenizer than the run: {len(differs):,} tokens differ, "
            f"such as {differs[0]!r} ({other.get(differs[0])} there, {ids.get(differs[0])} here). Its distributions "
            "are over other tokens, so it can't be compared. Use a model with the same tokenizer."
        )
