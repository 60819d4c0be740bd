"""Generating replay rows ahead of training, in this process or on a Ray cluster."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from lightning_replay.sampling.prompts import PromptsLike
from lightning_replay.sampling.rows import RowGenerator
from lightning_replay.utilities.validation import check_choice, is_number, is_whole

__all__ = ["Engine", "Generated", "RowOptions", "ShardMaker", "generate_rows"]

Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class RowOptions:
    """All that the rows of a folder depend on.

    Args:
        model: A name on the Hugging Face hub or a folder, of a causal language model and its tokenizer, if it has one.
            On a cluster, each machine has to find it under this name.
        rows: How many rows.
        sequence_length: Tokens in a row.
        sample_length: Tokens sampled in one piece; see ``SelfGeneratedReplay``, as for the
            next six.
        prompts: What samples begin with.
        temperature: Sampling temperature.
        top_k: Truncation of the distribution.
        top_p: Truncation of the distribution.
        min_p: Truncation of the distribution.
        stop_at_eos: Whether the end token ends a sample.
        seed: Seed of sampling. A run with ``SelfGeneratedReplay(seed=...)`` and refills of ``shard_rows`` samples the
            same rows.
        reference_top_k: How many of the model's log-probabilities to keep with each position; 0 for none.
        divergence_temperature: What the logits are divided by before these are taken.
        shard_rows: Rows in a file, which is made at one go.
        dtype: What the weights are computed in, as ``"bfloat16"``. Where that rounds them, the model that is trained on
            the rows has to be rounded likewise.
        device: Where the model runs; ``"auto"``: CUDA where this process sees it, else the CPU.
        trust_remote_code: Whether the model may bring code of its own, which is then executed.

    Raises:
        ValueError: If a number is out of its range, or a choice is unknown.
    """

    model: str
    rows: int
    sequence_length: int = 512
    sample_length: int | None = None
    prompts: PromptsLike | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop_at_eos: bool = False
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

    @property
    def planned(self) -> int:
        """How many shards there will be."""
        return -(-self.rows // self.shard_rows)

    def here(self) -> "RowOptions":
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
        options: What the rows are.
        batch_size: Samples decoded at a time; by default as many as memory is meant for.
        device: Where the model runs; by default as the options say.

    Raises:
        MisconfigurationException: If the samples don't fit the model.
    """

    def __init__(self, options: RowOptions, batch_size: int | None = None, device: str | None = None) -> None:
        self.options = options = options.here()
        trust = {"trust_remote_code": options.trust_remote_code}
        with isolate_rng():
            module = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype), **trust)
        self.tokenizer = _tokenizer(options)
        self._model = find_language_model(CausalLM(module).to(device or options.device), "model")
        self._generator = RowGenerator(
            prompts=options.prompts,
            sample_length=options.sample_length,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            stop_at_eos=options.stop_at_eos,
        )
        self._generator.batch_size = batch_size
        self._generator.bind(self._model, self.tokenizer)
        self._generator.check_length(options.sequence_length, self._model)

    def settings(self) -> dict[str, Any]:
        """What the manifest says of the rows: equal settings make equal rows."""
        chosen = {
            name: value for name, value in vars(self.options).items() if name not in ("model", "trust_remote_code")
        }
        prompts = self.options.prompts
        vocabulary = None if self.tokenizer is None else sorted(self.tokenizer.get_vocab().items())
        return chosen | {
            "device": torch.device(self.options.device).type,
            "prompts": prompts if prompts is None or prompts == "chat" else _digest(list(prompts)),
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
        options, generator = self.options, self._generator.fork()
        # As if all shards before it had been made by this generator.
        piece = generator.piece_length(options.sequence_length, self._model)
        generator.refills = number
        generator.samples_drawn = number * -(-options.shard_rows * options.sequence_length // piece)
        rows = min(options.shard_rows, options.rows - number * options.shard_rows)
        with evaluating(self._model.module):
            made, _ = generator.generate(self._model, rows, options.sequence_length, options.seed, progress)
            if options.reference_top_k:
                made = cache_reference(self._model, made, options.reference_top_k, options.divergence_temperature)
        self._generator.batch_size = generator.batch_size
        return write_shard(folder / shard_name(number, options.planned), made)


def generate_rows(
    options: RowOptions,
    output: str | Path,
    engine: Engine = "local",
    actors: int = 2,
    batch_size: int | None = None,
    threads: int | None = None,
    ray_address: str | None = None,
) -> Generated:
    """Write rows that a model generates to a folder of Parquet shards with a manifest.

    A row depends on the options and on its place alone: each shard has random numbers of its own. So either engine and
    any number of actors write the same files, on one kind of device with one number of threads. Another number of
    threads or another ``batch_size`` adds up in another order, which may change a token whose draw falls within
    rounding of the border between two. Shards that are there from an earlier call with the same options are kept.

    Args:
        options: What the rows are.
        output: The folder. On a cluster, all machines have to see it under this path.
        engine: ``"local"``: this process. ``"ray"``: actors of Ray Data, on the cluster that Ray is connected to, else
            on one of this machine. A shard whose actor is lost is made by another.
        actors: How many actors, each with a model of its own. On CUDA each takes a GPU, else ``threads`` CPUs.
        batch_size: Samples decoded at a time; by default as many as memory is meant for.
        threads: Threads that a process computes with; by default as many as torch takes, and 1 for an actor.
        ray_address: The cluster to connect to, where Ray is not connected yet; by default the one that Ray finds.

    Returns:
        What was done.

    Raises:
        ValueError: If the folder holds rows with other options, or an argument is out of its range.
        MisconfigurationException: If the samples don't fit the model.
        ModuleNotFoundError: If the engine is not installed.
    """
    check_choice("engine", engine, Engine)
    for name, number in {"actors": actors, "batch_size": batch_size or 1, "threads": threads or 1}.items():
        if not is_whole(number, 1):
            raise ValueError(f"`{name}` is a whole number, at least 1; got {number!r}.")
    folder = Path(output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    # Under Ray this process only finds out what the model is, and may be where no accelerator is.
    options = options.here()
    maker = ShardMaker(options, batch_size, "cpu" if engine == "ray" else None)
    manifest = _begun(folder, maker.settings(), options)
    here, missing, started = manifest.rows, manifest.missing, time.perf_counter()
    with tqdm(total=options.rows, initial=here, desc="Generating", unit=" rows", disable=None) as bar:
        if engine == "ray":
            del maker
            shards = _on_ray(options, folder, missing, manifest, actors, batch_size, threads or 1, ray_address)
        else:
            shards = _here(maker, folder, missing, threads, bar)
        for number, shard in shards:
            manifest.shards[number] = shard
            manifest.write(folder)
            bar.n = manifest.rows
            bar.refresh()
    return Generated(manifest.rows, manifest.rows - here, time.perf_counter() - started)


def _begun(folder: Path, settings: dict[str, Any], options: RowOptions) -> Manifest:
    """The folder's manifest, with the shards that are whole; a new one where there is none.

    Raises:
        ValueError: If what is there was made with other settings.
    """
    about = {"model": options.model, "made_with": f"lightning-replay {__version__}"}
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
    ours = json.loads(json.dumps(ours))
    other = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    return ", ".join(f"{name} {theirs.get(name)!r}, now {ours.get(name)!r}" for name in other)


def _here(
    maker: ShardMaker, folder: Path, numbers: list[int], threads: int | None, bar: Any
) -> Iterator[tuple[int, ShardFile]]:
    length, tokens = maker.options.sequence_length, 0

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
        self, options: RowOptions, folder: str, settings: dict[str, Any], batch_size: int | None, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._maker, self._folder = ShardMaker(options, batch_size), Path(folder)
        other = _differences(settings, self._maker.settings())
        if other:
            raise ValueError(
                f"{options.model} is another model on this machine than where generating began: {other}. Put the same "
                "model on all machines."
            )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        numbers = [int(number) for number in batch["number"]]
        shards = [vars(self._maker.make(number, self._folder, lambda tokens: None)) for number in numbers]
        return {"number": numbers} | {name: [shard[name] for shard in shards] for name in shards[0]}


def _on_ray(
    options: RowOptions,
    folder: Path,
    numbers: list[int],
    manifest: Manifest,
    actors: int,
    batch_size: int | None,
    threads: int,
    address: str | None,
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
        ray.init(address=address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # A block for each shard, so that a shard is reported as soon as it is made. Ray Data starts lost actors anew.
    shards = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    made = shards.map_batches(
        _ShardActor,
        fn_constructor_args=(options, str(folder), manifest.settings, batch_size, threads),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(numbers))),
        num_cpus=threads,
        num_gpus=int(options.device.startswith("cuda")),
    )
    for row in made.iter_rows():
        number = row.pop("number")
        yield number, ShardFile(**row)


def _tokenizer(options: RowOptions) -> Any:
    """The model's tokenizer; None where it has none."""
    try:
        return AutoTokenizer.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError):
        return None


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
