"""One line added to a script that finetunes with a LightningModule and a DataLoader of its own.

    python examples/existing_trainer.py --quick
    python examples/existing_trainer.py --model DIR_OR_HUB_NAME --prior known.txt --new new.txt

A second line measures forgetting. Prints the loss on prior text before and after, in nats a token;
`--replay-fraction 0` shows the run without replay.
Takes 20 seconds with --quick.
"""

from typing import Any

import lightning as L
import torch
from quick import arguments
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_replay import ForgettingMonitor, SelfGeneratedReplay, TextDataModule


class Finetuning(L.LightningModule):
    """A module as its user wrote it, with no thought of replay."""

    def __init__(self, name: str, learning_rate: float) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """Their own loss."""
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Their own optimizer."""
        return torch.optim.AdamW(self.parameters(), self.learning_rate)


def loader(file: str, tokenizer: str, length: int) -> DataLoader[Any]:
    """A dataloader as its user has it."""
    data = TextDataModule(file, tokenizer, length, batch_size=16, document_separator="\n")
    data.setup("fit")
    return data.train_dataloader()


options = arguments(__doc__)
new, prior = (loader(file, options.model, options.length) for file in (options.new, options.prior))

replay = SelfGeneratedReplay(replay_fraction=options.replay_fraction)  # the line
monitor = ForgettingMonitor({"prior": prior}, max_batches=16)  # measures
trainer = L.Trainer(max_steps=options.steps, callbacks=[replay, monitor], logger=False)
trainer.fit(Finetuning(options.model, options.learning_rate), new)

before, after = monitor.baseline["prior"], float(trainer.callback_metrics["prior_loss/prior"])
print(f"prior loss: {before:.3f} before, {after:.3f} after; forgetting {after - before:+.3f}")
