"""Generating replay rows ahead of training, in this process or on a Ray cluster."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from lightning_replay.__about__ import __version__
from lightning_replay.buffers.manifest import Manifest, ShardFile
from lightning_replay.sampling.cluster import Ray, on_ray
from lightning_replay.sampling.sampling import Sampling
from lightning_replay.sampling.shard_maker import Recipe, ShardMaker, differences
from lightning_replay.utilities.progress import ProgressLines
from lightning_replay.utilities.validation import is_whole

__all__ = ["Generated", "generate_rows"]


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

    A row depends on its place and on all arguments before ``engine``, since each shard has its own random numbers. So
    either engine and any number of actors write the same files, on one kind of device with one number of threads.
    Another number of threads or another ``batch_size`` sums in another order, which can change a token whose random
    number falls within rounding of the border between two tokens. Shards from an earlier call with the same arguments
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
        shown = _Shown(bar, rows, here)
        if cluster is not None:
            del maker
            shards = on_ray(recipe, folder, missing, manifest, cluster, threads or 1, batch_size)
        else:
            shards = _here(maker, folder, missing, threads, shown)
        for number, shard in shards:
            manifest.shards[number] = shard
            manifest.write(folder)
            shown.set(manifest.rows)
    return Generated(manifest.rows, manifest.rows - here, time.perf_counter() - started)


def _begun(folder: Path, settings: dict[str, Any], recipe: Recipe) -> Manifest:
    """The folder's manifest, with the shards that are complete; a new one if there is none.

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
    other = differences(manifest.settings, settings)
    if other:
        raise ValueError(
            f"{folder} holds rows that were generated with other settings: {other}. Use the same, or another folder."
        )
    manifest.shards = {number: shard for number, shard in manifest.shards.items() if shard.is_whole(folder)}
    return manifest


class _Shown:
    """How many rows are there, in a bar at a terminal and in lines elsewhere."""

    def __init__(self, bar: Any, total: int, rows: int) -> None:
        self.rows = rows
        self._bar, self._total, self._lines = bar, total, ProgressLines(sys.stderr)

    def set(self, rows: int) -> None:
        self.rows = rows
        self._bar.n = rows
        self._bar.refresh()
        self._lines(lambda: f"Generating: {rows:,} of {self._total:,} rows.")


def _here(
    maker: ShardMaker, folder: Path, numbers: list[int], threads: int | None, shown: "_Shown"
) -> Iterator[tuple[int, ShardFile]]:
    length, tokens = maker.recipe.sequence_length, 0

    def advance(sampled: int) -> None:
        nonlocal tokens
        tokens += sampled
        shown.set(shown.rows + tokens // length)
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
