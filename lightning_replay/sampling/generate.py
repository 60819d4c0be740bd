"""Generating replay rows ahead of training, in this process or on a Ray cluster."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_replay.__about__ import __version__
from lightning_replay.buffers.manifest import Manifest, ShardFile, shard_name
from lightning_replay.buffers.shards import write_shard
from lightning_replay.models.causal_lm import CausalLM
from lightning_replay.models.language_model import evaluating, find_language_model, weights_hash
from lightning_replay.references.cached import cache_reference
from lightning_replay.sampling.rows import RowGenerator
from lightning_replay.sampling.sampling import Sampling
from lightning_replay.utilities.logging import filter_name
from lightning_replay.utilities.validation import is_number, is_whole

__all__ = ["Generated", "Ray", "Recipe", "ShardMaker", "generate_rows"]


@dataclass(frozen=True)
class Ray:
    """Generates on a Ray cluster: actors of Ray Data, each with a model of its own.

    A shard whose actor is lost is made by another. On CUDA each actor takes a GPU, else the CPUs that it has threads
    for.

    Args:
        actors: How many actors.
        address: The cluster to connect to if Ray is not connected yet; by default the one that Ray finds, or else one
            on this machine.

    Raises:
        ValueError: If ``actors`` is below 1.
    """

    actors: int = 2
    address: str | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.actors, 1):
            raise ValueError(f"`actors` is a whole number, at least 1; got {self.actors!r}.")


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
        """The same with the device that ``"auto"`` stands for in this process."""
        if self.device != "auto":
            return self
        return replace(self, device="cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Generated:
    """What a call of ``generate_rows`` has done.

    Attributes:
        rows: Rows in the folder.
        new_rows: Those that this call made; the others were there.
        seconds: What they took, without loading the model.
    """

    rows: int
    new_rows: int
    seconds: float


class ShardMaker:
    """A model and all that is needed to make any shard of a folder.

    Args:
        recipe: What the rows are.
        batch_size: Samples decoded at a time; by default as many as memory is meant for.
        device: Where the model runs; by default as in the recipe.

    Raises:
        MisconfigurationException: If the samples don't fit the model.
    """

    def __init__(self, recipe: Recipe, batch_size: int | None = None, device: str | None = None) -> None:
        self.recipe = recipe = recipe.here()
        trust = {"trust_remote_code": recipe.trust_remote_code}
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
        }

    def make(self, number: int, folder: Path, progress: Callable[[int], Any]) -> ShardFile:
        """Make a shard and write it; it depends on the settings and its number alone.

        Args:
            number: Which one.
            folder: Where to.
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


def generate_rows(
    model: str,
    rows: int,
    output: str | Path,
    sampling: Sampling = Sampling(),  # noqa: B008
    sequence_length: int = 512,
    seed: int = 0,
    reference_top_k: int = 0,
    divergence_temperature: float = 1.0,
    shard_rows: int = 512,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    engine: Literal["local", "ray"] | Ray = "local",
    threads: int | None = None,
    batch_size: int | None = None,
) -> Generated:
    """Write rows that a model generates to a folder of Parquet shards with a manifest.

    A row depends on its place and on all arguments before ``engine``: each shard has random numbers of its own. So
    either engine and any number of actors write the same files, on one kind of device with one number of threads.
    Another number of threads or another ``batch_size`` adds up in another order, which may change a token whose draw
    falls within rounding of the border between two. Shards that are there from an earlier call with the same arguments
    are kept.

    Args:
        model: A name on the Hugging Face hub or a folder, of a causal language model and its tokenizer, if it has one.
            On a cluster, each machine has to find it under this name.
        rows: How many rows.
        output: The folder. On a cluster, all machines have to see it under this path.
        sampling: How rows are sampled.
        sequence_length: Tokens in a row.
        seed: Seed of sampling. A run with ``SelfGeneratedReplay(seed=...)`` and refills of ``shard_rows`` samples the
            same rows.
        reference_top_k: How many of the model's log-probabilities to keep with each position; 0 for none.
        divergence_temperature: What the logits are divided by before these are taken.
        shard_rows: Rows in a file, which is made in one go.
        dtype: What the weights are computed in, as ``"bfloat16"``. If that rounds them, the model that is trained on
            the rows has to be rounded likewise.
        device: Where the model runs; ``"auto"``: CUDA if this process sees it, else the CPU.
        trust_remote_code: Whether the model may bring code of its own, which is then executed.
        engine: ``"local"``: this process. ``"ray"`` or ``Ray(actors, address)``: a Ray cluster.
        threads: Threads that a process computes with; by default as many as torch takes, and 1 for an actor.
        batch_size: Samples decoded at a time; by default as many as memory is meant for.

    Returns:
        What was done.

    Raises:
        ValueError: If the folder holds rows with other settings, or an argument is out of its range.
        MisconfigurationException: If the samples don't fit the model.
        ModuleNotFoundError: If the engine is not installed.
    """
    if not isinstance(engine, Ray) and engine not in ("local", "ray"):
        raise ValueError(f"`engine` is 'local', 'ray' or Ray(...); got {engine!r}.")
    for name, number in {"batch_size": batch_size or 1, "threads": threads or 1}.items():
        if not is_whole(number, 1):
            raise ValueError(f"`{name}` is a whole number, at least 1; got {number!r}.")
    folder = Path(output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        model,
        rows,
        sampling,
        sequence_length,
        seed,
        reference_top_k,
        divergence_temperature,
        shard_rows,
        dtype,
        device,
        trust_remote_code,
    ).here()
    cluster = Ray() if engine == "ray" else engine if isinstance(engine, Ray) else None
    # Under Ray this process only finds out what the model is, and may be on a machine without an accelerator.
    maker = ShardMaker(recipe, batch_size, None if cluster is None else "cpu")
    manifest = _begun(folder, maker.settings(), recipe)
    here, missing, started = manifest.rows, manifest.missing, time.perf_counter()
    with tqdm(total=rows, initial=here, desc="Generating", unit=" rows", disable=None) as bar:
        if cluster is not None:
            del maker
            shards = _on_ray(recipe, folder, missing, manifest, cluster, threads or 1, batch_size)
        else:
            shards = _here(maker, folder, missing, threads, bar)
        for number, shard in shards:
            manifest.shards[number] = shard
            manifest.write(folder)
            bar.n = manifest.rows
            bar.refresh()
    return Generated(manifest.rows, manifest.rows - here, time.perf_counter() - started)


def _begun(folder: Path, settings: dict[str, Any], recipe: Recipe) -> Manifest:
    """The folder's manifest, with the shards that are whole; a new one where there is none.

    Raises:
        ValueError: If what is there was made with other settings.
    """
    about = {"model": recipe.model, "made_with": f"lightning-replay {__version__}"}
    about["made_with"] += f", torch {torch.__version__}"
    try:
        manifest = Manifest.read(folder)
    except FileNotFoundError:
        manifest = Manifest(settings, about, {})
        manifest.write(folder)
        return manifest
    other = _differences(manifest.settings, settings)
    if other:
        raise ValueError(
            f"{folder} holds rows that were generated with other settings: {other}. Use the same, or another folder."
        )
    manifest.shards = {number: shard for number, shard in manifest.shards.items() if shard.is_whole(folder)}
    return manifest


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
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


def _here(
    maker: ShardMaker, folder: Path, numbers: list[int], threads: int | None, bar: Any
) -> Iterator[tuple[int, ShardFile]]:
    length, tokens = maker.recipe.sequence_length, 0

    def advance(sampled: int) -> None:
        nonlocal tokens
        tokens += sampled
        bar.update(tokens // length)
        tokens %= length

    with _threads(threads):
        for number in numbers:
            yield number, maker.make(number, folder, advance)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _ShardActor:
    """Makes shards in a process of its own."""

    def __init__(
        self, recipe: Recipe, folder: str, settings: dict[str, Any], batch_size: int | None, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._maker, self._folder = ShardMaker(recipe, batch_size), Path(folder)
        other = _differences(settings, self._maker.settings())
        if other:
            raise ValueError(
                f"{recipe.model} is another model on this machine than where generating began: {other}. Put the same "
                "model on all machines."
            )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        numbers = [int(number) for number in batch["number"]]
        shards = [vars(self._maker.make(number, self._folder, lambda tokens: None)) for number in numbers]
        return {"number": numbers} | {name: [shard[name] for shard in shards] for name in shards[0]}


def _on_ray(
    recipe: Recipe,
    folder: Path,
    numbers: list[int],
    manifest: Manifest,
    cluster: Ray,
    threads: int,
    batch_size: int | None,
) -> Iterator[tuple[int, ShardFile]]:
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The engine 'ray' needs {error.name}, which is not installed: pip install 'lightning-replay[ray]'"
        ) from error
    if not numbers:
        return
    if not ray.is_initialized():
        ray.init(address=cluster.address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # A block for each shard, so that a shard is reported as soon as it is made. Ray Data starts lost actors anew.
    shards = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    made = shards.map_batches(
        _ShardActor,
        fn_constructor_args=(recipe, str(folder), manifest.settings, batch_size, threads),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(cluster.actors, len(numbers))),
        num_cpus=threads,
        num_gpus=int(recipe.device.startswith("cuda")),
    )
    for row in made.iter_rows():
        number = row.pop("number")
        yield number, ShardFile(**row)


def _tokenizer(recipe: Recipe) -> Any:
    """The model's tokenizer; None where it has none."""
    try:
        return AutoTokenizer.from_pretrained(recipe.model, trust_remote_code=recipe.trust_remote_code)
    except (OSError, ValueError):
        return None


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
