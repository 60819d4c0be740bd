"""Random generators that are independent of each other and of the global random state."""

import numpy as np
import torch

__all__ = ["order_seed", "stream"]


def stream(*key: int) -> torch.Generator:
    """A generator of its own for each key, independent of the others and of the global random state."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


def order_seed(seed: int) -> int:
    """Seed of the order in which a buffer draws the rows that were generated with a seed."""
    return stream(seed, 0, 0).initial_seed()
