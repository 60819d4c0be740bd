"""A coefficient that follows a schedule: strong at first, while the learning rate is high, and less towards the end.

    python examples/coefficient_schedule.py --quick
    python examples/coefficient_schedule.py --model DIR_OR_HUB_NAME --prior known.txt --new new.txt

Prints coefficient and replay loss on the way, and what was learned and forgotten. Takes 20 seconds with --quick.
"""

import math
from typing import Any

import lightning as L
from quick import arguments

from lightning_replay import CausalLM, ForgettingMonitor, ReplayDataModule, SelfGeneratedReplay, TextDataModule

options = arguments(__doc__)


def coefficient(step: int) -> float:
    """From 10 to 1 along half a cosine."""
    return 1 + 9 * 0.5 * (1 + math.cos(math.pi * step / options.steps))


class Printed(L.Callback):
    """Prints what replay logs."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """A line now and then."""
        if trainer.global_step % (options.steps // 4) == 0:
            values = [float(trainer.callback_metrics[f"replay/{name}"]) for name in ("coefficient", "loss")]
            print("step {}: coefficient {:.2f}, replay loss {:.4f}".format(trainer.global_step, *values))


def text(file: str) -> TextDataModule:
    """A file of documents, one a line."""
    return TextDataModule(file, options.model, options.length, batch_size=16, document_separator="\n")


replay = SelfGeneratedReplay(coefficient=coefficient)
callbacks = [replay, ForgettingMonitor({"prior": text(options.prior)}), Printed()]
trainer = L.Trainer(max_steps=options.steps, callbacks=callbacks, logger=False)
module = CausalLM(options.model, options.learning_rate)
trainer.fit(module, datamodule=ReplayDataModule(text(options.new), options.replay_fraction))
figures = trainer.callback_metrics
print(f"new-task loss {figures['val/loss']:.3f}, forgetting {figures['forgetting/prior']:+.3f}")
