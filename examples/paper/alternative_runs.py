"""Finetunings with something else against forgetting than replay: adapters, frozen layers, pulls, interpolation."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from peft import LoraConfig, OSFConfig, get_peft_model
from runs import Finetuning, Recorder, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_replay import CausalLM, ReplayDataModule, SelfGeneratedReplay, sample_rows
from lightning_replay.callbacks.measuring import measure_set
from lightning_replay.interpolation.weights import set_weights, weights_of
from lightning_replay.models.head import OutputHeads
from lightning_replay.models.language_model import evaluating, find_language_model
from lightning_replay.references.models import SavedReference

FISHER_ROWS = 256
"""Samples that the Fisher information is measured on."""


@dataclass(frozen=True)
class Alternative(Finetuning):
    """A finetuning with something else against forgetting than replay, or with replay.

    Attributes:
        freeze: Whether the embeddings and the lower half of the layers stay as they are. A head that is tied to the
            embeddings then does, too.
        embeddings: Whether the embeddings, and a head that is tied to them, train as a whole beside LoRA's factors.
        osf: The share of singular directions that PEFT's orthogonal subspace finetuning keeps as they are.
        pull: What pulls the weights back to where they began: ``"L2-SP"`` all alike (Li et al. 2018, arXiv 1802.01483),
            ``"EWC"`` each by its Fisher information (Kirkpatrick et al. 2017, arXiv 1612.00796).
        strength: Of the pull.
        sweep: Shares of the finetuned weights at which an interpolation with those before is measured after the fit.
    """

    freeze: bool = False
    embeddings: bool = False
    osf: float | None = None
    pull: Literal["L2-SP", "EWC"] | None = None
    strength: float = 0.0
    sweep: tuple[float, ...] = ()

    kl: ClassVar[bool] = False

    def run(self, folder: Path) -> dict[str, Any]:
        """Train; returns what a finetuning does, the ``bytes`` that it holds, and the points of the ``sweep``."""
        result = super().run(folder)
        for point in result["points"]:
            point |= {"prior_kl": nan, "new_kl": nan}
        result["sweep"] = [result["points"][-1] | point for point in result["sweep"]]
        return result

    def _network(self, model: str) -> Any:
        if not self.freeze and not self.embeddings and self.osf is None:
            return super()._network(model)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if self.embeddings:
            assert self.lora_rank is not None
            whole = LoraConfig(
                r=self.lora_rank,
                lora_alpha=2 * self.lora_rank,
                target_modules="all-linear",
                modules_to_save=["embed_tokens"],
                ensure_weight_tying=True,
            )
            return get_peft_model(network, whole)
        if self.osf is not None:
            return get_peft_model(network, OSFConfig(effective_rank=self.osf, target_modules="all-linear"))
        layers = network.get_decoder().layers
        for part in (network.get_input_embeddings(), *layers[: len(layers) // 2]):
            part.requires_grad_(False)
        return network

    def _train(
        self, module: CausalLM, data: ReplayDataModule, recorder: Recorder, replay: SelfGeneratedReplay | None
    ) -> dict[str, Any]:
        before = {name: weight.clone() for name, weight in weights_of(module).items()} if self.sweep else {}
        pull = None if self.pull is None else Pull(self.strength, self.length, self.seed, self.pull == "EWC")
        counter = Counter(replay, pull)
        train(module, data, recorder, self.steps, replay, pull, counter)
        after = {name: weight.clone() for name, weight in weights_of(module).items()} if self.sweep else {}
        model, heads, points = find_language_model(module, None), OutputHeads(), []
        sets: Mapping[str, Any] = recorder.prior
        for share in self.sweep:
            set_weights(module, before, after, share)
            found = {name: measure_set(name, rows, model, None, heads, model.device) for name, rows in sets.items()}
            points.append({"weight": share, **{f"{name}_loss": each.loss for name, each in found.items()}})
        return {"bytes": counter.bytes, "sweep": points}


class Pull(Callback):
    r"""Pulls weights back: adds the gradient of a penalty to that of the loss.

    The penalty is :math:`\frac{s}{2} \sum_i F_i (\theta_i - \pi_i)^2`.

    Args:
        strength: The factor s.
        length: Tokens in the samples that the Fisher information is measured on.
        seed: Of these.
        fisher: Whether :math:`F` is the Fisher information of a token, so that the penalty is s times the KL divergence
            from the model before to the second order, if only the diagonal counts; else it is 1.
    """

    def __init__(self, strength: float, length: int, seed: int, fisher: bool) -> None:
        self.strength = strength
        self.length = length
        self.seed = seed
        self.fisher = fisher
        self.first: list[Tensor] = []
        self.importances: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the weights, and measure their importance."""
        if self.first:
            return
        assert isinstance(pl_module, CausalLM)
        self.first = [weight.detach().clone() for weight in pl_module.parameters()]
        if self.fisher:
            model = find_language_model(pl_module, None)
            start: int = pl_module.model.config.bos_token_id  # type: ignore[union-attr, assignment]
            generator = torch.Generator().manual_seed(self.seed)
            with evaluating(pl_module):
                rows = sample_rows(model, [[start]] * FISHER_ROWS, self.length, generator).tokens
            self.importances = fisher_information(pl_module.model, rows)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Add the gradient of the penalty."""
        for index, (weight, first) in enumerate(zip(pl_module.parameters(), self.first, strict=True)):
            assert weight.grad is not None
            away = weight.detach() - first
            weight.grad.add_(away * self.importances[index] if self.fisher else away, alpha=self.strength)


def fisher_information(model: nn.Module, rows: Tensor) -> list[Tensor]:
    """The diagonal of the Fisher information of a token, for each parameter, on samples of the model itself.

    A row's log-likelihood has the gradient of the sum over its tokens, and the expected square of that is the row's
    Fisher information, since the tokens are the model's own; a token's is a share of it.

    Args:
        model: The model.
        rows: Samples of it that begin with a start token, shape ``(rows, length)``.
    """
    weights, tokens = list(model.parameters()), rows.shape[1] - 1
    information = [torch.zeros_like(weight) for weight in weights]
    for row in torch.split(rows, 1):
        loss = model(input_ids=row, labels=row).loss  # the mean over the tokens
        for total, gradient in zip(information, torch.autograd.grad(loss, weights), strict=True):
            total.addcmul_(gradient, gradient, value=tokens / len(rows))
    return information


class Counter(Callback):
    """Counts the bytes that a fit holds from step to step, each tensor once: those of activations are not among them.

    Weights, gradients, the state of the optimizer, the copy that replay compares with, and what a pull keeps.

    Args:
        replay: Of the fit, if any.
        pull: Of the fit, if any.
    """

    def __init__(self, replay: SelfGeneratedReplay | None, pull: Pull | None) -> None:
        self.replay = replay
        self.pull = pull
        self.bytes = 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count."""
        held = [*pl_module.parameters(), *pl_module.buffers()]
        for optimizer in trainer.optimizers:
            held += [part for state in optimizer.state.values() for part in state.values() if isinstance(part, Tensor)]
        reference = None if self.replay is None else self.replay.reference.taken
        if isinstance(reference, SavedReference):
            held += reference.state_dict().values()
        if self.pull is not None:
            held += self.pull.first + self.pull.importances
        gradients = sum(weight.nbytes for weight in pl_module.parameters() if weight.requires_grad)
        self.bytes = sum({part.data_ptr(): part.nbytes for part in held}.values()) + gradients
