"""What a fit leaves behind: what was learned and forgotten, and where its files are."""

from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_replay.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_replay.models.causal_lm import CausalLM
from lightning_replay.utilities.tables import markdown

__all__ = ["ending"]


def ending(trainer: pl.Trainer, module: CausalLM) -> str:
    """The lines that end a fit, for its log."""
    return "\n".join(
        [
            _forgotten(trainer),
            _learned(trainer, module),
            *(f"{what}: {where}" for what, where in _files(trainer, module)),
        ]
    )


def _forgotten(trainer: pl.Trainer) -> str:
    values, rows = trainer.callback_metrics, []
    monitors = [each for each in trainer.callbacks if isinstance(each, ForgettingMonitor)]  # type: ignore[attr-defined]
    if not monitors:
        return "Forgetting was not measured. Add a ForgettingMonitor to the callbacks: it needs no prior data."
    for monitor in monitors:
        for name, before in monitor.baseline.items():
            if f"prior_loss/{name}" not in values:
                continue  # the checkpoint has a baseline, but no step was left to take
            error = values.get(f"forgetting_error/{name}")
            rows.append(
                [
                    name,
                    f"{before:.4f}",
                    f"{values[f'prior_loss/{name}']:.4f}",
                    f"{values[f'forgetting/{name}']:+.4f}" + ("" if error is None else f" ± {error:.4f}"),
                ]
            )
    if not rows:
        return "Forgetting was not measured: no step was taken."
    return markdown(["set", "loss before", "loss after", "forgetting, nats a token"], rows)


def _learned(trainer: pl.Trainer, module: CausalLM) -> str:
    values, told = trainer.callback_metrics, {"val/loss": "on its held-out rows", "train/loss": "on the last batch"}
    losses = [f"{values[key]:.4f} {rows}" for key, rows in told.items() if key in values]
    if module.fall is not None:
        losses.append("{:.2g} ± {:.2g} lower after the first batches of training than on them".format(*module.fall))
    return f"New-task loss: {', '.join(losses) or 'no step was taken'}"


def _files(trainer: pl.Trainer, module: CausalLM) -> Iterator[tuple[str, object]]:
    for logger in trainer.loggers:
        folder = logger.log_dir or logger.save_dir
        if folder is not None:
            yield "Logs", folder
    for checkpoint in trainer.checkpoint_callbacks:
        if isinstance(checkpoint, ModelCheckpoint):
            saved = dict.fromkeys((checkpoint.best_model_path, checkpoint.last_model_path))
            for path in filter(None, saved):
                yield "Checkpoint", path
    if module.save_to is not None:
        yield "Model", module.save_to
