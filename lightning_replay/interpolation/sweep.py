"""A sweep of weights between the model before a fit and the finetuned one (WiSE-FT, arXiv 2109.01903)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_replay.callbacks.measuring import measure_set
from lightning_replay.callbacks.own_samples import OwnSamples, own_samples_of
from lightning_replay.callbacks.prior_sets import PriorSet, check_max_batches, check_set, named_sets
from lightning_replay.data.batches import Batches, first_batches, row_length
from lightning_replay.data.prior import loader_of
from lightning_replay.interpolation.ends import ends
from lightning_replay.interpolation.weights import set_weights
from lightning_replay.models.causal_lm import try_saving
from lightning_replay.models.head import OutputHeads
from lightning_replay.models.language_model import LanguageModel, evaluating, find_tokenizer
from lightning_replay.references.models import ReferenceModel
from lightning_replay.references.own import check_same_tokens
from lightning_replay.sampling.rows import RowGenerator
from lightning_replay.sampling.sampling import Sampling
from lightning_replay.utilities.tables import markdown
from lightning_replay.utilities.validation import is_number, is_whole

__all__ = ["Interpolation", "InterpolationPoint", "interpolate"]

_NEW, _SELF = "new", "self"
_WEIGHTS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class InterpolationPoint:
    """What was measured at one weight of the finetuned model.

    Attributes:
        weight: The share of the finetuned model's weights: 0 is the model before, 1 the finetuned one.
        new_loss: Loss on the new task, in nats a token.
        prior_loss: By prior set, the loss on it.
        forgetting: By prior set, the rise of that loss from the weight 0; of ``self``, the KL divergence from the model
            before on its own samples, which is the expected rise there.
        forgetting_error: The standard error of ``forgetting`` of ``self``, over samples; NaN without that set.
    """

    weight: float
    new_loss: float
    prior_loss: dict[str, float]
    forgetting: dict[str, float]
    forgetting_error: float


@dataclass(frozen=True)
class Interpolation:
    """A sweep of weights between the model before a fit and the finetuned one.

    Attributes:
        points: What was measured at each weight, from 0 on.
        chosen: The weight that was chosen; None if none was asked for.
    """

    points: tuple[InterpolationPoint, ...]
    chosen: float | None

    def table(self) -> str:
        """A line for each weight, in Markdown; the chosen one is marked."""
        sets = list(self.points[0].forgetting)
        rows = []
        for point in self.points:
            errors = {_SELF: f" ± {point.forgetting_error:.4f}"}
            cells = [f"{point.forgetting[name]:+.4f}{errors.get(name, '')}" for name in sets]
            mark = " (chosen)" if point.weight == self.chosen else ""
            rows.append([f"{point.weight:g}{mark}", f"{point.new_loss:.4f}", *cells])
        return markdown(["weight", "new-task loss", *(f"forgetting/{name}" for name in sets)], rows)

    def plot(self, path: str | Path) -> None:
        """Draw forgetting against the new-task loss, a curve for each prior set.

        Args:
            path: The picture, with a suffix that matplotlib knows, such as ``.png`` or ``.svg``.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        from lightning_replay.report.plots import STYLE, Look

        with rc_context(STYLE):
            figure = Figure(figsize=(6.0, 4.0), layout="constrained")
            axis = figure.add_subplot()
            losses = [point.new_loss for point in self.points]
            for index, name in enumerate(self.points[0].forgetting):
                forgotten = [point.forgetting[name] for point in self.points]
                axis.plot(losses, forgotten, marker="o", markersize=3.5, label=name, **Look.of(index).line())
                for point, place in zip(self.points, zip(losses, forgotten, strict=True), strict=True):
                    if point.weight == self.chosen:
                        axis.plot(*place, marker="o", markersize=9, color=Look.of(index).color)
                    if not index:
                        axis.annotate(f"{point.weight:g}", place, (4, 4), textcoords="offset points", fontsize=7)
            axis.invert_xaxis()
            axis.set(
                title="Weights of the finetuned model: right is learned, down is kept",
                xlabel="new-task loss, nats a token",
                ylabel="forgetting, nats a token",
            )
            axis.legend(frameon=False)
            figure.savefig(path, dpi=160)


def interpolate(
    finetuned: str | Path,
    new: PriorSet,
    prior: Mapping[str, PriorSet] | Sequence[tuple[str, PriorSet]] | None = None,
    *,
    base: str | Path | None = None,
    module: pl.LightningModule | None = None,
    weights: Sequence[float] = _WEIGHTS,
    save: str | Path | None = None,
    save_weight: float | None = None,
    max_forgetting: float | None = None,
    self_rows: int | None = None,
    sampling: Sampling | None = None,
    sequence_length: int | None = None,
    max_batches: int | None = None,
    language_model: str | None = None,
    device: str = "auto",
    seed: int = 0,
) -> Interpolation:
    r"""Interpolate the weights of a finetuned model with those of the model before (WiSE-FT, arXiv 2109.01903).

    At each weight w, the model :math:`(1 - w) \pi + w \theta` is measured on the new task, on prior sets and on samples
    of π, as ``ForgettingMonitor`` measures them. It takes no training and forgets less than θ, but gives up a part of
    the new task; whether that is more than replay gives up is what the table is for.

    The average is computed in at least 32 bits and has the type of θ; tied weights stay tied. At 0 and 1 it is π and θ
    bit for bit. In memory are one model and the weights of both.

    Adapters of PEFT are merged into the weights first, so that of LoRA the product is interpolated, not its factors:
    w scales what the adapter adds. At 1, the merged model may differ from the adapted one by rounding.

    Args:
        finetuned: A checkpoint of a fit, or a folder or hub name that ``from_pretrained`` reads.
        new: Held-out batches of the new task, or a datamodule, whose ``val_dataloader`` is measured.
        prior: Held-out prior sets by name, as for ``ForgettingMonitor``; by default only ``self``.
        base: The model before, as a folder or hub name. Needed beside a folder. By default, of a checkpoint, π that it
            holds or names (of a fit with ``SelfGeneratedReplay`` or a ``ForgettingMonitor``), else the ``model`` that
            its ``CausalLM`` was made of.
        module: The LightningModule of the checkpoint, as it was made for the fit; its weights are replaced. Not needed
            for a ``CausalLM`` that was given a folder or name.
        weights: Shares of θ to measure, in [0, 1]. 0 is always measured: forgetting is counted from there.
        save: A folder for the chosen model, as ``from_pretrained`` reads it, with the tokenizer of ``new`` if it has
            one. Needs ``save_weight`` or ``max_forgetting``.
        save_weight: The weight to choose, one of ``weights``.
        max_forgetting: Choose the weight with the lowest new-task loss among those that forget at most so many nats a
            token, on every prior set and on ``self``.
        self_rows: Samples of π to measure on, the set ``self``; by default 64 without ``prior``, else none.
        sampling: How they are sampled.
        sequence_length: Tokens in such a row; by default those of a row of the first batch of ``new``.
        max_batches: The largest number of batches to read of each set; all by default.
        language_model: Where the language model is in the LightningModule, as for ``SelfGeneratedReplay``.
        device: Where to measure; ``"auto"``: CUDA if there is one, else the CPU.
        seed: Seed of the samples.

    Returns:
        What was measured, and the chosen weight.

    Raises:
        ValueError: If an argument is out of its range or has no effect beside the others.
        TypeError: If a set is no loader.
        MisconfigurationException: Before anything is measured, if π or θ can't be had or have other weights, shapes or
            types, if the result can't be saved, or if a set can't be measured.
    """
    shares = _checked(weights, save, save_weight, max_forgetting)
    sets = [(_NEW, new), *([] if prior is None else named_sets(prior))]
    names = [name for name, _ in sets]
    if len({*names, _SELF}) <= len(names):
        raise ValueError(
            f"Each set of `prior` has a name of its own, other than {_NEW!r}, the new task's, and {_SELF!r}, that of "
            f"the model's own samples; got {names[1:]}."
        )
    check_max_batches(max_batches)
    if not is_whole(seed, 0):
        raise ValueError(f"`seed` is a whole number, at least 0; got {seed!r}.")
    for name, loader in sets:
        check_set(name, loader, max_batches)
    own = own_samples_of(self_rows, sampling, sequence_length, prior is None, None, kl=True)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = find_tokenizer(new)
    for folder in (finetuned, base):
        if folder is not None and not Path(folder).is_file():
            check_same_tokens(folder, tokenizer)
    with isolate_rng():
        model, before, after = ends(finetuned, base, module, language_model)
        if save is not None and not hasattr(model.module, "save_pretrained"):
            raise MisconfigurationException(
                f"`save` saves models of transformers; got {type(model.module).__name__}. Leave it out, and set the "
                "weights of your module with `lightning_replay.interpolation.weights.set_weights`."
            )
        if save is not None:
            try_saving(model.module, Path(save))
        model = model.on(model.module.to(device))
        before, after = ({name: part.to(device) for name, part in each.items()} for each in (before, after))
        loaders = {name: _loader(name, data, max_batches) for name, data in sets}
        found = _Sweep(model, before, after, loaders, max_batches, own, tokenizer, seed).measured(shares)
    chosen = save_weight
    if max_forgetting is not None:
        kept = [point for point in found if max(point.forgetting.values()) <= max_forgetting]
        chosen = min(kept, key=lambda point: point.new_loss).weight
    if save is not None and chosen is not None:
        set_weights(model.module, before, after, chosen)
        result: Any = model.module
        result.save_pretrained(save)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(save)
    return Interpolation(found, chosen)


def _checked(
    weights: Sequence[float], save: str | Path | None, save_weight: float | None, max_forgetting: float | None
) -> list[float]:
    """The weights to measure, in order, 0 among them.

    Raises:
        ValueError: If one is out of its range, or what is to be chosen can't be, or has no effect.
    """
    if not isinstance(weights, Sequence) or not all(is_number(each) and 0 <= each <= 1 for each in weights):
        raise ValueError(f"`weights` are shares of the finetuned model's weights, from 0 to 1; got {weights!r}.")
    shares = sorted({0.0, *map(float, weights)})
    if len(shares) < 2:
        raise ValueError(f"`weights` name at least one share above 0, which is the model before; got {weights!r}.")
    if save_weight is not None and save_weight not in shares:
        raise ValueError(f"`save_weight` is one of the `weights` that are measured, {shares}; got {save_weight!r}.")
    if max_forgetting is not None and (not is_number(max_forgetting) or not max_forgetting >= 0):
        raise ValueError(f"`max_forgetting` is at least 0, in nats a token; got {max_forgetting!r}.")
    if save_weight is not None and max_forgetting is not None:
        raise ValueError("`save_weight` and `max_forgetting` both choose a weight. Leave out one of them.")
    if save is None and save_weight is not None:
        raise ValueError("`save_weight` would have no effect without `save`, the folder to save the model in.")
    if save is not None and save_weight is None and max_forgetting is None:
        raise ValueError("`save` needs to know which model: set `save_weight`, or `max_forgetting` in nats a token.")
    return shares


def _loader(name: str, data: PriorSet, max_batches: int | None) -> Batches:
    if not isinstance(data, pl.LightningDataModule):
        return data
    loader = loader_of(data, "val_dataloader", None)
    check_set(name, loader, max_batches)
    return loader


class _Before(ReferenceModel):
    """π in the place of the interpolated weights, for as long as it is asked.

    Args:
        model: The model.
        show: Gives the model the weights at a share of θ.
    """

    def __init__(self, model: LanguageModel, show: Callable[[float], None]) -> None:
        self._model = model
        self._show = show
        self.weight = 0.0

    @override
    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the model with the weights of π; those that it had are back afterwards."""
        self._show(0.0)
        try:
            with evaluating(self._model.module):
                yield self._model
        finally:
            self._show(self.weight)


class _Sweep:
    """Measures a model at several weights.

    Args:
        model: The model, whose weights are replaced.
        before: The weights of π.
        after: Those of θ.
        loaders: The sets by name, the new task among them.
        max_batches: The largest number of batches to read of each.
        own: The samples of π to measure on, if any; not yet sampled.
        tokenizer: Has start and end tokens.
        seed: Of the samples.
    """

    def __init__(
        self,
        model: LanguageModel,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        loaders: Mapping[str, Batches],
        max_batches: int | None,
        own: OwnSamples | None,
        tokenizer: Any,
        seed: int,
    ) -> None:
        self.model = model
        self.before = before
        self.after = after
        self.loaders = loaders
        self.max_batches = max_batches
        self.own = own
        self.tokenizer = tokenizer
        self.seed = seed
        self._heads = OutputHeads()
        self._reference = _Before(model, self._show)

    def measured(self, weights: Sequence[float]) -> tuple[InterpolationPoint, ...]:
        """Measure at each weight, 0 first."""
        self._sample()
        points: list[InterpolationPoint] = []
        for weight in tqdm(weights, desc="Interpolating", unit=" weights", disable=None):
            self._reference.weight = weight
            self._show(weight)
            losses = {name: self._loss(name) for name in self.loaders}
            first = points[0] if points else None
            forgetting = {
                name: loss - (loss if first is None else first.prior_loss[name])
                for name, loss in losses.items()
                if name != _NEW
            }
            error = float("nan")
            if self.own is not None:
                found = measure_set(
                    _SELF,
                    self.own.batches(),
                    self.model,
                    self._reference,
                    self._heads,
                    self.model.device,
                    self.own,
                )
                assert found.kl is not None
                assert found.kl_error is not None
                losses[_SELF], forgetting[_SELF], error = found.loss, found.kl, found.kl_error
            points.append(InterpolationPoint(weight, losses.pop(_NEW), losses, forgetting, error))
        return tuple(points)

    def _show(self, weight: float) -> None:
        set_weights(self.model.module, self.before, self.after, weight)

    def _sample(self) -> None:
        """Sample the rows of π."""
        if self.own is None:
            return
        generator = RowGenerator(self.own.sampling or Sampling())
        generator.bind(self.model, self.tokenizer)
        length = self.own.length
        if length is None:
            first = next(first_batches(self.loaders[_NEW], 1), None)
            if first is None:
                raise MisconfigurationException("`new` gave no batch, so nothing can be measured on it.")
            length = row_length(first)
        self.own.draw(generator, self.model, self._reference, length, self.seed, lambda tokens: None)

    def _loss(self, name: str) -> float:
        batches = first_batches(self.loaders[name], self.max_batches)
        return measure_set(name, batches, self.model, None, self._heads, self.model.device).loss
