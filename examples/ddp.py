"""Two processes on the CPU, which share sampling and monitoring and train as one does with the same global batch.

    python examples/ddp.py --quick
    python examples/ddp.py --model DIR_OR_HUB_NAME --prior known.txt --new new.txt

Each process prints which replay rows were its own; the first, what was learned and forgotten. On GPUs it is
`accelerator="gpu"`; that was not run. Takes 30 seconds with --quick.
"""

from typing import Any

import lightning as L
from quick import arguments

from lightning_replay import CausalLM, ForgettingMonitor, ReplayDataModule, SelfGeneratedReplay, TextDataModule

options = arguments(__doc__, replay_fraction=0.2)  # so that each process has replay rows in its first step


def text(file: str) -> TextDataModule:
    """A file of documents, one a line."""
    return TextDataModule(file, options.model, options.length, batch_size=8, document_separator="\n")


class Printed(L.Callback):
    """Prints what a process replays in its first step."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The rows drawn for this process."""
        if trainer.global_step == 0:
            rows = trainer.datamodule.drawn.tokens  # type: ignore[attr-defined]
            print(
                f"process {trainer.global_rank} of {trainer.world_size} replays {rows[:, :6].tolist()} ...", flush=True
            )


callbacks = [SelfGeneratedReplay(), ForgettingMonitor({"prior": text(options.prior)}), Printed()]
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=options.steps, callbacks=callbacks, logger=False
)
module = CausalLM(options.model, options.learning_rate)
trainer.fit(module, datamodule=ReplayDataModule(text(options.new), options.replay_fraction))
if trainer.is_global_zero:
    figures = trainer.callback_metrics
    print(f"new-task loss {figures['val/loss']:.3f}, forgetting {figures['forgetting/prior']:+.3f}")
