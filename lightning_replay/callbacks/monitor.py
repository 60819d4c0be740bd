"""What callbacks that measure during training share: when they do, on which model, and what a resumed run needs."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from typing_extensions import override

from lightning_replay.callbacks.self_generated_replay import SelfGeneratedReplay
from lightning_replay.models.head import OutputHeads
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.utilities.distributed import check_strategy
from lightning_replay.utilities.logging import log_values, next_step
from lightning_replay.utilities.validation import is_whole

__all__ = ["Monitor", "replay_of"]


class Monitor(Callback):
    """Measures every so many optimizer steps and at the end; subclasses at fit start, too, and say what.

    Args:
        every_n_steps: Optimizer steps between measurements; 0 for none between fit start and end.
        language_model: Where the language model is in the LightningModule.

    Raises:
        ValueError: If ``every_n_steps`` is no such number.
    """

    _seconds_key: str
    """Of the time that all monitors of the kind have taken."""

    def __init__(self, every_n_steps: int, language_model: str | None) -> None:
        if not is_whole(every_n_steps, 0):
            raise ValueError(
                f"`every_n_steps` is the optimizer steps between measurements or 0; got {every_n_steps!r}."
            )
        self.every_n_steps = every_n_steps
        self.language_model = language_model
        self.baseline: dict[str, float] = {}
        """What was measured at fit start."""

        self.seconds = 0.0
        """Wall-clock time spent on measuring, over all fits."""

        self._resumed = False
        self._measured_at = -1
        self._values: dict[str, float] = {}
        self._model: LanguageModel | None = None
        self._heads = OutputHeads()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        # With gradient accumulation, several batches end at one global step.
        if due and trainer.global_step != self._measured_at:
            # Lightning counts this batch only after its hooks.
            self._measure(trainer, pl_module, next_step(trainer) + 1)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The last weights may have been measured, and a callback before this one have put their average in their place.
        averages = any(isinstance(each, (StochasticWeightAveraging, WeightAveraging)) for each in trainer.callbacks)  # type: ignore[attr-defined]
        if averages or trainer.global_step != self._measured_at:
            self._measure(trainer, pl_module, next_step(trainer))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._model, self._heads = None, OutputHeads()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._model, self._heads = None, OutputHeads()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "measured_at": self._measured_at,
            "values": self._values,
            "seconds": self.seconds,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.baseline = dict(state_dict["baseline"])
        self._measured_at = state_dict["measured_at"]
        self._values = dict(state_dict["values"])
        self.seconds = state_dict["seconds"]
        self._resumed = bool(self.baseline)  # empty if it was saved before the first step

    def _begin_fit(self, trainer: pl.Trainer) -> None:
        """Forget the last fit, and refuse a strategy under which the model can't be called between steps."""
        self.baseline, self._resumed, self._values = {}, False, {}
        check_strategy(trainer, type(self).__name__)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Measure everything, and log it at a step."""
        raise NotImplementedError

    def _log(self, trainer: pl.Trainer, values: dict[str, float], step: int) -> None:
        """Log what was measured, with the time that it has taken so far, and publish it to other callbacks."""
        monitors = [each for each in trainer.callbacks if isinstance(each, Monitor)]  # type: ignore[attr-defined]
        key = self._seconds_key
        values[key] = sum(each.seconds for each in monitors if each._seconds_key == key)
        self._measured_at = trainer.global_step
        self._values |= values
        log_values(trainer, values, step)

    def _add_seconds(self, trainer: pl.Trainer, elapsed: float) -> None:
        self.seconds += elapsed
        if (replay := replay_of(trainer)) is not None:
            replay.monitoring_seconds += elapsed

    def _path_of_model(self, trainer: pl.Trainer) -> str | None:
        """The path of the language model: this callback's, or else that of the Trainer's ``SelfGeneratedReplay``."""
        replay = replay_of(trainer)
        return replay.language_model if self.language_model is None and replay is not None else self.language_model


def replay_of(trainer: pl.Trainer) -> SelfGeneratedReplay | None:
    """The Trainer's ``SelfGeneratedReplay``, if it has one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, SelfGeneratedReplay)), None)
