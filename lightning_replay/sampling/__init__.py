"""Drawing samples from a language model and making replay rows of them."""

from lightning_replay.sampling.draw import sample_rows
from lightning_replay.sampling.samples import Sampler, Samples
from lightning_replay.sampling.sampling import Sampling

__all__ = ["Sampler", "Samples", "Sampling", "sample_rows"]
