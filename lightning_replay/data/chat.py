"""Conversations from local files or the Hugging Face hub, with the loss on the assistant's turns alone."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_replay.data.base import DocumentDataModule
from lightning_replay.data.messages import message_of, rendered_whole, tools_of

__all__ = ["ChatDataModule", "assistant_tokens"]

_MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatDataModule(DocumentDataModule):
    """Puts conversations through a tokenizer's chat template, a row each, and labels the assistant's turns alone.

    A conversation is a list of messages, each with a ``role`` (``"system"``, ``"user"``, ``"assistant"``, ``"tool"``)
    and a ``content``, as in
    ``{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}``. A message without
    ``content`` has ``tool_calls`` or another text instead. Tools that the conversation may call are in a column of
    their own. Batches are mappings with ``input_ids``, ``attention_mask`` and ``labels``, padded on the right to the
    longest row; labels are -100 on everything but the assistant's turns, calls included, of which there may be several.
    Conversations that are longer than ``sequence_length`` are cut at their end; those in which nothing is left that
    the assistant says are dropped.

    Replay of the same kind is ``SelfGeneratedReplay(sampling=Sampling(prompts="chat"))``.

    Args:
        data: A local file (``.jsonl``, ``.json``, ``.parquet`` and others, also compressed), a local folder, or the
            name of a dataset on the hub: see ``read_documents``.
        tokenizer: A tokenizer with a chat template, a local folder with one, or a name on the hub.
        sequence_length: Tokens in a row at most.
        batch_size: Rows in a batch.
        messages_column: The column that holds the messages.
        tools_column: The column that holds the tools of each conversation, if there is one: a list of JSON schemas as
            the template takes them, or the list as JSON text. None to leave the tools out.
        validation_fraction: Share of the conversations that is held out, at least one, unless it is 0.
        max_documents: How many conversations to read at most; all of them by default.
        num_workers: Worker processes of each loader.
        split: Which split of a hub dataset to read.
        seed: Seed of the division into training and validation.
        trust_remote_code: Whether to execute code of its own that a tokenizer's folder or hub repository has. By
            default, such a tokenizer is refused.

    Raises:
        TypeError: If ``tokenizer`` is not a tokenizer.
        ValueError: If an argument is out of its range, or the tokenizer has no chat template or needs code of its own;
            at ``setup``, if the file can't be read, the column is missing or holds something else than messages, the
            template leaves out calls or tools, nothing that the assistant says fits, or the assistant's turns can't be
            found exactly (see ``assistant_tokens``).

    Example:
        >>> data = ChatDataModule("chats.jsonl", tokenizer="HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
    """

    _columns_argument = "messages_column"

    def __init__(
        self,
        data: str | Path,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        sequence_length: int = 512,
        batch_size: int = 8,
        messages_column: str = "messages",
        tools_column: str | None = "tools",
        validation_fraction: float = 0.05,
        max_documents: int | None = None,
        num_workers: int = 0,
        split: str = "train",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(
            data,
            tokenizer,
            sequence_length,
            batch_size,
            [messages_column],
            None,
            validation_fraction,
            max_documents,
            num_workers,
            split,
            seed,
            trust_remote_code,
        )
        self.tools_column = tools_column
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "`tokenizer` has no chat template, which makes one text of messages. Take the tokenizer of an "
                "instruction-tuned model, or set `tokenizer.chat_template`."
            )

    @override
    def rows_of(self, documents: Dataset) -> Dataset:
        tools = self.tools_column if self.tools_column in documents.column_names else None
        if tools is None and self.tools_column not in (None, "tools"):
            raise ValueError(
                f"{self.data} has no column {self.tools_column!r}; it has {documents.column_names}. Set `tools_column`."
            )
        options: dict[str, Any] = {"tokenizer": self.tokenizer, "column": self.columns[0], "tools_column": tools}
        options["length"] = self.sequence_length
        rows = documents.map(_encode, with_indices=True, remove_columns=documents.column_names, fn_kwargs=options)
        kept = rows.filter(lambda row: any(label != -100 for label in row["labels"][1:]))
        if not len(kept):
            raise ValueError(
                f"No conversation in {self.data} has anything that the assistant says within {self.sequence_length} "
                "tokens, so there is nothing to train on. Check the roles, or set a larger `sequence_length`."
            )
        if len(kept) < len(rows):
            rank_zero_warn(
                f"Left out {len(rows) - len(kept)} of {len(rows)} conversations in {self.data}, in which the assistant "
                f"says nothing within {self.sequence_length} tokens."
            )
        return kept

    @override
    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        def padded(name: str, padding: int) -> Tensor:
            return pad_sequence([row[name] for row in rows], batch_first=True, padding_value=padding)

        padding = self.tokenizer.pad_token_id
        return {
            "input_ids": padded("input_ids", 0 if padding is None else padding),
            "attention_mask": pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True),
            "labels": padded("labels", -100),
        }


def assistant_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which of them the assistant has to say.

    If the template marks the assistant's part with ``{% generation %}``, that is it. Else it is what each of the
    assistant's messages adds to the conversation before it, which ends with the template's opening of a reply:
    words, calls and whatever ends the turn. That is exact if every conversation up to a message is, token by token, the
    beginning of the longer one, and anything else is refused.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: Mappings with ``role`` and ``content``, or what the template takes in place of a content.
        tools: The tools that the conversation may call, as the template takes them.

    Returns:
        Token ids, and True for those of the assistant.

    Raises:
        ValueError: If the assistant's part can't be found exactly.
    """
    options: dict[str, Any] = {"tools": list(tools) if tools else None}
    if _MARKS_ASSISTANT.search(tokenizer.get_chat_template(**options)):
        options |= {"return_dict": True, "return_assistant_tokens_mask": True}
        marked: Any = tokenizer.apply_chat_template(messages, **options)
        return list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]]
    whole = _tokens(tokenizer, messages, **options)
    said = [False] * len(whole)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not turn:
            raise ValueError("the assistant speaks first, and the template marks nothing with `{% generation %}`")
        before = _tokens(tokenizer, messages[:turn], add_generation_prompt=True, **options)
        until = _tokens(tokenizer, messages[: turn + 1], **options)
        if until[: len(before)] != before or whole[: len(until)] != until:
            raise ValueError(
                f"it writes the messages up to {turn} in another way once others follow, so the tokens that the "
                "assistant says can't be found exactly. Take a template that marks them with `{% generation %}` and "
                "`{% endgeneration %}`"
            )
        said[len(before) : len(until)] = [True] * (len(until) - len(before))
    return whole, said


def _tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(messages, return_dict=True, **options)
    return list(encoded["input_ids"])


def _encode(
    document: dict[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    tools_column: str | None,
    length: int,
) -> dict[str, list[int]]:
    given = document[column]
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise ValueError(
            f"Conversation {index} is no list of messages, each with a `role` and a `content` of text: the column "
            f"{column!r} holds {str(given)[:200]!r}. Set `messages_column`."
        )
    try:
        messages = [message_of(message) for message in given]
        tools = tools_of(None if tools_column is None else document[tools_column])
        messages = rendered_whole(tokenizer, messages, tools)
        tokens, said = assistant_tokens(tokenizer, messages, tools)
    except Exception as error:  # a template raises errors of any type, as if roles do not take turns
        raise ValueError(f"Conversation {index} can't be put through the chat template: {error}.") from error
    labels = [token if own else -100 for token, own in zip(tokens, said, strict=True)]
    return {"input_ids": tokens[:length], "labels": labels[:length]}
