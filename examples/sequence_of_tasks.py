"""A sequence of tasks: each fit takes the model as its reference before it trains, and so replays all that it knows.

    python examples/sequence_of_tasks.py --quick
    python examples/sequence_of_tasks.py --model DIR_OR_HUB_NAME --prior known.txt --new new.txt --third third.txt

No task's data are kept for the next. Prints the accuracy on each task's held-out text after each fit, a row a fit, and
backward transfer (below zero: forgotten) and forgetting measure of the sequence. Takes 15 seconds with --quick.
"""

import lightning as L
import torch
from quick import arguments

from lightning_replay import (
    CausalLM,
    ForgettingMonitor,
    ReplayDataModule,
    SelfGeneratedReplay,
    TextDataModule,
    backward_transfer,
    forgetting_measure,
)

options = arguments(__doc__)
files = [file for file in (options.prior, options.new, options.third) if file]
tasks = {
    f"task{number}": TextDataModule(file, options.model, options.length, batch_size=16, document_separator="\n")
    for number, file in enumerate(files)
}
module = CausalLM(options.model, options.learning_rate)
rows = []
for number, task in enumerate(tasks.values()):
    monitor = ForgettingMonitor(tasks, every_n_steps=0)
    trainer = L.Trainer(
        max_steps=options.steps if number else 1,  # the first task, which the model knows, is only measured
        callbacks=[SelfGeneratedReplay(), monitor],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=ReplayDataModule(task, options.replay_fraction))
    rows.append([float(trainer.callback_metrics[f"prior_accuracy/{name}"]) for name in tasks])

print("\n".join(" ".join(f"{value:.3f}" for value in row) for row in rows))
matrix = torch.tensor(rows)
print(f"backward transfer {backward_transfer(matrix):+.3f}, forgetting measure {forgetting_measure(matrix):.3f}")
