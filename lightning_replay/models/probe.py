"""What is tried on a model before it is trusted: its logits, that it is causal, that its cache is right.

A promise in a signature is not enough. A model that looks ahead can be sampled, trained and measured without an error,
and a cache that is one position off spoils samples silently.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_replay.models.cache import CachedReader
from lightning_replay.models.calls import find_logits, find_state, logits_candidates, may_take_state
from lightning_replay.models.widened import can_widen, widened

__all__ = ["ROWS", "Findings", "cost_without_cache", "find_vocabulary", "probe_tokens", "shown", "try_out"]

ROWS = 4
"""Rows that a cache is tried on: two whose first read is one token, two whose first read is `_PROMPT` tokens."""
_PROMPT = 3
_JITTER = 16.0
"""How far a layer's output is moved to measure rounding, in ``eps`` of 32-bit floats."""
_SHORT_JITTER = 0.5
"""The same for 16-bit floats, in their ``eps``."""
_SHARE_OF_MEMORY = 1 / 8
"""A right cache is off by less than this share of what one earlier token changes."""
_READ_ANEW = 128
"""Tokens of the row that is read to tell what sampling without a cache costs."""


@dataclass(frozen=True)
class Findings:
    """What was found out about a model, as distances between logits (see `try_out`).

    Attributes:
        rounding: What rounding may change in rows of the same shape.
        rounding_alone: The same in tokens that are read alone, one at a time.
        memory: What another token at one earlier position changes in them.
        leak: What another token at one later position changes in them; 0 for a causal model.
        left_out: What leaving out all later tokens changes in them; rounding alone for a causal model.
        off: By how much they are off if read token by token with the model's cache; None if it has none that can be
            tried.
        failure: What it raised on the way.
    """

    rounding: float
    rounding_alone: float
    memory: float
    leak: float
    left_out: float
    off: float | None = None
    failure: str | None = None

    @property
    def looks_ahead(self) -> bool:
        """Whether logits depend on tokens after their position by more than rounding explains.

        Rows of the same shape are rounded alike, so for them the bound is strict. Rows of another length are not.
        """
        return self.leak > self.rounding or self.left_out > max(self.rounding, self.memory * _SHARE_OF_MEMORY)

    @property
    def cache_works(self) -> bool:
        """Whether the cache is right, as far as can be told."""
        return self.off is not None and self.off <= self.rounding_alone and self.off < self.memory * _SHARE_OF_MEMORY

    @property
    def why_no_cache(self) -> str | None:
        """Why a cache that the model has is not used; None if it has none, or if it is used."""
        if self.off is None or self.cache_works:
            return self.failure
        figures = f"its logits are off by {self.off:.1e}, of which rounding explains {self.rounding_alone:.1e}"
        but = "; one earlier token changes " + ("only " if self.off <= self.rounding_alone else "")
        return f"{figures}{but}{self.memory:.1e}"


def find_vocabulary(module: nn.Module, device: torch.device) -> int:
    """Size of the logits' last dimension, from a call with two tokens.

    In a tuple of several tensors, and in an output without a name, the logits are known by their size: that of the
    embedding that looked the tokens up.

    Raises:
        TypeError: If no tensor has the logits' form, or several may be the logits.
    """
    tokens = torch.tensor([[1, 0]], dtype=torch.int64, device=device)  # unlike positions and types, which count from 0
    embeddings: set[int] = set()

    def look(embedding: Any, args: tuple[Any, ...]) -> None:
        ids = args[0] if args else None
        if isinstance(ids, Tensor) and ids.shape == tokens.shape and bool((ids == tokens).all()):
            embeddings.add(embedding.num_embeddings)

    handles = [part.register_forward_pre_hook(look) for part in module.modules() if isinstance(part, nn.Embedding)]
    try:
        output = module(tokens)
    finally:
        for handle in handles:
            handle.remove()
    candidates = logits_candidates(output)
    if not candidates:
        return find_logits(output).shape[2]
    named = isinstance(getattr(output, "logits", None), Tensor) or (isinstance(output, dict) and "logits" in output)
    fitting = [part for part in candidates if named or not embeddings or part.shape[2] in embeddings]
    if len(fitting) == 1:
        return fitting[0].shape[2]
    raise TypeError(
        f"it returned a {type(output).__name__} with tensors of shapes {[tuple(part.shape) for part in candidates]} "
        f"for tokens of shape {tuple(tokens.shape)}, "
        + (
            f"of which {len(fitting) or 'none'} end in the size of its embedding, {sorted(embeddings)}"
            if embeddings
            else "any of which may be the logits"
        )
        + ": return the logits under the name `logits`, in a mapping or an object"
    )


def probe_tokens(config: Any, vocabulary: int, rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random rows of ordinary tokens, and the same rows with another token in the middle; always the same ones."""
    holders = [holder for holder in (config, getattr(config, "text_config", None)) if holder is not None]
    special = {
        value
        for holder in holders
        for name, value in vars(holder).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    ordinary = torch.tensor([t for t in range(vocabulary) if t not in special] or [0], dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(len(ordinary), (rows, length), generator=generator)
    other = choice.clone()
    other[:, length // 2] += torch.randint(1, max(2, len(ordinary)), (rows,), generator=generator)
    return ordinary[choice].to(device), ordinary[other % len(ordinary)].to(device)


def try_out(
    module: nn.Module, ask: Callable[[Tensor], Tensor], vocabulary: int, tokens: Tensor, other: Tensor
) -> Findings:
    """Measure on a few rows what an earlier token, a later token, the cache and rounding change in a model's logits.

    The cache is right if it changes no more than rounding does, and less than an eighth of what one earlier token does:
    if rounding drowns what the model has read, nothing can be told. Rounding is measured, not assumed: it grows with
    depth and with the size of activations. Two measures are taken, and the larger one counts.

    - Each layer's output is moved up or down at random by 16 ``eps`` and the logits compared, as in Monte Carlo
      arithmetic (Parker 1997). A 32-bit dot product of n terms is off by about ``sqrt(n) * eps / 2``, which is 16
      ``eps`` at n = 1024. 16-bit types are summed in 32 bits and rounded once, by ``eps / 2``.
    - The same tokens in other shapes: one row alone and, for the cache, one token alone. Twice the larger difference
      counts. It covers what the first doesn't know of, such as one kernel in TF32 and another in full precision.

    Measured so, a right cache of Llama models with 2 and 30 layers, widths of 16 to 256 and initial weights of 0.02 to
    0.5 is off by 0.02 to 0.13 of the bound in 32 bits (SmolLM2-135M: 0.13), and wrong ones by 90 times the bound or
    more (SmolLM2-135M: above 1000). 16 bits can't tell a cache with one stale layer from rounding (in SmolLM2-135M it
    is off by 2.6 times as much as a right one), so a 16-bit model is tried in 32 bits if that is possible.

    Args:
        module: The module, in evaluation mode.
        ask: Its logits for tokens, without a cache.
        vocabulary: Size of their last dimension.
        tokens: `ROWS` rows of tokens.
        other: The same rows with another token at position ``length // 2``.
    """
    has_state, failure = False, None
    if may_take_state(module):
        try:
            has_state = find_state(module, module(tokens[:, :1], use_cache=True)) is not None
        except Exception as error:  # it takes no `use_cache` after all, or not without more
            failure = f"it raised {shown(error)}"

    def run() -> Findings:
        logits, place = ask(tokens), tokens.shape[1] // 2
        changed = _distance(ask(other), logits)
        left_out = _distance(ask(tokens[:, :place]), logits[:, :place]) if place else changed[:, :0]
        rounding, rounding_alone = _rounding(module, ask, tokens, logits)
        leak, memory = _typical(changed[:, :place]), _typical(changed[:, place + 1 :])
        off = _off(_token_by_token(module, vocabulary, tokens, logits), logits) if has_state else None
        return Findings(rounding, rounding_alone, memory, leak, _typical(left_out), off, failure)

    if can_widen(module):
        try:
            with widened(module):
                return run()
        except Exception as error:  # a layer that insists on its own type, or no memory: 16 bits are what there is
            failure = f"it raised {shown(error)}"
    try:
        return run()
    except Exception as error:  # whatever it raises: it can't go on from what it has read
        if not has_state:
            raise
        has_state, failure = False, f"it raised {shown(error)}"
        return run()


def _token_by_token(module: nn.Module, vocabulary: int, tokens: Tensor, logits: Tensor) -> Tensor:
    """Logits of every position, with the model's cache; some rows begin with one token, the others with several.

    Of those, all but the last are the ``logits`` that are given.
    """
    parts, length = [], tokens.shape[1]
    for rows, prompt in ((slice(ROWS // 2), 1), (slice(ROWS // 2, None), min(_PROMPT, length))):
        reader = CachedReader(module, vocabulary, length)
        read = [reader.read(tokens[rows, :end]) for end in range(prompt, length + 1)]
        parts.append(torch.cat([logits[rows, : prompt - 1], torch.stack(read, 1)], 1))
    return torch.cat(parts)


def _off(read: Tensor, logits: Tensor) -> float:
    """The larger distance of the two kinds of rows: in all four, a wrong first read of several tokens is an outlier."""
    apart = _distance(read, logits)
    return max(_typical(apart[: ROWS // 2]), _typical(apart[ROWS // 2 :]))


def _rounding(
    module: nn.Module, ask: Callable[[Tensor], Tensor], tokens: Tensor, logits: Tensor
) -> tuple[float, float]:
    """How far logits may be off by rounding, in rows of the same shape and in tokens read alone; see `try_out`."""
    with _jittered(module):
        jitter = _typical(_distance(ask(tokens), logits))
    row = _distance(ask(tokens[:1]), logits[:1]).median()
    alone = _distance(ask(tokens[:1, :1]), logits[:1, :1])
    rounding = max(jitter, 2 * float(row))
    return rounding, max(rounding, 2 * float(alone))


def cost_without_cache(
    ask: Callable[[Tensor], Tensor], tokens: Tensor, context: int | None
) -> tuple[int, float, float]:
    """What a token costs without the cache, and what it would cost with it.

    Returns:
        A length in tokens, and the milliseconds that a forward of a row of this length and of a single token take.
    """
    length = min(_READ_ANEW, max(1, (context or 2 * _READ_ANEW) // 2))  # some models read a position or two further
    row = tokens[:1].repeat(1, -(-length // tokens.shape[1]))[:, :length]

    def milliseconds(part: Tensor) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            float(ask(part)[0, -1, 0])  # waits for the device
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times)

    return length, milliseconds(row), milliseconds(row[:, :1])


@contextmanager
def _jittered(module: nn.Module) -> Iterator[None]:
    """Each layer's output is moved by about what rounding may change in it, up or down at random."""
    generators: dict[torch.device, torch.Generator] = {}

    def move(layer: Any, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(0)
        bits = torch.randint(2, output.shape, generator=generators[output.device], device=output.device)
        eps, single = torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps
        step = _SHORT_JITTER * eps if eps > single else _JITTER * single  # families compute parts of 64 bits in 32
        return output + output * (2 * bits - 1).to(output.dtype) * step

    layers = [part for part in module.modules() if not list(part.children()) and list(part.parameters())]
    handles = [layer.register_forward_hook(move) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _distance(some: Tensor, others: Tensor) -> Tensor:
    """Root mean square of the difference between log-probabilities up to a constant, shape ``(rows, length)``.

    On the CPU: on CUDA, medians along a dimension are refused under ``Trainer(deterministic=True)``.
    """
    some, others = some.double(), others.double()
    difference = torch.where(some == others, 0.0, some - others)  # -inf stands at tokens that a model never outputs
    return (difference - difference.mean(-1, keepdim=True)).square().mean(-1).sqrt().cpu()


def _typical(distances: Tensor) -> float:
    """The largest median of a row or of a position.

    A wrong cache is wrong at every position of some row, or in every row at some position. An expert that rounding
    chose in another's place is a single outlier.
    """
    if not distances.numel():
        return 0.0
    if distances.isnan().any():
        return math.nan
    return max(float(distances.median(0).values.max()), float(distances.median(1).values.max()))


def shown(error: Exception) -> str:
    """An error's name, with its message if it has one, to stand inside a sentence."""
    message = str(error).rstrip(". \n")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
