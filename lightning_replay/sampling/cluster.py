"""Generating rows on a Ray cluster."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_replay.buffers.manifest import Manifest, ShardFile
from lightning_replay.sampling.shard_maker import Recipe, ShardMaker, differences
from lightning_replay.utilities.validation import is_whole

__all__ = ["Ray", "on_ray"]


@dataclass(frozen=True)
class Ray:
    """Generate on a Ray cluster, with actors of Ray Data that each hold a model.

    If an actor is lost, another makes its shard. On CUDA each actor takes a GPU, else as many CPUs as it has threads.

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


class _ShardActor:
    """Makes shards in a worker process."""

    def __init__(
        self, recipe: Recipe, folder: str, settings: dict[str, Any], batch_size: int | None, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._maker, self._folder = ShardMaker(recipe, batch_size), Path(folder)
        other = differences(settings, self._maker.settings())
        if other:
            raise ValueError(
                f"{recipe.model} is another model on this machine than where generating began: {other}. Put the same "
                "model on all machines."
            )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        numbers = [int(number) for number in batch["number"]]
        shards = [vars(self._maker.make(number, self._folder, lambda tokens: None)) for number in numbers]
        return {"number": numbers} | {name: [shard[name] for shard in shards] for name in shards[0]}


def on_ray(
    recipe: Recipe,
    folder: Path,
    numbers: list[int],
    manifest: Manifest,
    cluster: Ray,
    threads: int,
    batch_size: int | None,
) -> Iterator[tuple[int, ShardFile]]:
    """Make shards on a cluster.

    Args:
        recipe: What the rows are.
        folder: Where the shards go.
        numbers: The shards to make.
        manifest: Of the folder.
        cluster: The cluster.
        threads: CPUs and threads of each actor.
        batch_size: Samples decoded at a time; by default as many as memory is meant for.

    Yields:
        The number and the file of each shard, as soon as it is made.

    Raises:
        ModuleNotFoundError: If Ray is not installed.
    """
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
    # A block for each shard, so that each shard is reported as soon as it is made. Ray Data restarts lost actors.
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
