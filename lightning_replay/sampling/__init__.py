"""Drawing samples from a language model and making replay rows of them."""

from lightning_replay.sampling.draw import sample_rows
from lightning_replay.sampling.samples import Sampler, Samples

__all__ = ["Sampler", "Samples", "sample_rows"]
