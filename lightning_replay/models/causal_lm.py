"""A ready LightningModule around any Hugging Face causal language model."""

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from typing_extensions import override

from lightning_replay.models.language_model import is_adapted
from lightning_replay.models.trend import Trend
from lightning_replay.utilities.distributed import is_sharded
from lightning_replay.utilities.validation import check_choice, check_model_folder, is_number, is_whole

__all__ = ["CausalLM", "try_saving"]

Schedule = Literal["cosine", "constant"]

_FEWEST = 16
"""Batches that say whether the loss has fallen."""


class CausalLM(pl.LightningModule):
    """Finetunes a causal language model with AdamW, a linear warm-up and a cosine or constant learning rate.

    For users without a module of their own; nothing in this package needs it. Batches are mappings of what the model's
    ``forward`` takes, ``labels`` among them, such as those of ``TextDataModule`` and ``ChatDataModule``. Logs
    ``train/loss`` of each batch, ``val/loss`` and ``test/loss`` of all target tokens, in nats a token, and predicts the
    loss of each row.

    Args:
        model: A name on the Hugging Face hub, a local folder, or a model.
        learning_rate: Peak learning rate. The default is common for models of billions of parameters; small models and
            adapters take 1e-4 to 1e-3. A fit whose loss has not fallen by more than its noise ends with a warning; see
            ``fall``.
        betas: AdamW's decay rates of the running averages of the gradient and its square.
        weight_decay: AdamW's, on matrices alone; biases and norms are not decayed.
        warmup_steps: Optimizer steps in which the learning rate rises from zero.
        schedule: ``"cosine"`` falls to zero at the end of training, ``"constant"`` stays.
        adapter: The settings of a PEFT adapter, which is put on the model and trained alone: those of PEFT's
            configurations, with ``peft_type``, as in ``{"peft_type": "LORA", "r": 8}``. Needs the extra ``peft``. A
            PEFT model can also be passed as ``model``.
        save_to: A folder that the model is saved in at the end of the fit, for ``from_pretrained`` to read, with an
            adapter merged into it and with the datamodule's ``tokenizer``: the next task of a sequence begins there.
            Tried at the start of the fit, without the weights.
        model_options: More arguments of ``from_pretrained`` for a name or a folder, such as ``revision``,
            ``gguf_file``, ``attn_implementation``, ``quantization_config`` or ``dtype``, which is ``"float32"`` by
            default, whatever type the weights are saved in: the Trainer's ``precision`` is for lower ones.
        trust_remote_code: Whether to execute code of its own that a model's folder or hub repository has. By default,
            such a model is refused.

    Raises:
        TypeError: If ``model`` is of another type; in training, if a batch is not a mapping with ``labels``.
        ValueError: If a number is out of its range, ``schedule`` is unknown, the model needs code of its own, PEFT does
            not know ``adapter``, or ``model_options`` is given for a model that is loaded already.
        ModuleNotFoundError: If ``adapter`` is given and PEFT is not installed.
        FileNotFoundError: If ``model`` is a path to no folder.
        MisconfigurationException: If ``save_to`` is given and the strategy shards the weights, the model can't be saved
            (as if it is quantized), or the folder can't be written.

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
        adapter: dict[str, Any] | None = None,
        save_to: str | Path | None = None,
        model_options: dict[str, Any] | None = None,
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
        check_choice("schedule", schedule, Schedule)
        self.learning_rate = learning_rate
        self.betas = betas
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule: Schedule = schedule
        self.save_to = None if save_to is None else Path(save_to)
        given = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        options = {name: str(value) for name, value in (model_options or {}).items()}
        self.save_hyperparameters({"model": given} | ({"model_options": options} if options else {}))
        self.save_hyperparameters("learning_rate", "betas", "weight_decay", "warmup_steps", "schedule", "adapter")
        if isinstance(model, (str, Path)):
            model = _loaded(model, model_options or {}, trust_remote_code)
        elif model_options:
            raise ValueError(
                f"`model_options` are for loading a name or a folder; got {model_options!r} for a {given} that is "
                "loaded already. Pass them where you load it."
            )
        if adapter is not None:
            model = _adapted(model, adapter)
        if save_to is not None and not hasattr(model, "save_pretrained"):
            raise TypeError(f"`save_to` saves models of transformers and PEFT; got {type(model).__name__}.")
        self._trend: Trend | None = None
        self._last_loss: Tensor | None = None
        self.model: torch.nn.Module = model.train()  # `from_pretrained` leaves it in evaluation mode

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        self._last_loss = loss.detach()
        return loss

    @override
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._log_mean("val/loss", batch, prog_bar=True)

    @override
    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._log_mean("test/loss", batch)

    @override
    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of each row, in nats a token, shape ``(rows,)``; NaN for a row without a label."""
        logits = self(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return losses.sum(1) / (labels != -100).sum(1)

    @override
    def on_train_start(self) -> None:
        self._trend = None if self.trainer.global_step else Trend()

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._trend is not None and self._last_loss is not None:
            self._trend.add(self._last_loss)

    @override
    def on_train_end(self) -> None:
        fall, error = self.fall or (math.inf, 0.0)
        if fall <= error:
            rank_zero_warn(
                f"The training loss has not clearly fallen: by {fall:.2g} ± {error:.2g} nats a token at a learning "
                f"rate of {self.learning_rate:g}. If the model should have learned more, use a higher `learning_rate` "
                "or more steps."
            )

    @property
    def fall(self) -> tuple[float, float] | None:
        """By how much the training loss fell in the last fit, in nats a token, and two standard errors.

        The mean of the first batches less that of all later ones, where that is clearest. None if there were fewer than
        16 batches, or if the fit was resumed: what is left of it may be its level end.
        """
        if self._trend is None or self._trend.steps < _FEWEST:
            return None
        fall, error = self._trend.fall()
        return fall, 2 * error

    @override
    def on_fit_start(self) -> None:
        if self.save_to is None:
            return
        if is_sharded(self.trainer):
            raise MisconfigurationException(
                "`save_to` saves a whole model, but the strategy keeps a part of the weights in each process. Leave it "
                "out and export the model from a checkpoint."
            )
        if self.trainer.is_global_zero:
            try_saving(self.model, self.save_to)

    @override
    def on_fit_end(self) -> None:
        if self.save_to is None or not self.trainer.is_global_zero:
            return
        model: Any = self.model
        if is_adapted(model):  # of a copy, so that the module is left as it was trained
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(self.save_to)
        tokenizer: Any = getattr(self.trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(self.save_to)

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

    def _log_mean(self, name: str, batch: Mapping[str, Tensor], prog_bar: bool = False) -> None:
        """Log the mean over all target tokens of an epoch, however they are spread over batches."""
        loss, targets = self._loss(batch), int((batch["labels"][:, 1:] != -100).sum())
        # Without a target the mean is no number, and would be none of the epoch.
        self.log(name, loss if targets else torch.zeros_like(loss), prog_bar, sync_dist=True, batch_size=targets)

    def _total_steps(self) -> int:
        # The Trainer's estimate builds the dataloaders to count them, which loses their state on resume
        # (Lightning #20550), so it is asked only if the length of training isn't given.
        if self.schedule == "constant":
            return 0
        return self.trainer.max_steps if self.trainer.max_steps > 0 else int(self.trainer.estimated_stepping_batches)


def _loaded(model: str | Path, options: dict[str, Any], trust_remote_code: bool) -> PreTrainedModel:
    if "trust_remote_code" in options:
        raise ValueError(
            f"`trust_remote_code` is an argument of its own; got it among `model_options`: {options!r}. Pass "
            f"`trust_remote_code={options['trust_remote_code']!r}`."
        )
    check_model_folder(model)
    default = {} if "torch_dtype" in options else {"dtype": torch.float32}
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model, trust_remote_code=trust_remote_code, **default | options
    )
    return loaded


def try_saving(model: Any, folder: Path) -> None:
    """Save a model without its weights in a folder, and remove it again: finds most reasons why it can't be saved.

    Raises:
        MisconfigurationException: If the folder can't be written or the model can't be saved.
    """
    if is_adapted(model) and not hasattr(model, "merge_and_unload"):
        raise MisconfigurationException(
            f"`save_to` saves a model with its adapter merged into it, but that of {type(model).__name__} can't be "
            "merged. Leave `save_to` out and save the adapter yourself with `save_pretrained`."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise MisconfigurationException(
            f"`save_to={str(folder)!r}` can't be written: {error}. Pass a folder that can."
        ) from error
    saved = model.get_base_model() if is_adapted(model) else model
    if not isinstance(saved, PreTrainedModel):  # `save_pretrained` of another library may have no such argument
        trial.cleanup()
        return
    settings, showed_progress = dict(vars(saved.config)), is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with trial:
            saved.save_pretrained(trial.name, state_dict={})
    except Exception as error:  # each way to quantize a model has errors of its own
        raise MisconfigurationException(
            f"`save_to` can't save this {type(saved).__name__}: {error} Leave `save_to` out and keep a checkpoint of "
            "the fit, or load weights that are not quantized."
        ) from error
    finally:
        vars(saved.config).clear()
        vars(saved.config).update(settings)
        if showed_progress:
            enable_progress_bar()


def _adapted(model: Any, settings: dict[str, Any]) -> Any:
    """A model with a fresh PEFT adapter on it."""
    try:
        from peft import get_peft_config, get_peft_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`adapter` needs PEFT, which is not installed: pip install 'lightning-replay[peft]'"
        ) from error
    try:
        return get_peft_model(model, get_peft_config({"task_type": "CAUSAL_LM"} | settings))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "`adapter` is the settings of a PEFT adapter, `peft_type` among them, as in {'peft_type': 'LORA', 'r': 8}; "
            f"got {settings!r}, for which PEFT raised {type(error).__name__}: {error}."
        ) from error


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
