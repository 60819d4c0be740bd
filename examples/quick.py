"""What the examples run on: a model and texts that are named on the command line, or with --quick tiny ones.

The tiny model can count upwards in words, in texts and in conversations; the new ones count downwards, and in twos. It
is made once, in a few seconds, and kept in the system's folder for temporary files.
"""

import argparse
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_replay import CausalLM, TextDataModule

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]
TEMPLATE = (
    "<s>{% for message in messages %}<{{ message.role }}> {{ message.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LENGTH = 24


def arguments(description: str | None, kind: str = "txt", replay_fraction: float = 0.1) -> argparse.Namespace:
    """The model and the texts, one document a line, that an example runs on."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or local folder, of model and tokenizer")
    parser.add_argument("--prior", help="what the model knows: a local file")
    parser.add_argument("--new", help="what to finetune on: a local file")
    parser.add_argument("--third", help="what to finetune on after that, in a sequence")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument(
        "--replay-fraction", type=float, default=replay_fraction, help="share of replay rows; 0 for none"
    )
    options = parsed(parser, kind, steps=60, length=LENGTH, learning_rate=3e-3)
    L.seed_everything(0, verbose=False)
    return options


def parsed(parser: argparse.ArgumentParser, kind: str = "txt", **quick: Any) -> argparse.Namespace:
    """The options of the command line; with ``--quick`` the tiny model, its texts and these settings."""
    parser.add_argument("--quick", action="store_true", help="a tiny model and texts, no download")
    options = parser.parse_args()
    if options.quick:
        folder = quick_folder()
        texts = {name: str(folder / f"{name}.{kind}") for name in ("prior", "new", "third")}
        vars(options).update(quick, model=str(folder / "model"), **texts)
    elif not (options.model and options.prior and options.new):
        parser.error("--model, --prior and --new are needed without --quick")
    return options


def quick_folder() -> Path:
    """A folder with the tiny model, its tokenizer and the texts."""
    warnings.filterwarnings("ignore")  # advice for real runs would hide what an example prints
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder = Path(tempfile.gettempdir()) / "lightning-replay-quick"
    if folder.is_dir():
        return folder
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    L.seed_everything(0, verbose=False)  # the same model, whichever script makes it
    for name, step in {"prior": 1, "new": -1, "third": 2}.items():
        counts = [[NUMBERS[(start + step * i) % 12] for i in range(20)] for start in range(600)]
        (made / f"{name}.txt").write_text("\n".join(" ".join(words) for words in counts))
        chats = [[("user", words[0]), ("assistant", " ".join(words[1:5]))] for words in counts]
        lines = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
        (made / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        if name == "prior":
            spoken = [" </s> ".join(f"<{role}> {text}" for role, text in chat) for chat in chats]
            (made / "known.txt").write_text((made / "prior.txt").read_text() + "\n" + "\n".join(spoken))

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + NUMBERS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "additional_special_tokens": SPECIAL[3:]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(SPECIAL + NUMBERS), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=128, **size, **ids))
    trainer = L.Trainer(
        max_steps=150, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    known = TextDataModule(made / "known.txt", tokenizer, LENGTH, batch_size=64, document_separator="\n")
    trainer.fit(CausalLM(model, 1e-2, save_to=made / "model"), datamodule=known)
    try:
        os.rename(made, folder)
    except OSError:  # another process was first
        if not folder.is_dir():
            raise
    return folder
