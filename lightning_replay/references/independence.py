"""Copies of a model that share nothing with it: making one, and testing it.

``copy.deepcopy`` copies a module's weights, but not the functions stored on a module's instance. A function that
refers to the module, such as ``module.forward = torch.compile(module.forward)`` or a wrapper around the old
``forward``, still computes with the original's weights when the copy calls it. A reference like that follows the model
that trains, so the divergence from it is zero or too small, and nothing is protected.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.probe import probe_logits, probe_tokens

__all__ = ["check_independent", "check_unused", "independent_copy"]

_LENGTH, _SHORT = 16, 4
"""Tokens of the probe; the second is that of a model whose context is not known."""

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""The types that train, and the integers of the same size. Quantized weights don't change, so they are left alone."""


def independent_copy(model: LanguageModel) -> LanguageModel:
    """A copy of the model, on the same device and in the same type, that shares no weight with it.

    Functions stored on an instance are bound to the copy if they refer to the module in a closure, a default or a
    bound method; what ``torch.compile`` made of a method runs uncompiled in the copy. Then the copy is tested.

    Args:
        model: The model. It stays as it is.

    Raises:
        MisconfigurationException: If the copy still computes with the model's weights.
    """
    copy = model.on(deepcopy(model.module))
    _rebind(copy.module, model.module)
    check_independent(copy, model)
    return copy


def check_independent(copy: LanguageModel, live: LanguageModel) -> None:
    """Test that a copy and the model that it was made of answer alike, and that neither uses the other's weights.

    The weights of one are disturbed in place, and the logits of the other on a few tokens must stay what they were,
    bit for bit. All disturbed bits are put back. That takes four forwards of at most 16 tokens, and no memory for
    weights.

    Args:
        copy: The copy.
        live: The model, on the same device and with the same weights.

    Raises:
        MisconfigurationException: If one uses the other's weights, with the path of the submodule in which it does, or
            if the copy's answer is not the model's.
    """
    tokens = probe_tokens(live, _SHORT if live.context is None else _LENGTH)
    ours, theirs = probe_logits(copy, tokens), probe_logits(live, tokens)
    for asked, other, before, message in (
        (copy, live, ours, "The copy of the model that is to be the reference computes with the weights of the model"),
        (live, copy, theirs, "The model computes with the weights of the copy of it that is to be the reference"),
    ):
        if _follows(asked, other.module, tokens, before):
            paths = _followed(asked, other, tokens, before)
            raise MisconfigurationException(f"{message}, in {_described(paths, other.module)}. {_REMEDY}")
    # Equal up to rounding: the same weights in other places of memory may be summed in another order.
    rounding = torch.finfo(theirs.dtype).eps ** 0.5 * theirs.abs().max()
    if bool(((ours - theirs).abs() > rounding).any()):
        raise MisconfigurationException(
            f"The copy of {type(live.module).__name__} that is to be the reference gives other logits than the model: "
            f"they differ by up to {float((ours - theirs).abs().max()):.3g} at a largest of "
            f"{float(theirs.abs().max()):.3g}. See that `copy.deepcopy` of the model computes what the model does, in "
            "evaluation mode."
        )


def check_unused(live: LanguageModel, other: LanguageModel) -> None:
    """Test that another model does not compute with the weights of the one that trains.

    Raises:
        MisconfigurationException: If it does, with the path of the submodule in which it does.
    """
    length = _SHORT if other.context is None or live.context is None else _LENGTH
    tokens = probe_tokens(other, length)
    before = probe_logits(other, tokens)
    if _follows(other, live.module, tokens, before):
        raise MisconfigurationException(
            "The model that is to be the reference computes with weights of the model that trains, in "
            f"{_described(_followed(other, live, tokens, before), live.module)}, so it would follow it. Use "
            "`reference='copy'`, or pass a `copy.deepcopy` of the model made before it trains."
        )


_REMEDY = (
    "Something stored on the module, such as a `forward` that was replaced, a hook or a function, holds the module "
    "itself, and `copy.deepcopy` does not copy it. Replace a `forward` with `types.MethodType(function, module)`, or "
    "in the class; hand hooks the module that they are called with; compile with `module.compile()`."
)


def _rebind(copy: nn.Module, live: nn.Module) -> None:
    """Bind the functions that are stored on the copy's modules to those, if they refer to the live ones."""
    ours, parameters = dict(copy.named_modules()), dict(copy.named_parameters())
    counterparts: dict[int, Any] = {id(module): ours[name] for name, module in live.named_modules() if name in ours}
    counterparts |= {id(weight): parameters[name] for name, weight in live.named_parameters() if name in parameters}
    for module in ours.values():
        held = vars(module)
        hooks = (held[name] for name in ("_forward_hooks", "_forward_pre_hooks"))
        for functions in (held, *hooks):
            for name, value in list(functions.items()):
                if isinstance(value, (FunctionType, MethodType, partial)):
                    functions[name] = _rebound(value, counterparts, {})


def _rebound(value: Any, counterparts: dict[int, Any], done: dict[int, Any]) -> Any:
    """A function with the modules and weights that it refers to replaced; the same object if it refers to none."""
    if id(value) in counterparts:
        return counterparts[id(value)]
    if id(value) in done:
        return done[id(value)]
    done[id(value)] = value  # a function may refer to itself

    def again(part: Any) -> Any:
        return _rebound(part, counterparts, done)

    result = value
    if isinstance(value, MethodType):
        owner, function = again(value.__self__), again(value.__func__)
        if owner is not value.__self__ or function is not value.__func__:
            result = MethodType(function, owner)
    elif isinstance(value, partial):
        parts = (again(value.func), *map(again, value.args), *map(again, value.keywords.values()))
        if _changed(parts, (value.func, *value.args, *value.keywords.values())):
            count = len(value.args) + 1
            result = partial(parts[0], *parts[1:count], **dict(zip(value.keywords, parts[count:], strict=True)))
    elif isinstance(value, FunctionType):
        result = _rebound_function(value, again)
    done[id(value)] = result
    return result


def _rebound_function(function: FunctionType, again: Callable[[Any], Any]) -> Any:
    # Not told by the attribute alone, which `functools.wraps` copies to wrappers.
    if function.__globals__.get("__name__") == "torch._dynamo.eval_frame":
        original = getattr(function, "_torchdynamo_orig_callable", None)
        inner = again(original)
        return function if inner is original else inner
    cells = [cell for cell in function.__closure__ or () if _contents(cell) is not None]
    held = [_contents(cell) for cell in cells]
    given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]
    if not _changed([again(part) for part in (*held, *given)], [*held, *given]):
        return function
    replaced = {id(cell): CellType(again(part)) for cell, part in zip(cells, held, strict=True)}
    closure = tuple(replaced.get(id(cell), cell) for cell in function.__closure__ or ())
    defaults = None if function.__defaults__ is None else tuple(map(again, function.__defaults__))
    result = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
    if function.__kwdefaults__ is not None:
        result.__kwdefaults__ = {name: again(part) for name, part in function.__kwdefaults__.items()}
    vars(result).update({name: again(part) for name, part in vars(function).items()})
    return result


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing has been assigned to the variable
        return None


def _changed(parts: Any, before: Any) -> bool:
    return any(one is not other for one, other in zip(parts, before, strict=True))


@contextmanager
def _disturbed(module: nn.Module) -> Iterator[None]:
    """Other weights and buffers in a module's place, without memory for them: the same bits are flipped twice.

    The bits are those of 0.5: usual weights become about 0, and zeros become 0.5.
    """
    flipped: list[tuple[Tensor, int]] = []
    seen: set[tuple[int, int]] = set()
    try:
        for weight in (*module.parameters(), *module.buffers()):
            # `data` has a version of its own: for autograd, nothing has happened.
            part = (weight.to_local() if isinstance(weight, DTensor) else weight).data
            if not _can_flip(part) or (place := (part.data_ptr(), part.numel())) in seen:
                continue
            seen.add(place)
            mask = int(torch.tensor(0.5, dtype=part.dtype, device="cpu").view(_BITS[part.dtype]))
            bits = part.view(_BITS[part.dtype])
            bits.bitwise_xor_(mask)
            flipped.append((bits, mask))
        yield
    finally:
        for bits, mask in flipped:
            bits.bitwise_xor_(mask)


def _can_flip(part: Tensor) -> bool:
    wraps_others = is_traceable_wrapper_subclass(part)
    if part.dtype not in _BITS or part.is_meta or part.is_inference() or wraps_others:
        return False
    # Of expanded tensors several elements are one in memory.
    return all(stride or size < 2 for size, stride in zip(part.shape, part.stride(), strict=True))


def _follows(asked: LanguageModel, other: nn.Module, tokens: Tensor, before: Tensor) -> bool:
    """Whether a model's answer changes with another module's weights, and not just from call to call."""
    try:
        with _disturbed(other):
            now = probe_logits(asked, tokens)
    except Exception:
        # A model may refuse what disturbed weights give. Without them it has just answered.
        probe_logits(asked, tokens)
        return True
    if torch.equal(now, before):
        return False
    again = probe_logits(asked, tokens)
    noise = (again - before).abs().max()
    return not bool((now - before).abs().max() <= 8 * noise)


def _followed(asked: LanguageModel, other: LanguageModel, tokens: Tensor, before: Tensor) -> list[str]:
    """The paths of the submodules whose weights a model uses, each as a whole."""
    paths, found = [""], list[str]()
    while paths:
        path = paths.pop()
        module = other.module.get_submodule(path)
        children = {
            f"{path}.{name}".lstrip("."): child
            for name, child in module.named_children()
            if any(part.dtype in _BITS for part in (*child.parameters(), *child.buffers()))
        }
        inside = [name for name, child in children.items() if _follows(asked, child, tokens, before)]
        if inside and (len(inside) < len(children) or isinstance(module, (nn.ModuleList, nn.ModuleDict))):
            paths += inside
        else:
            found.append(path)
    return sorted(found)


def _described(paths: list[str], module: nn.Module) -> str:
    shown = [f"`{path or '(the model itself)'}` ({type(module.get_submodule(path)).__name__})" for path in paths[:3]]
    return ", ".join(shown) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
