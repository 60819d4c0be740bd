"""How a module is called and what it returns: its arguments, its logits, the state that it keeps between calls."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "argument_names",
    "base_argument_names",
    "evaluating",
    "find_logits",
    "find_state",
    "is_adapted",
    "logits_candidates",
    "may_take_state",
    "state_argument",
    "state_in",
    "uncompiled",
    "virtual_tokens",
]

_STATE_NAMES = ("cache", "past_key_values", "cache_params", "state")
"""Where Hugging Face models take and return what they have read; transformers 5 renames the second to the first."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every submodule gets its own mode back."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes:
            child.training = mode


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or the module itself."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a PEFT model, whose adapters can be switched off."""
    return hasattr(module, "disable_adapter") and hasattr(module, "get_base_model")


def virtual_tokens(module: nn.Module) -> int:
    """How many virtual tokens PEFT's prefix or prompt tuning puts before each row; 0 without."""
    adapter = getattr(module, "active_peft_config", None) if is_adapted(module) else None
    return int(getattr(adapter, "num_virtual_tokens", 0) or 0) if getattr(adapter, "is_prompt_learning", False) else 0


def find_logits(output: Any, vocabulary: int | None = None) -> Tensor:
    """The logits in what a language model returned, shape ``(rows, positions, vocabulary)``.

    Args:
        output: What it returned: the logits, an object or a mapping with ``logits``, or a tuple with the logits in it.
        vocabulary: Size of the logits' last dimension, if known. It tells them from hidden states in a tuple.

    Raises:
        TypeError: If there are none.

    Example:
        >>> hidden, logits = torch.zeros(1, 2, 4), torch.zeros(1, 2, 8)
        >>> find_logits((hidden, logits), vocabulary=8) is logits
        True
    """
    candidates = logits_candidates(output)
    for candidate in candidates:
        if vocabulary is None or candidate.shape[2] == vocabulary:
            return candidate
    sizes = [tuple(candidate.shape) for candidate in candidates]
    wanted = f"logits of shape (rows, positions, {vocabulary or 'vocabulary'})"
    raise TypeError(f"no {wanted} in a {type(output).__name__}" + (f" of tensors of shapes {sizes}" if sizes else ""))


def logits_candidates(output: Any) -> list[Tensor]:
    """Every tensor in an output that has the logits' form; only the named one if the output names its logits."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    unnamed = output if isinstance(output, (tuple, list)) else [output]
    found = unnamed if named is None else [named]
    return [part for part in found if isinstance(part, Tensor) and part.dim() == 3 and part.is_floating_point()]


def argument_names(module: nn.Module) -> list[str]:
    """The names of the arguments that a module's ``forward`` takes, in order."""
    parameters = inspect.signature(uncompiled(module).forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def may_take_state(module: nn.Module) -> bool:
    """Whether a module may keep what it has read between calls, by its signature or through its ``**kwargs``."""
    base: Any = uncompiled(module)
    return state_argument(module) is not None or is_adapted(base) or _takes_any_keyword(base)


def base_argument_names(module: nn.Module) -> list[str]:
    """The names of a model's arguments; those of the wrapped model for a PEFT model, which passes them on."""
    base: Any = uncompiled(module)
    return argument_names(base.get_base_model() if is_adapted(base) else base)


def _takes_any_keyword(module: nn.Module) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(uncompiled(module).forward).parameters.values())


def state_argument(module: nn.Module) -> str | None:
    """The argument in which a Hugging Face model's signature takes what it has read, if any.

    ``use_cache`` may be in the signature or go through its ``**kwargs``, as in many mixture-of-experts models.
    """
    base: Any = uncompiled(module)
    base = base.get_base_model() if is_adapted(base) else base
    names = argument_names(base)
    if "use_cache" not in names and not _takes_any_keyword(base):
        return None
    return next((name for name in _STATE_NAMES if name in names), None)


def find_state(module: nn.Module, output: Any) -> tuple[str, Any] | None:
    """What a model returned of what it has read, with the name of the argument that takes it; None if nothing."""
    base: Any = uncompiled(module)
    base = base.get_base_model() if is_adapted(base) else base
    names, any_keyword = argument_names(base), _takes_any_keyword(base)
    for name in _STATE_NAMES:
        state = state_in(output, name)
        if state is not None and (name in names or any_keyword):
            return name, state
    return None


def state_in(output: Any, name: str) -> Any:
    """What a model returned of what it has read under a name; None if nothing."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
