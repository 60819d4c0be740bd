"""The two ends of an interpolation: the model before a fit, π, and the finetuned one, θ."""

import copy
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_replay.interpolation.weights import weights_of
from lightning_replay.models.causal_lm import CausalLM
from lightning_replay.models.language_model import LanguageModel, find_language_model, is_adapted
from lightning_replay.references.adapters import adapter_is_idle
from lightning_replay.references.keeper import saved_reference

__all__ = ["ends"]

Weights = dict[str, Tensor]


def ends(
    finetuned: str | Path,
    base: str | Path | None,
    module: pl.LightningModule | None,
    language_model: str | None,
) -> tuple[LanguageModel, Weights, Weights]:
    """The finetuned model, the weights of the model before, and its own.

    Args:
        finetuned: As for ``interpolate``, as are the others.
        base: The model before.
        module: The LightningModule of a checkpoint.
        language_model: Where the language model is in it.

    Raises:
        ValueError: If an argument has no effect beside the others.
        MisconfigurationException: If one can't be had, or they can't be interpolated.
    """
    if Path(finetuned).is_file():
        model, before = _of_checkpoint(Path(finetuned), base, module, language_model)
    else:
        given = {"module": module, "language_model": language_model}
        unused = [f"`{name}`" for name, value in given.items() if value is not None]
        if unused:
            raise ValueError(
                f"{' and '.join(unused)} would have no effect: {str(finetuned)!r} is no file, so it is read as the "
                "folder or name of a model. They are for checkpoints."
            )
        if base is None:
            raise ValueError(f"`base` is missing: the model before, of which {str(finetuned)!r} holds nothing.")
        before = weights_of(_loaded(base))  # first, so that never more than one model is there beside the weights
        model = find_language_model(_loaded(finetuned), None)
    after = {name: weight.detach().clone() for name, weight in weights_of(model.module).items()}
    _check(before, after, model.module.state_dict().keys())
    return model, before, after


def _of_checkpoint(
    path: Path, base: str | Path | None, module: pl.LightningModule | None, language_model: str | None
) -> tuple[LanguageModel, Weights]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = checkpoint["state_dict"]
    except Exception as error:  # whatever the file holds instead
        raise MisconfigurationException(
            f"{path} can't be read as a checkpoint of Lightning: {type(error).__name__}: {error}"
        ) from error
    # Of a checkpoint that holds no reference, the model that it was made of is the one before.
    held = saved_reference(checkpoint, path) if base is None else {}
    made_of_base = module is None and not held and held is not None
    module = _made(checkpoint, path) if module is None else module
    model = find_language_model(module, language_model)
    before: Weights = {}
    if base is not None:
        before = weights_of(_loaded(base))
    elif held:
        before = dict(held)
        _check_not_rounded(before, weights_of(model.module), path)
    elif made_of_base and not is_adapted(model.module):
        before = {name: weight.detach().clone() for name, weight in weights_of(model.module).items()}
    # Of an adapter that is more than nothing when it is made, or that trains weights under it, π is not what is under.
    holds_base = held is None or (made_of_base and is_adapted(model.module) and adapter_is_idle(model))
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise MisconfigurationException(
            f"The weights in {path} are not those of the {type(module).__name__}: {error} Pass `module` as it was made "
            "for the fit."
        ) from error
    if is_adapted(model.module):
        if held:
            raise MisconfigurationException(
                f"{path} holds a copy of a model with an adapter, which had been trained before this fit. Its factors "
                "can't be interpolated; merge the adapter of each with `merge_and_unload`, save both, and pass the "
                "folders."
            )
        model, unloaded = _merged(model)
        if holds_base:
            before = before or unloaded
    if not before:
        raise MisconfigurationException(
            f"{path} holds no model before: it was saved by a fit without `SelfGeneratedReplay` and without "
            "`ForgettingMonitor`, or with `save_weights_only=True`. Pass `base`, its folder or name."
        )
    return model, before


def _made(checkpoint: Mapping[str, Any], path: Path) -> CausalLM:
    """The ``CausalLM`` of a checkpoint, as it was before the fit."""
    settings = dict(checkpoint.get("hyper_parameters", {}))
    advice = "Pass `module`, the LightningModule as it was made for the fit."
    known = inspect.signature(CausalLM).parameters
    if "model" not in settings or not settings.keys() <= known.keys():
        raise MisconfigurationException(f"{path} is not that of a `CausalLM`, so its model can't be made. {advice}")
    if "model_options" in settings:
        raise MisconfigurationException(
            f"The `CausalLM` of {path} was made with `model_options`, of which checkpoints hold only texts: "
            f"{settings['model_options']}. {advice}"
        )
    try:
        return CausalLM(**settings)
    except Exception as error:  # whatever stands in the way of loading is the reason to show
        raise MisconfigurationException(
            f"The `CausalLM` of {path} was made of {settings['model']!r}, which can't be loaded: "
            f"{type(error).__name__}: {error} {advice}"
        ) from error


def _loaded(folder: str | Path) -> nn.Module:
    """A model in the type that it is saved in."""
    try:
        module: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except Exception as error:  # as above
        raise MisconfigurationException(
            f"The model {str(folder)!r} can't be loaded: {type(error).__name__}: {error}"
        ) from error
    if getattr(module, "peft_config", None):
        raise MisconfigurationException(
            f"{str(folder)!r} holds a PEFT adapter. Merge it into its model with `merge_and_unload`, save that, and "
            "pass the folder; or pass a checkpoint of the fit."
        )
    return module


def _merged(model: LanguageModel) -> tuple[LanguageModel, Weights]:
    """A model with its adapter merged into it, and the weights without the adapter."""
    adapted: Any = model.module
    if not hasattr(adapted, "merge_and_unload"):
        raise MisconfigurationException(
            f"The adapter of {type(adapted).__name__} can't be merged into the weights, so there is nothing to "
            "interpolate."
        )
    base = copy.deepcopy(adapted)
    for part in base.modules():
        if hasattr(part, "modules_to_save") and hasattr(part, "original_module"):
            # PEFT unloads the trained copy.
            part.modules_to_save.update(dict.fromkeys(part.modules_to_save, part.original_module))
    unloaded: Weights = base.unload().state_dict()  # all names: what was tied may be two by now
    return find_language_model(adapted.merge_and_unload(), None), unloaded


def _check(before: Weights, after: Weights, names: Collection[str]) -> None:
    """Refuse weights that have no counterpart of the same kind.

    Args:
        before: Those of the model before, perhaps under several names of one that is tied.
        after: Those of the finetuned model.
        names: All names of these.

    Raises:
        MisconfigurationException: With the name of one.
    """
    for name in sorted(after.keys() | before.keys()):
        ours, theirs = after.get(name), before.get(name)
        if ours is None and name in names:
            continue  # tied to another
        if ours is None or theirs is None:
            raise _refused(name, "only one of them has it")
        if ours.shape != theirs.shape:
            shapes = f"{tuple(theirs.shape)} before, {tuple(ours.shape)} finetuned"
            raise _refused(name, f"its shapes are {shapes}, as of models of other sizes or vocabularies")
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs.to(ours.device)):
                raise _refused(name, f"it is of {ours.dtype} and not equal in both, as quantized weights are")
        elif torch.promote_types(ours.dtype, theirs.dtype) != ours.dtype:
            raise _refused(name, f"it is {theirs.dtype} before and {ours.dtype} finetuned, which would round it")


def _check_not_rounded(held: Weights, ours: Weights, path: Path) -> None:
    for name in held.keys() & ours.keys():
        if held[name].dtype != ours[name].dtype:
            raise MisconfigurationException(
                f"The reference in {path} is a copy in {held[name].dtype} of weights in {ours[name].dtype}, so it is "
                "not exactly the model before the fit. Pass that as `base`."
            )


def _refused(name: str, reason: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"The model before and the finetuned one can't be interpolated at {name!r}: {reason}. Pass the model that the "
        "fit began with, in the type of its weights."
    )
