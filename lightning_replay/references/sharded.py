"""A reference for models whose weights are sharded over processes, so that no process can copy all of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import override

from lightning_replay.models.language_model import LanguageModel, evaluating
from lightning_replay.references.models import SavedReference

__all__ = ["ShardedCopy"]


class ShardedCopy(SavedReference):
    """A copy of the weights as they are now, of which each process keeps the part that it has of the model.

    While the copy is in use, its weights take the place of the model's, and FSDP2 gathers them as it would the model's.
    It thus takes the memory of a second sharded model, and all processes have to call it equally often. It runs the
    model's own module, so functions stored on that compute with the copy's weights, and ``check_independent`` has
    nothing to test.

    Args:
        model: The model, with FSDP2's `fully_shard` applied to it.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        with torch.no_grad():
            self._weights = [part.clone() for part in self._parts()]

    @override
    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the model with the copy's weights, in evaluation mode; its own are back afterwards."""
        self._exchange()
        try:
            with evaluating(self._model.module):
                yield self._model
        finally:
            self._exchange()

    @override
    def state_dict(self) -> dict[str, Tensor]:
        """The copy's weights, whole and on the CPU, in every process; all call this together."""
        with self.active() as model:
            state: dict[str, Tensor] = model.module.state_dict()
            return {
                name: (value.full_tensor() if isinstance(value, DTensor) else value.clone()).cpu()
                for name, value in state.items()
            }

    @override
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the copy's weights by saved ones, which are whole; all processes call this together."""
        with self.active() as model:
            for name, value in model.module.state_dict().items():
                whole = state[name].to(value.device)
                if isinstance(value, DTensor):
                    whole = distribute_tensor(whole, value.device_mesh, value.placements)
                value.copy_(whole)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange the copy's weights and the model's."""
        for ours, theirs in zip(self._weights, self._parts(), strict=True):
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)

    def _parts(self) -> list[Tensor]:
        """This process's part of each of the model's weights."""
        # So that FSDP2 gathers the weights anew from the parts, also in a backward that is still to come.
        for module in self._model.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        weights = (weight.detach() for weight in self._model.module.parameters())
        # `data` has a version of its own: autograd may hold on to weights that are not sharded, and gets them back.
        return [weight.to_local() if isinstance(weight, DTensor) else weight.data for weight in weights]
