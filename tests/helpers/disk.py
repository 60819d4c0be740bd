"""A buffer for tests of full disks."""

import torch

from lightning_replay import ReplayBuffer


def larger_than_the_disk() -> ReplayBuffer:
    buffer = ReplayBuffer(64, 1024)
    buffer.add(torch.randint(2**31, (64, 1024)))
    return buffer
