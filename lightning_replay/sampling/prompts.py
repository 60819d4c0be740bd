"""The prompts of samples: a start token, token ids, texts, or a chat template up to the user's turn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_replay.models.language_model import LanguageModel
from lightning_replay.sampling.draw import start_token

__all__ = ["Prompts", "PromptsLike", "find_prompts"]

PromptsLike = Literal["chat"] | Sequence[str] | Sequence[Sequence[int]]

_USER_TURN = "what the user says"
_ANSWER = "what the assistant says"
_NEXT_TURN = "what is asked next"


@dataclass(frozen=True)
class Prompts:
    """Token ids that samples begin with, and what a chat template puts between turns.

    Attributes:
        starts: Prompts; each begins an even share of the samples.
        reply: The tokens between the user's turn and the reply, from the first that is not white space on; empty if
            samples have no reply.
        turn_end: How many tokens of ``reply`` the model has to draw in a row to end the user's turn: those up to the
            first special token, or all if it holds none.
        answer_end: The tokens that end an answer when the model has drawn them in a row; empty if only the end token
            does.
    """

    starts: list[list[int]]
    reply: list[int]
    turn_end: int = 1
    answer_end: list[int] = field(default_factory=list)

    @property
    def max_token(self) -> int:
        """The largest token id."""
        return max(max(tokens) for tokens in (*self.starts, self.reply, self.answer_end) if tokens)


def find_prompts(given: PromptsLike | None, model: LanguageModel, tokenizer: Any) -> Prompts:
    """Token ids of the prompts that a user asked for.

    Texts begin with the start token, as documents in ``TextDataModule`` do.

    Args:
        given: ``"chat"``, texts, token ids, or None for only the start token.
        model: The model to sample.
        tokenizer: Its tokenizer; None if there is none.

    Raises:
        MisconfigurationException: If the tokenizer that is needed, its chat template or a start token is missing.
    """
    if given is None:
        token = start_token(model, tokenizer)
        if token is None:
            raise MisconfigurationException(
                "Samples begin with the beginning-of-sequence or end-of-text token, but neither a tokenizer nor the "
                f"configuration of {type(model.module).__name__} names it. Pass "
                "`sampling=lightning_replay.Sampling(prompts=[[token_id]])`; if the model has no such token, pass one "
                "that its texts often begin with, such as that of a newline."
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
    """The template's beginning up to the user's words, and what it puts after them and after an answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise MisconfigurationException(
            f"`prompts='chat'` needs a tokenizer with a chat template, but {type(tokenizer).__name__} has none. Use "
            "that of an instruction-tuned model, or set its `chat_template`."
        )
    user = {"role": "user", "content": _USER_TURN}
    text = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    before, found, after = text.partition(_USER_TURN)
    if not found or not before or not after:
        raise MisconfigurationException(
            "`prompts='chat'` needs a chat template that puts something before and after the user's words; this one "
            f"makes {text!r} of {_USER_TURN!r}. Pass `prompts` as texts or token ids."
        )
    reply = _without_space(tokenizer, _continuation(tokenizer, before + _USER_TURN, after))
    answer_end = _answer_end(tokenizer)
    return Prompts(
        [_tokens(tokenizer, before)],
        reply,
        _until_special(tokenizer, reply),
        answer_end[: _until_special(tokenizer, answer_end)],
    )


def _answer_end(tokenizer: Any) -> list[int]:
    """What the template puts after an answer, up to the user's next words; empty if that is only white space."""
    turns = [("user", _USER_TURN), ("assistant", _ANSWER), ("user", _NEXT_TURN)]
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template for one question and one answer raises an error of any type on another question
        text = tokenizer.apply_chat_template(messages[:2], tokenize=False)
    head, found, tail = text.partition(_ANSWER)
    end = tail.partition(_NEXT_TURN)[0]
    return _without_space(tokenizer, _continuation(tokenizer, head + found, end)) if end.strip() else []


def _continuation(tokenizer: Any, text: str, more: str) -> list[int]:
    """The tokens of what follows a text.

    Some tokenizers treat the beginning of a text in a way of their own, so they are taken from the whole if the text
    has the same tokens in it.
    """
    head, whole = _tokens(tokenizer, text), _tokens(tokenizer, text + more)
    return whole[len(head) :] if whole[: len(head)] == head else _tokens(tokenizer, more)


def _without_space(tokenizer: Any, tokens: list[int]) -> list[int]:
    """The tokens from the first on that is not white space, which may be a part of the token before it."""
    text = (place for place, token in enumerate(tokens) if tokenizer.decode([token]).strip())
    return tokens[next(text, 0) :]


def _until_special(tokenizer: Any, tokens: list[int]) -> int:
    """How many tokens there are up to the first that ordinary text never contains; all if there is none."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()} - {tokenizer.unk_token_id}
    return next((place + 1 for place, token in enumerate(tokens) if token in special), len(tokens))


def _tokens(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
