"""The processes of a distributed fit: rank and size, gathering, broadcasting, and errors raised on all ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from torch.distributed.fsdp import FSDPModule

__all__ = ["LostProcessError", "Processes", "check_strategy", "is_sharded"]

T = TypeVar("T")

_DECISIVE = (MemoryError, MisconfigurationException)
"""Errors that end a run at once: all ranks raise their type. Any other error is raised as a `RuntimeError`."""


class LostProcessError(RuntimeError):
    """A collective failed: another process has exited, or did not reach the same call within the time-out."""


@dataclass(frozen=True)
class Processes:
    """The processes of a fit, as seen from one of them. With a single process, no method communicates.

    Communication uses a dedicated gloo group between CPUs. It does not synchronize accelerators, and it never
    interleaves with the strategy's collectives. Every method but ``close`` is a collective: all processes call it, in
    the same order. If one does not within the strategy's time-out, the others raise a ``LostProcessError``.

    Args:
        rank: The rank of this process.
        size: The number of processes.
        lockstep: Whether all processes have to call the model equally often, since each holds a shard of its weights.
        group: The process group; None for a single process.
    """

    rank: int = 0
    size: int = 1
    lockstep: bool = False
    group: Any = None

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "Processes":
        """The processes of a Trainer whose strategy has set them up. All of them call this.

        Raises:
            MisconfigurationException: If several processes share a batch.
        """
        if trainer.world_size == 1:
            return cls()
        if isinstance(trainer.strategy, ModelParallelStrategy):
            sharing = trainer.strategy.device_mesh["tensor_parallel"].size()
            if sharing > 1:
                raise MisconfigurationException(
                    f"Replay gives each process rows for a batch of its own, but under tensor parallelism "
                    f"{sharing} processes share a batch. Use `ModelParallelStrategy(data_parallel_size="
                    f"{trainer.world_size}, tensor_parallel_size=1)`."
                )
        # Lightning has no public name for the time-out that the user gave the strategy; None is torch's own.
        timeout = getattr(trainer.strategy, "_timeout", None)
        group = dist.new_group(backend="gloo", timeout=timeout)
        return cls(trainer.global_rank, trainer.world_size, is_sharded(trainer), group)

    def close(self) -> None:
        """Destroy the process group."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def gather_ints(self, *own: int) -> list[tuple[int, ...]]:
        """Gather integers from all processes.

        Args:
            own: The integers of this process; equally many on each.

        Returns:
            Those of each process, by rank.
        """
        if self.size == 1:
            return [own]
        values = torch.tensor(own, dtype=torch.int64)
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        with _lost_processes():
            dist.all_gather(gathered, values, group=self.group)
        return [tuple(each.tolist()) for each in gathered]

    def gather(self, own: T) -> list[T]:
        """Gather an object from each process; returned by rank."""
        if self.size == 1:
            return [own]
        gathered: list[Any] = [None] * self.size
        with _lost_processes():
            dist.all_gather_object(gathered, own, group=self.group)
        return gathered

    def broadcast(self, own: T) -> T:
        """Return the object of rank 0 on all ranks."""
        if self.size == 1:
            return own
        held = [own]
        with _lost_processes():
            dist.broadcast_object_list(held, src=0, group=self.group)
        return held[0]

    def run_on_all_ranks(self, function: Callable[[], T]) -> T:
        """Call a function on every rank; if it fails on one, raise on all.

        Returns:
            What the function returned on this rank.

        Raises:
            Exception: With a single process, what the function raised. With several, a `MemoryError`, a
                `MisconfigurationException` or else a `RuntimeError` that names the rank and its error.
        """
        if self.size == 1:
            return function()
        result, error, report = None, None, None
        try:
            result = function()
        except Exception as failure:  # of any type: the other ranks would wait for this one
            error = failure
            kind = next((decisive for decisive in _DECISIVE if isinstance(failure, decisive)), RuntimeError)
            report = (kind, f"In process {self.rank}: {type(failure).__name__}: {failure}")
        for failed in self.gather(report):
            if failed is not None:
                kind, message = failed
                raise kind(message) from error
        return result  # type: ignore[return-value]

    def divide(self, items: int, make: Callable[[slice], T]) -> list[T]:
        """Divide the making of some items among the ranks; each rank gets all parts.

        In lockstep every rank makes all items, and those of rank 0 are used.

        Args:
            items: The number of items.
            make: Makes the items in a slice. If it fails on one rank, all raise; see ``run_on_all_ranks``.

        Returns:
            The parts, in the items' order.
        """
        if self.lockstep:
            return [self.broadcast(self.run_on_all_ranks(lambda: make(slice(0, items))))]
        part = slice(items * self.rank // self.size, items * (self.rank + 1) // self.size)
        return self.gather(self.run_on_all_ranks(lambda: make(part)))


@contextmanager
def _lost_processes() -> Iterator[None]:
    """Raise a failed collective as a ``LostProcessError`` that names the likely causes."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            "Replay: another process did not answer, so this one ends too. Look for the first error in the output of "
            "the others. If there is none, one may have had fewer batches than this one (all need equally many, as "
            "under DDP without replay), or sampling took longer than the strategy's `timeout`."
        ) from error


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether each process holds a shard of the weights, so that all have to call the model together.

    A single process, whose shard is the whole, is one of them: a module of FSDP2 can't be copied.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return False
    return trainer.world_size > 1 or any(isinstance(part, FSDPModule) for part in trainer.lightning_module.modules())


def check_strategy(trainer: pl.Trainer, caller: str) -> None:
    """Raise an error for strategies under which the model can't be called outside of the training step.

    Args:
        trainer: The Trainer, its processes set up.
        caller: The name of the class that calls the model, for the message.

    Raises:
        MisconfigurationException: If the strategy is FSDP1, DeepSpeed, or an unknown one with several processes.
    """
    strategy = trainer.strategy
    sharded_otherwise = isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy))
    known = trainer.world_size == 1 or isinstance(strategy, (DDPStrategy, ModelParallelStrategy))
    if sharded_otherwise or not known:
        raise MisconfigurationException(
            f"{caller} also calls the language model outside of `training_step`, which is not supported under "
            f"{type(strategy).__name__}. Use `strategy='ddp'` if the model fits on one device, else "
            "`ModelParallelStrategy` with FSDP2's `fully_shard` in `configure_model`."
        )
