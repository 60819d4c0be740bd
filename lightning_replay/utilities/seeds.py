"""Random generators that are independent of each other and of the global random state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["held_out_seed", "order_seed", "own_randomness", "stream"]


def stream(*key: int) -> torch.Generator:
    """A generator for each key, independent of those of other keys and of the global random state."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


def order_seed(seed: int) -> int:
    """Seed of the order in which a buffer draws the rows that were generated with a seed."""
    return stream(seed, 0, 0).initial_seed()


def held_out_seed(seed: int) -> int:
    """Seed of rows that are measured and never replayed, beside those that are generated with a seed."""
    return stream(seed, 0, 0, 1).initial_seed()


@contextmanager
def own_randomness(device: torch.device, *key: int) -> Iterator[Callable[[], bool]]:
    """Random numbers, such as those of dropout, that depend only on a key; the global random state stays as it was.

    Args:
        device: The device on which they are drawn.
        key: Equal keys give equal numbers.

    Yields:
        A function that returns whether any has been drawn.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with own_randomness(torch.device("cpu"), 1, 2):
        ...     _ = torch.rand(3)
        >>> first = torch.rand(1)
        >>> _ = torch.manual_seed(0)
        >>> bool(first == torch.rand(1))
        True
    """
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if on_cuda else []):
        seed = stream(*key).initial_seed()
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)

        def states() -> list[torch.Tensor]:
            return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_cuda else [])]

        before = states()
        yield lambda: not all(map(torch.equal, before, states()))
