"""An instruction-tuned model, finetuned on conversations, that replays conversations which it samples itself.

    python examples/chat.py --quick
    python examples/chat.py --model DIR_OR_HUB_NAME --prior prior_chats.jsonl --new chats.jsonl

Data are lines {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}; the loss is
on the assistant's turns. Prints a conversation that was replayed, the loss on new conversations and the forgetting.
Takes 20 seconds with --quick.
"""

import lightning as L
from quick import arguments

from lightning_replay import (
    CausalLM,
    ChatDataModule,
    ForgettingMonitor,
    ReplayDataModule,
    Sampling,
    SelfGeneratedReplay,
)

options = arguments(__doc__, kind="jsonl")


def chats(file: str) -> ChatDataModule:
    """A file of conversations, one a line."""
    return ChatDataModule(file, options.model, options.length, batch_size=16)


# The prompt is the chat template up to the user's turn; the model then samples the user's message and the answer.
replay = SelfGeneratedReplay(coefficient=1.0, sequence_length=options.length, sampling=Sampling(prompts="chat"))
monitor = ForgettingMonitor({"prior": chats(options.prior)})
data = ReplayDataModule(chats(options.new), options.replay_fraction)
trainer = L.Trainer(max_steps=options.steps, callbacks=[replay, monitor], logger=False)
trainer.fit(CausalLM(options.model, options.learning_rate), datamodule=data)

if replay.rows.buffer is not None:
    row = replay.rows.buffer.draw(1)
    print("replayed:", data.tokenizer.decode(row.tokens[0, : row.lengths[0]]))
figures = trainer.callback_metrics
print(f"loss on new conversations {figures['val/loss']:.3f}, forgetting {figures['forgetting/prior']:+.3f}")
