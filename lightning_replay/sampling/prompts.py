"""What samples begin with: a start token, token ids, texts, or a chat template up to the user's turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_replay.models.language_model import LanguageModel
from lightning_replay.sampling.draw import start_token

__all__ = ["Prompts", "PromptsLike", "find_prompts"]

PromptsLike = Literal["chat"] | Sequence[str] | Sequence[Sequence[int]]

_USER_TURN = "what the user says"


@dataclass(frozen=True)
class Prompts:
    """Token ids that samples begin with.

    Attributes:
        starts: Prompts, each begins an even share of the samples.
        reply: What a chat template puts between the user's turn and the reply; empty where nobody replies.
    """

    starts: list[list[int]]
    reply: list[int]

    @property
    def max_token(self) -> int:
        """The largest token id."""
        return max(max(tokens) for tokens in (*self.starts, self.reply) if tokens)


def find_prompts(given: PromptsLike | None, model: LanguageModel, tokenizer: Any) -> Prompts:
    """Token ids of the prompts that a user asked for.

    Texts begin with the start token, as documents in ``TextDataModule`` do.

    Args:
        given: ``"chat"``, texts, token ids, or None for the start token alone.
        model: The model to sample.
        tokenizer: Its tokenizer; None where there is none.

    Raises:
        MisconfigurationException: If the tokenizer that is needed, its chat template or a start token is missing.
    """
    if given is None:
        token = start_token(model, tokenizer)
        if token is None:
            raise MisconfigurationException(
                "Samples begin with the beginning-of-sequence or end-of-text token, but neither a tokenizer nor the "
                f"configuration of {type(model.module).__name__} tells which that is. Pass `prompts=[[token_id]]`."
            )
        return Prompts([[token]], [])
    if not isinstance(given[0], str):
        return Prompts([[int(token) for token in prompt] for prompt in given], [])
    if tokenizer is None:
        raise MisconfigurationException(
            "Prompts that are texts need a tokenizer. Pass `tokenizer=` to SelfGeneratedReplay, or give the datamodule "
            "an attribute `tokenizer`."
        )
    if given == "chat":
        return _chat(tokenizer)
    start = start_token(model, tokenizer)
    first = [] if start is None else [start]
    return Prompts([first + _tokens(tokenizer, str(text)) for text in given], [])


def _chat(tokenizer: Any) -> Prompts:
    """The template's beginning up to the user's words, and what it puts after them."""
    if not getattr(tokenizer, "chat_template", None):
        raise MisconfigurationException(
            f"`prompts='chat'` needs a tokenizer with a chat template, but {type(tokenizer).__name__} has none. Use "
            "that of an instruction-tuned model, or set its `chat_template`."
        )
    messages = [{"role": "user", "content": _USER_TURN}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, found, after = text.partition(_USER_TURN)
    if not found or not before or not after:
        raise MisconfigurationException(
            "`prompts='chat'` needs a chat template that puts something before and after the user's words; this one "
            f"makes {text!r} of {_USER_TURN!r}. Pass `prompts` as texts or token ids."
        )
    # Some tokenizers treat the beginning of a text in a way of their own, so what follows the user's words is taken
    # from the whole where that is possible.
    head, whole = _tokens(tokenizer, before + _USER_TURN), _tokens(tokenizer, text)
    reply = whole[len(head) :] if whole[: len(head)] == head else _tokens(tokenizer, after)
    return Prompts([_tokens(tokenizer, before)], reply)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
