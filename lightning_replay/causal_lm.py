"""A ready LightningModule around any Hugging Face causal language model."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, PreTrainedModel
from typing_extensions import override

from lightning_replay.arguments import is_number, is_whole

__all__ = ["CausalLM"]

Schedule = Literal["cosine", "constant"]


class CausalLM(pl.LightningModule):
    """Finetunes a causal language model with AdamW, a linear warm-up and a cosine or constant learning rate.

    For those who have no module of their own yet; nothing in this package needs it. Batches are mappings of
    what the model's ``forward`` takes, ``labels`` among them, as ``TextDataModule`` gives.
    Logs ``train/loss`` and ``val/loss``, in nats a token.

    Args:
        model: A name on the Hugging Face hub, a local folder, or a model that is already there.
        learning_rate: Peak learning rate.
        betas: AdamW's decay rates of the running averages of the gradient and its square.
        weight_decay: AdamW's, on matrices alone; biases and norms are not decayed.
        warmup_steps: Optimizer steps in which the learning rate rises from zero.
        schedule: ``"cosine"`` falls to zero at the end of training, ``"constant"`` stays.
        trust_remote_code: Whether a model's folder or hub repository may bring code of its own, which is then executed.
            Without, such a model is refused.

    Raises:
        TypeError: If ``model`` is something else; in training, if a batch is not a mapping with ``labels``.
        ValueError: If a number is out of its range, ``schedule`` is unknown, or the model needs code of its own.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> module = CausalLM(LlamaForCausalLM(config), learning_rate=1e-3, schedule="constant")
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        learning_rate: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.02,
        warmup_steps: int = 0,
        schedule: Schedule = "cosine",
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"learning_rate": learning_rate, "weight_decay": weight_decay}.items():
            if not is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"`{name}` is at least 0 and finite; got {value!r}.")
        if not is_whole(warmup_steps, 0):
            raise ValueError(f"`warmup_steps` is a number of optimizer steps, at least 0; got {warmup_steps!r}.")
        if not isinstance(betas, Sequence) or len(betas) != 2 or not all(is_number(b) and 0 <= b < 1 for b in betas):
            raise ValueError(f"`betas` is two decay rates from 0 to below 1; got {betas!r}.")
        if not isinstance(model, (str, Path, torch.nn.Module)):
            raise TypeError(f"`model` is a name on the hub, a local folder or a model; got {type(model).__name__}.")
        if schedule not in get_args(Schedule):
            raise ValueError(f"`schedule` is one of {', '.join(map(repr, get_args(Schedule)))}; got {schedule!r}.")
        self.learning_rate = learning_rate
        self.betas = betas
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule: Schedule = schedule
        given = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        self.save_hyperparameters({"model": given})
        self.save_hyperparameters("learning_rate", "betas", "weight_decay", "warmup_steps", "schedule")
        # In 32-bit floats, whatever the weights were saved in: lower precision is the Trainer's choice to make.
        if isinstance(model, (str, Path)):
            model = AutoModelForCausalLM.from_pretrained(
                model, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        self.model: torch.nn.Module = model.train()  # `from_pretrained` leaves it in evaluation mode

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch), prog_bar=True, sync_dist=True)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)
        scheduler = LambdaLR(optimizer, _Schedule(self.schedule, self.warmup_steps, self._total_steps()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss(self, batch: Any) -> Tensor:
        if not isinstance(batch, Mapping) or "labels" not in batch:
            given = f"a mapping with keys {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
            raise TypeError(
                f"CausalLM trains on mappings of what its model takes, `labels` among them; got {given}. Collate "
                "batches as TextDataModule does, or write a LightningModule of your own."
            )
        loss: Tensor = self.model(**batch).loss
        return loss

    def _total_steps(self) -> int:
        # The Trainer's estimate builds the dataloaders to count them, which loses their state on resume
        # (Lightning #20550), so it is asked only where the length of training isn't given.
        if self.schedule == "constant":
            return 0
        return self.trainer.max_steps if self.trainer.max_steps > 0 else int(self.trainer.estimated_stepping_batches)


class _Schedule:
    """Share of the peak learning rate at a step."""

    def __init__(self, schedule: Schedule, warmup_steps: int, total_steps: int) -> None:
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
