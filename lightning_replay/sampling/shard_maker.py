"""Making any shard of a folder of rows."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_replay.buffers.manifest import ShardFile, shard_name
from lightning_replay.buffers.shards import write_shard
from lightning_replay.models.causal_lm import CausalLM
from lightning_replay.models.language_model import evaluating, find_language_model, weights_hash
from lightning_replay.references.cached import cache_reference
from lightning_replay.sampling.rows import RowGenerator
from lightning_replay.sampling.sampling import Sampling
from lightning_replay.utilities.logging import filter_name
from lightning_replay.utilities.validation import check_model_folder, is_number, is_whole

__all__ = ["Recipe", "ShardMaker", "differences"]


@dataclass(frozen=True)
class Recipe:
    """All that the rows of a folder depend on; see ``generate_rows``.

    Raises:
        ValueError: If a number is out of its range, or a choice is unknown.
    """

    model: str
    rows: int
    sampling: Sampling = Sampling()  # noqa: RUF009
    sequence_length: int = 512
    seed: int = 0
    reference_top_k: int = 0
    divergence_temperature: float = 1.0
    shard_rows: int = 512
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        least = {"rows": 1, "sequence_length": 2, "seed": 0, "reference_top_k": 0, "shard_rows": 1}
        for name, smallest in least.items():
            if not is_whole(getattr(self, name), smallest):
                raise ValueError(f"`{name}` is a whole number, at least {smallest}; got {getattr(self, name)!r}.")
        if not is_number(self.divergence_temperature) or not self.divergence_temperature > 0:
            raise ValueError(f"`divergence_temperature` is above 0; got {self.divergence_temperature!r}.")
        kind = getattr(torch, self.dtype, None)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise ValueError(f"`dtype` is a floating-point type of torch, such as 'bfloat16'; got {self.dtype!r}.")
        if self.reference_top_k == 0 and self.divergence_temperature != 1:
            raise ValueError(
                "`divergence_temperature` divides the logits of kept log-probabilities, and with `reference_top_k=0` "
                "none are kept. Set `reference_top_k`, or leave it out."
            )

    @property
    def planned(self) -> int:
        """How many shards there will be."""
        return -(-self.rows // self.shard_rows)

    def here(self) -> "Recipe":
        """The same recipe, with ``device="auto"`` resolved for this process."""
        if self.device != "auto":
            return self
        return replace(self, device="cuda" if torch.cuda.is_available() else "cpu")


class ShardMaker:
    """A model and all that is needed to make any shard of a folder.

    Args:
        recipe: What the rows are.
        batch_size: Samples decoded at a time; by default as many as memory is meant for.
        device: Where the model runs; by default as in the recipe.

    Raises:
        FileNotFoundError: If the model is a path to no folder.
        MisconfigurationException: If the samples don't fit the model.
    """

    def __init__(self, recipe: Recipe, batch_size: int | None = None, device: str | None = None) -> None:
        self.recipe = recipe = recipe.here()
        trust = {"trust_remote_code": recipe.trust_remote_code}
        check_model_folder(recipe.model)
        with isolate_rng():
            module = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=getattr(torch, recipe.dtype), **trust)
        self.tokenizer = _tokenizer(recipe)
        self._model = find_language_model(CausalLM(module).to(device or recipe.device), "model")
        self._generator = RowGenerator(recipe.sampling, batch_size)
        self._generator.bind(self._model, self.tokenizer)
        self._generator.check_length(recipe.sequence_length, self._model)

    def settings(self) -> dict[str, Any]:
        """The manifest's record of the rows: equal settings make equal rows."""
        chosen = {
            name: value for name, value in vars(self.recipe).items() if name not in ("model", "trust_remote_code")
        }
        sampling, prompts = self.recipe.sampling, self.recipe.sampling.prompts
        vocabulary = None if self.tokenizer is None else sorted(self.tokenizer.get_vocab().items())
        return chosen | {
            "device": torch.device(self.recipe.device).type,
            "sampling": vars(sampling)
            | {
                "prompts": prompts if prompts is None or isinstance(prompts, str) else _digest(list(prompts)),
                "stop_at_eos": sampling.stops_at_eos,
                "filters": list(map(_described, sampling.filters)),
                "sampler": None if sampling.sampler is None else _described(sampling.sampler),
            },
            "model_hash": weights_hash(self._model.module),
            "vocabulary": self._model.vocabulary,
            "tokenizer": None if vocabulary is None else _digest(vocabulary),
            "begin_and_end": _digest(self._generator.bound),
        }

    def make(self, number: int, folder: Path, progress: Callable[[int], Any]) -> ShardFile:
        """Make a shard and write it; it depends only on the settings and its number.

        Args:
            number: Which one.
            folder: Where the shard goes.
            progress: Called with the number of tokens drawn since it was last called.
        """
        recipe = self.recipe
        # As if all shards before it had been made by this generator.
        piece = self._generator.piece_length(recipe.sequence_length, self._model)
        samples = number * -(-recipe.shard_rows * recipe.sequence_length // piece)
        self._generator = generator = self._generator.fork(refills=number, samples_drawn=samples)
        rows = min(recipe.shard_rows, recipe.rows - number * recipe.shard_rows)
        with evaluating(self._model.module):
            made, _ = generator.generate(self._model, rows, recipe.sequence_length, recipe.seed, progress)
            if recipe.reference_top_k:
                made = cache_reference(self._model, made, recipe.reference_top_k, recipe.divergence_temperature)
        return write_shard(folder / shard_name(number, recipe.planned), made)


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """In what two settings differ."""
    theirs, ours = _flat(theirs), _flat(json.loads(json.dumps(ours)))
    other = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    return ", ".join(f"{name} {theirs.get(name)!r}, now {ours.get(name)!r}" for name in other)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of sampling as ``sampling.<name>``."""
    sampling = settings.get("sampling", {})
    return {name: value for name, value in settings.items() if name != "sampling"} | {
        f"sampling.{name}": value for name, value in sampling.items()
    }


def _described(function: Any) -> str:
    """A filter or sampler in the manifest: its settings if it is a dataclass, else its name."""
    return repr(function) if is_dataclass(function) else filter_name(function)


def _tokenizer(recipe: Recipe) -> Any:
    """The model's tokenizer; None if it has none."""
    try:
        return AutoTokenizer.from_pretrained(recipe.model, trust_remote_code=recipe.trust_remote_code)
    except (OSError, ValueError):
        return None


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
