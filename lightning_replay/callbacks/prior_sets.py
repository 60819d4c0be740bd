"""Held-out prior sets: what may be given as one, and what their batches may hold."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lightning_replay.data.batches import Batches, ModelInputs, inputs_and_targets
from lightning_replay.models.language_model import LanguageModel, check_tokens
from lightning_replay.utilities.validation import check_package, is_whole

__all__ = ["PriorSet", "check_set", "checked_inputs", "named_sets"]

PriorSet = pl.LightningDataModule | Batches


def named_sets(prior: Any) -> list[tuple[str, PriorSet]]:
    """Sets given as a mapping, or as pairs of a name and a loader."""
    if isinstance(prior, Mapping):
        return list(prior.items())
    pairs = list(prior) if isinstance(prior, Sequence) and not isinstance(prior, str) else [prior]
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise TypeError(
            f"`prior` names held-out sets, as in {{'stories': loader}} or [('stories', loader)]; got {prior!r}."
        )
    return pairs


def check_max_batches(max_batches: int | None) -> None:
    """Refuse a number of batches to read of each set that is none.

    Raises:
        ValueError: If it is not at least 1 or None.
    """
    if max_batches is not None and not is_whole(max_batches, 1):
        raise ValueError(f"`max_batches` is at least 1, or None for all; got {max_batches!r}.")


def check_set(name: Any, loader: Any, max_batches: int | None) -> None:
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


def checked_inputs(name: str, batch: Any, model: LanguageModel) -> ModelInputs:
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
