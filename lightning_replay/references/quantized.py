"""A model's weights in 8 bits, by torchao: a quarter of the memory of 32, and what a checkpoint holds of them."""

from collections.abc import Iterator, Mapping

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["load_plain_state", "plain_state", "quantize_to_int8"]


def quantize_to_int8(module: nn.Module) -> float:
    """Replace the weights of linear and embedding layers by 8-bit integers, with one 32-bit scale a row.

    Layers that share a weight share the quantized one. Other weights, such as norms and biases, stay as they are.

    Args:
        module: The model, whose weights are not trained.

    Returns:
        The share of all weights that were quantized.

    Raises:
        MisconfigurationException: If torchao is not installed, or there is no such layer.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ModuleNotFoundError as error:
        raise MisconfigurationException(
            f"`quantize='int8'` needs {error.name}, which is not installed: pip install 'lightning-replay[torchao]'"
        ) from error
    total, quantized = sum(weight.numel() for weight in module.parameters()), 0
    sharing: dict[Tensor, list[nn.Module]] = {}
    for layer in module.modules():
        # A subclass may do anything with its weight.
        if type(layer) is nn.Linear or (type(layer) is nn.Embedding and layer.max_norm is None):
            sharing.setdefault(layer.weight, []).append(layer)
    while sharing:  # one weight at a time, so that two copies of the model are never there
        weight, (first, *others) = sharing.popitem()
        wraps_others = is_traceable_wrapper_subclass(weight)  # it is quantized already
        if wraps_others or not weight.is_floating_point():
            continue
        quantized += weight.numel()
        del weight
        # Without its settings for the whole of torch's compiler.
        config = Int8WeightOnlyConfig(set_inductor_config=False)
        quantize_(
            nn.ModuleList([first]), config, filter_fn=lambda layer, _: isinstance(layer, nn.Linear | nn.Embedding)
        )
        for layer in others:
            layer.weight = first.weight
    if not quantized:
        raise MisconfigurationException(
            f"`quantize='int8'` was given, but {type(module).__name__} holds no weight in an `nn.Linear` or "
            "`nn.Embedding` that could be quantized. Use `Copy(dtype='bfloat16')`."
        )
    return quantized / total


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state in which quantized weights are plain tensors, such as ``head.weight.qdata``.

    It shares the module's memory.
    """
    return dict(_plain(module))


def load_plain_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what ``plain_state`` gave.

    Raises:
        MisconfigurationException: If the state is that of another kind of copy.
    """
    ours = plain_state(module)
    if ours.keys() != state.keys():
        alone = sorted(ours.keys() ^ state.keys())
        raise MisconfigurationException(
            f"The checkpoint holds a reference of another kind: {len(alone)} of its or this run's weights, such as "
            f"{alone[0]!r}, have no counterpart. Resume with the `reference` that the run began with."
        )
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(state[name])


def _plain(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in module.state_dict().items():
        if is_traceable_wrapper_subclass(value):
            parts, _ = value.__tensor_flatten__()
            yield from ((f"{name}.{part}", getattr(value, part)) for part in parts)
        else:
            yield name, value
