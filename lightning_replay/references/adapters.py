"""A PEFT adapter that is switched off: the base model under it, for no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_replay.models.language_model import LanguageModel, evaluating, is_adapted
from lightning_replay.references.models import ReferenceModel
from lightning_replay.references.probe import probe_logits, probe_tokens

__all__ = ["DisabledAdapter", "adapter_is_idle"]

_LENGTH = 64
"""Tokens of the probe."""


class DisabledAdapter(ReferenceModel):
    """A PEFT model with its adapters switched off: exactly the base model, for no memory.

    Args:
        model: The PEFT model.
    """

    weights_stay: ClassVar[bool] = True

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @override
    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the model with its adapters off. `requires_grad`, which PEFT changes, is restored afterwards."""
        module: Any = self._model.module
        trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        try:
            with evaluating(module), module.disable_adapter():
                yield self._model
        finally:
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)


def adapter_is_idle(model: LanguageModel) -> bool:
    r"""Whether switching the adapters off gives the model as it is now, for as long as it trains.

    True for a PEFT model whose adapters contribute exactly zero and whose base weights are frozen. An adapter that has
    been trained before is a part of the model to remember, so it must not be switched off. An adapter whose fresh
    weights cancel only up to rounding (HRA, LoRA with ``init_lora_weights="orthogonal"``) counts as trained: its
    rounding can't be told from a small contribution.

    The logits of 64 tokens have to be equal bit for bit with the adapters on and off. In 16 bits, a small contribution
    may be rounded away in all of them, so a factor of each LoRA product has to be exactly zero as well.

    DoRA alone may differ. It multiplies a layer's output by :math:`s = m / n` (Liu et al. 2024, arXiv 2402.09353,
    equation 5), with the norms :math:`m` of the base weights, computed when the adapter was made, and :math:`n`,
    computed in the forward, perhaps in another type and on another device. Each is a sum of :math:`k` squares,
    accumulated in at least 32 bits, with a relative error of up to :math:`k \epsilon_{32} / 4`, and is then rounded to
    its type. With the rounding of the quotient, the product and the sum, the output of a fresh DoRA differs from the
    base layer's by less than :math:`4 \epsilon + k \epsilon_{32}`, relative to the output and the bias that DoRA leaves
    out, with the :math:`\epsilon` of the coarsest type.

    Args:
        model: The model, before finetuning.
    """
    # To switch off adapters that are merged, PEFT takes them out of the weights, and does not bring them back.
    if not is_adapted(model.module) or any(getattr(layer, "merged", False) is True for layer in model.module.modules()):
        return False
    tokens = probe_tokens(model, _LENGTH)
    with _without_rounding_of_dora(model.module):
        now = probe_logits(model, tokens)
    with DisabledAdapter(model).active() as base:
        before = probe_logits(base, tokens)
        # PEFT freezes its adapters when it switches them off, so what still trains now is a base weight.
        frozen = not any(weight.requires_grad for name, weight in model.module.named_parameters() if _is_base(name))
    # Virtual tokens, as of prompt tuning, make the logits longer.
    return frozen and now.shape == before.shape and torch.equal(now, before) and not _lora_contributes(model.module)


def _is_base(name: str) -> bool:
    # The ranks of AdaLoRA, which PEFT forgets to freeze.
    return ".ranknum." not in name


def _lora_contributes(module: nn.Module) -> bool:
    """Whether an active LoRA product is other than zero, in whatever type it is computed."""
    for layer in module.modules():
        for name in getattr(layer, "active_adapters", ()) if hasattr(layer, "lora_B") else ():
            # AdaLoRA has a third factor, E, which begins as zero instead of B.
            holders = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
            factors = [held[name] for holder in holders if name in (held := getattr(layer, holder, {}))]
            weights = [factor if isinstance(factor, Tensor) else factor.weight for factor in factors]
            biases = [bias for factor in factors if (bias := getattr(factor, "bias", None)) is not None]
            if factors and (all(map(_any_nonzero, weights)) or any(map(_any_nonzero, biases))):
                return True
    return False


def _any_nonzero(weight: Tensor) -> bool:
    whole: Tensor = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return bool(whole.detach().any())


@contextmanager
def _without_rounding_of_dora(module: nn.Module) -> Iterator[None]:
    """Give DoRA layers the output of their base layer if they differ from it by rounding alone."""
    handles = []
    for layer in module.modules():
        if len(getattr(layer, "lora_magnitude_vector", ())):
            base, outputs = layer.base_layer, list[Tensor]()
            assert isinstance(base, nn.Module)
            handles += [
                base.register_forward_hook(partial(_keep_output, outputs)),
                layer.register_forward_hook(partial(_base_output, outputs)),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep_output(outputs: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
    outputs[:] = [output]


def _base_output(outputs: list[Tensor], layer: Any, args: Any, output: Tensor) -> Tensor:
    """The base layer's output if the layer's own differs from it by what rounding explains, else the layer's own."""
    if not outputs:
        return output
    base, bias = outputs.pop(), getattr(layer.base_layer, "bias", None)
    floats = [part.dtype for part in (output, base, *layer.parameters()) if part.dtype.is_floating_point]
    summands = max(layer.in_features, layer.out_features)
    bound = 4 * max(torch.finfo(dtype).eps for dtype in floats) + summands * torch.finfo(torch.float32).eps
    # In 64 bits, so that the comparison adds no rounding.
    exact = base.double()
    scale = exact.abs() + (0 if bias is None else float(bias.detach().abs().max()))
    return base.to(output.dtype) if bool(((output.double() - exact).abs() <= bound * scale).all()) else output
