"""A LoRA adapter, finetuned with replay. Switched off, it gives the reference, exactly and at no cost in memory.

    python examples/lora.py --quick
    python examples/lora.py --model DIR_OR_HUB_NAME --prior known.txt --new new.txt

Prints how many weights were trained, how far the model has drifted, and saves it merged, as `from_pretrained` reads it.
Takes 20 seconds with --quick.
"""

import lightning as L
from quick import arguments

from lightning_replay import CausalLM, ForgettingMonitor, ReplayDataModule, SelfGeneratedReplay, TextDataModule

options = arguments(__doc__)


def text(file: str) -> TextDataModule:
    """A file of documents, one a line."""
    return TextDataModule(file, options.model, options.length, batch_size=16, document_separator="\n")


module = CausalLM(
    options.model,
    learning_rate=3 * options.learning_rate,
    adapter={"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    save_to="finetuned",
)
trainer = L.Trainer(
    max_steps=options.steps,
    callbacks=[SelfGeneratedReplay(reference="adapter"), ForgettingMonitor({"prior": text(options.prior)})],
    logger=False,
)
trainer.fit(module, datamodule=ReplayDataModule(text(options.new), options.replay_fraction))

trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
every = sum(parameter.numel() for parameter in module.parameters())
figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
print(f"trained {trained:,} of {every:,} weights; new-task loss {figures['val/loss']:.3f}")
print(
    f"forgetting {figures['forgetting/prior']:+.3f}, drift {figures['prior_kl/prior']:.3f} nats a token; see finetuned/"
)
