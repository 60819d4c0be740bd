"""The processes that train one model together: which of them this one is, and what they tell each other."""

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

__all__ = ["LostProcessError", "Processes", "check_strategy", "is_sharded"]

T = TypeVar("T")

_DECISIVE = (MemoryError, MisconfigurationException)
"""Errors that end a run at once; all others are told to the other processes as a `RuntimeError`."""


class LostProcessError(RuntimeError):
    """Another process did not answer: it is gone, or it did not come to the same place in time."""


@dataclass(frozen=True)
class Processes:
    """The processes of a fit, as one of them sees it. A single process never waits for anybody.

    They speak over a gloo group of their own, between their CPUs: no accelerator is waited for, and nothing of this
    comes between the collectives of the strategy. Each method is called by all of them, in the same order; where one
    does not come within the strategy's time-out, the others get a ``LostProcessError``.

    Args:
        rank: The number of this process.
        size: How many there are.
        lockstep: Whether all have to call the model equally often, since each holds a part of its weights.
        group: What they speak over.
    """

    rank: int = 0
    size: int = 1
    lockstep: bool = False
    group: Any = None

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "Processes":
        """Those of a Trainer whose strategy has set up its processes; all of them call this.

        Raises:
            MisconfigurationException: If several share a batch.
        """
        if trainer.world_size == 1:
            return cls()
        if isinstance(trainer.strategy, ModelParallelStrategy):
            sharing = trainer.strategy.device_mesh["tensor_parallel"].size()
            if sharing > 1:
                raise MisconfigurationException(
                    f"Replay rows are dealt to processes with batches of their own, but under tensor parallelism "
                    f"{sharing} processes share one. Use `ModelParallelStrategy(data_parallel_size="
                    f"{trainer.world_size}, tensor_parallel_size=1)`."
                )
        # Lightning has no public name for the time-out that the user gave the strategy; None is torch's own.
        timeout = getattr(trainer.strategy, "_timeout", None)
        group = dist.new_group(backend="gloo", timeout=timeout)
        return cls(trainer.global_rank, trainer.world_size, is_sharded(trainer), group)

    def close(self) -> None:
        """Part."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def numbers(self, *own: int) -> list[tuple[int, ...]]:
        """The numbers of each process, by rank."""
        if self.size == 1:
            return [own]
        mine = torch.tensor(own, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with _answers():
            dist.all_gather(everyone, mine, group=self.group)
        return [tuple(numbers.tolist()) for numbers in everyone]

    def gather(self, own: T) -> list[T]:
        """What each process has, by rank."""
        if self.size == 1:
            return [own]
        everyone: list[Any] = [None] * self.size
        with _answers():
            dist.all_gather_object(everyone, own, group=self.group)
        return everyone

    def first(self, own: T) -> T:
        """What the first process has."""
        if self.size == 1:
            return own
        held = [own]
        with _answers():
            dist.broadcast_object_list(held, src=0, group=self.group)
        return held[0]

    def together(self, make: Callable[[], T]) -> T:
        """Call a function in each process; where it fails in one, it fails in all.

        Raises:
            Exception: In a single process, what the function raised. In several, a `MemoryError`,
                `MisconfigurationException` or else `RuntimeError` that says what was raised in which.
        """
        if self.size == 1:
            return make()
        result, error, told = None, None, None
        try:
            result = make()
        except Exception as failure:  # whatever it is, the others have to hear of it
            error = failure
            kind = next((decisive for decisive in _DECISIVE if isinstance(failure, decisive)), RuntimeError)
            told = (kind, f"In process {self.rank}: {type(failure).__name__}: {failure}")
        for failed in self.gather(told):
            if failed is not None:
                kind, message = failed
                raise kind(message) from error
        return result  # type: ignore[return-value]

    def spread(self, items: int, make: Callable[[slice], T]) -> list[T]:
        """Let each process make its part of some items, and give all parts to all of them, in the items' order.

        Where the model is called in lockstep, each makes all of them, and the first one's are taken.

        Args:
            items: How many items there are.
            make: Makes a part of them. Where it fails in one process, it fails in all; see ``together``.
        """
        if self.lockstep:
            return [self.first(self.together(lambda: make(slice(0, items))))]
        part = slice(items * self.rank // self.size, items * (self.rank + 1) // self.size)
        return self.gather(self.together(lambda: make(part)))


@contextmanager
def _answers() -> Iterator[None]:
    """Say what it means where no answer comes."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            "Replay: another process did not answer, so this one ends too. Look for the first error in the other's "
            "output. Where there is none, it may have had fewer batches than this one (all need equally many, as under "
            "DDP without replay), or have taken longer to sample than the strategy's `timeout`."
        ) from error


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether each process holds a part of the weights, so that all have to call the model together."""
    return isinstance(trainer.strategy, ModelParallelStrategy) and trainer.world_size > 1


def check_strategy(trainer: pl.Trainer, caller: str) -> None:
    """Refuse strategies under which the model can't be called outside the training step.

    Args:
        trainer: The Trainer, its processes set up.
        caller: Who wants to call the model.

    Raises:
        MisconfigurationException: If the strategy is one of them.
    """
    strategy = trainer.strategy
    sharded_otherwise = isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy))
    known = trainer.world_size == 1 or isinstance(strategy, (DDPStrategy, ModelParallelStrategy))
    if sharded_otherwise or not known:
        raise MisconfigurationException(
            f"{caller} calls the language model outside of `training_step` as well, and that has not been made to "
            f"work under {type(strategy).__name__}. Use `strategy='ddp'` where the model fits a device, else "
            "`ModelParallelStrategy` with FSDP2's `fully_shard` in `configure_model`."
        )
