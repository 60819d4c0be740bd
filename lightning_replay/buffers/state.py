"""Checks of a replay buffer's saved state, because a checkpoint or a file can be damaged or altered."""

from collections.abc import Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor

from lightning_replay.utilities.validation import is_whole

__all__ = ["FORMAT", "ROWS", "checked_state", "damaged"]

FORMAT = 2
_READABLE = (1, FORMAT)
ROWS = ("tokens", "lengths", "steps", "top_ids", "top_log_probs")
_SINCE_2 = ("uses", "steps", "top_ids", "top_log_probs")
_LARGEST_NUMBER = 2**62
_ROUNDED_ZERO = 1e-3
"""The largest value that a log-probability of 0 can round to."""


def checked_state(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check a saved state and complete it to the present format, with its tensors on the CPU.

    The policy's name can be any string: the policy may be the user's own.

    Raises:
        ValueError: If the state has a later format, or no buffer can be in such a state.
    """
    if given.get("format") not in _READABLE:
        raise ValueError(
            f"The saved replay buffer has format {given.get('format')!r}; this version of lightning-replay reads "
            f"{' and '.join(map(str, _READABLE))}. Load it with the version that wrote it."
        )
    # Format 1 had no targets (each token was one), no uses, steps or cached log-probabilities.
    state = ({"top_k": 0, "passes": 0} if given["format"] == 1 else {}) | dict(given)
    for name, smallest in {"capacity": 1, "length": 2, "top_k": 0, "seen": 0, "passes": 0}.items():
        if not is_whole(state.get(name), smallest, _LARGEST_NUMBER):
            raise damaged(f"`{name}` is {state.get(name)!r}")
    if not isinstance(state.get("policy"), str):
        raise damaged(f"`policy` is {state.get('policy')!r}")
    filled, length, top_k = min(state["seen"], state["capacity"]), state["length"], state["top_k"]
    everything: dict[str, tuple[tuple[int, ...] | None, torch.dtype, float, float]] = {
        "deck": (None, torch.int64, 0, filled - 1),
        "generator": (None, torch.uint8, 0, 255),
        "uses": ((filled,), torch.int32, 0, inf),
        "tokens": ((filled, length), torch.int32, -inf, inf),
        "lengths": ((filled,), torch.int32, 1, length),
        "steps": ((filled,), torch.int64, -inf, inf),
        "top_ids": ((filled, length - 1, top_k), torch.int32, 0, inf),
        "top_log_probs": ((filled, length - 1, top_k + 1 if top_k else 0), torch.float16, -inf, _ROUNDED_ZERO),
    }
    left_out = (() if "tokens" in state else ROWS) + (_SINCE_2 if state["format"] == 1 else ())
    for name, (shape, dtype, least, most) in everything.items():
        if name in state or name not in left_out:
            state[name] = _checked_tensor(name, state.get(name), shape, dtype, least, most)
    if len(state["deck"].unique()) < len(state["deck"]):
        raise damaged("`deck` holds a slot twice")
    try:
        torch.Generator().set_state(state["generator"])
    except RuntimeError as error:
        raise damaged(f"`generator` is no state of a random generator ({error})") from error
    return state


def _checked_tensor(
    name: str, value: Any, shape: tuple[int, ...] | None, dtype: torch.dtype, least: float, most: float
) -> Tensor:
    """A tensor of a saved state, on the CPU; without a ``shape``, one dimension of any length is accepted."""
    if not isinstance(value, Tensor) or value.is_meta:
        raise damaged(f"`{name}` is {type(value).__name__}, not a tensor that holds data")
    if value.dtype != dtype or (value.dim() != 1 if shape is None else value.shape != shape):
        given = f"{value.dtype} of shape {tuple(value.shape)}"
        raise damaged(f"`{name}` is {given}, not {dtype} of shape {shape or '(any,)'}")
    if value.numel() and not (least <= value.min().item() and value.max().item() <= most):
        raise damaged(f"`{name}` ranges from {value.min().item()} to {value.max().item()}, not {least} to {most}")
    return value.cpu()


def damaged(what: str) -> ValueError:
    """The error to raise for a state that no buffer can be in."""
    return ValueError(f"The saved replay buffer is damaged or was altered: {what}. Load an intact copy.")
