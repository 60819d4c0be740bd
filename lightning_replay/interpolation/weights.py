"""The weights of a module, and those between two states of it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["set_weights", "weights_of"]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and the buffers that it saves, by name; what is tied stands under its first name alone.

    The tensors are the module's own.
    """
    first: dict[tuple[int, torch.Size], str] = {}
    state: dict[str, Tensor] = module.state_dict()
    for name, weight in state.items():
        first.setdefault((weight.data_ptr(), weight.shape), name)
    return {name: state[name] for name in first.values()}


@torch.no_grad()
def set_weights(module: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], weight: float) -> None:
    r"""Give a module the weights :math:`(1 - w) \cdot \text{before} + w \cdot \text{after}`.

    They are computed in at least 32 bits and keep the module's type; at 0 and 1 they are those that are given, bit for
    bit. Integers stay as they are in the module.

    Args:
        module: The module.
        before: Its weights at 0, as ``weights_of`` names them.
        after: Its weights at 1.
        weight: The share of ``after``, in [0, 1].

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> set_weights(layer, {"weight": torch.tensor([[1.0]])}, {"weight": torch.tensor([[3.0]])}, 0.25)
        >>> layer.weight.item()
        1.5
    """
    for name, ours in weights_of(module).items():
        if ours.is_floating_point():
            wide = torch.promote_types(ours.dtype, torch.float32)
            # `lerp` is exact at both ends.
            ours.copy_(torch.lerp(before[name].to(ours.device, wide), after[name].to(ours.device, wide), weight))
