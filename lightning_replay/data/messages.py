"""Messages and tools as chat templates take them."""

import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["message_of", "rendered_whole", "tools_of"]


def message_of(given: dict[str, Any]) -> dict[str, Any]:
    """A message as it was before columns of a file were brought to one type: without keys that it does not have.

    Reading a file may fill in None for what some messages have and others don't, and templates ask whether a key is
    there. A ``content`` stays, and is None if the message has something else to show in its place.

    Args:
        given: The message, with ``role`` and ``content`` or something else, such as ``tool_calls``.

    Raises:
        ValueError: If the role is no text, or there is nothing to show.

    Example:
        >>> message_of({"role": "user", "content": "Hi", "tool_calls": None})
        {'role': 'user', 'content': 'Hi'}
    """
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str):
        raise ValueError(f"a message has no `role` of text: {_shown(given)}")
    if content is not None and not isinstance(content, str):
        raise ValueError(
            f"the `content` of a message is a {type(content).__name__}: {_shown(given)}. Join its parts to one text"
        )
    present = {key: _present(value) for key, value in given.items() if key not in ("role", "content")}
    others = {key: value for key, value in present.items() if value not in (None, [], {})}
    if content is None and not others:
        raise ValueError(f"a message has no `content` of text, nor `tool_calls`: {_shown(given)}")
    return {"role": role, "content": content} | others


def tools_of(given: Any) -> list[dict[str, Any]] | None:
    """The tools of a conversation, from a list of JSON schemas or its JSON text; None if there are none.

    Raises:
        ValueError: If they are something else.

    Example:
        >>> tools_of('[{"type": "function", "function": {"name": "time"}}]')
        [{'type': 'function', 'function': {'name': 'time'}}]
    """
    tools = given
    if isinstance(given, str):
        try:
            tools = json.loads(given) if given.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"its tools are no JSON text: {error}. Set `tools_column`") from error
    if not isinstance(tools, (list, type(None))) or not all(isinstance(tool, (dict, str)) for tool in tools or []):
        raise ValueError(f"its tools are no list of JSON schemas: {_shown(given)}. Set `tools_column`")
    schemas = [json.loads(tool) if isinstance(tool, str) else _present(tool) for tool in tools or []]
    return schemas or None


def rendered_whole(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """The messages in the first form in which the template renders all of them, calls and tools included.

    Templates differ in how they ask for a message that has calls and no content (None or an empty text), and for the
    arguments of a call (a mapping, as Hugging Face has it, or JSON text).

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The messages.
        tools: The tools, if there are any.

    Raises:
        ValueError: If the template leaves calls or tools out of the text.
    """
    if not tools and all(isinstance(message["content"], str) and "tool_calls" not in message for message in messages):
        return messages

    def rendered(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str | Exception:
        try:
            return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
        except Exception as error:  # a template raises errors of any type; another form may suit it
            return error

    first: Exception | None = None
    left_out: Exception | None = None
    for form in _forms(messages):
        whole = rendered(form, tools)
        if isinstance(whole, Exception):
            first = first or whole
            continue
        blank = [message | {"content": message["content"] or ""} for message in form]
        if whole.count("None") > str(rendered(blank, tools)).count("None"):
            continue
        if tools and whole == rendered(form, None):
            raise ValueError(
                "it leaves the tools out of the text. Take the tokenizer of a model that calls tools, or set "
                "`tools_column=None`"
            )
        bare = rendered([{key: message[key] for key in message if key != "tool_calls"} for message in blank], tools)
        if all(isinstance(bare, Exception) or whole.count(name) > bare.count(name) for name in _calls(form)):
            return form
        left_out = ValueError(
            "it leaves `tool_calls` out of the text. Take the tokenizer of a model that calls tools, or leave out such "
            "conversations"
        )
    raise left_out or first or ValueError("it writes the word None for a message whose `content` is null")


def _forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages with each spelling of no content and of a call's arguments."""
    for arguments in (_as_mapping, _as_text):
        for empty in (None, ""):
            yield [
                {
                    key: [_with_arguments(call, arguments) for call in value] if key == "tool_calls" else value
                    for key, value in (
                        message | {"content": empty if message["content"] is None else message["content"]}
                    ).items()
                }
                for message in messages
            ]


def _with_arguments(call: dict[str, Any], spelled: Any) -> dict[str, Any]:
    """A call, or the function in it, with its arguments spelled in another way."""
    if "function" in call:
        return call | {"function": _with_arguments(call["function"], spelled)}
    return call | {"arguments": spelled(call["arguments"])} if "arguments" in call else call


def _as_mapping(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:  # a text that is no JSON is a template's own affair
        return arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _calls(messages: list[dict[str, Any]]) -> list[str]:
    """The names of the functions that are called."""
    calls = [call.get("function", call) for message in messages for call in message.get("tool_calls", [])]
    return [str(call.get("name", "")) for call in calls]


def _present(value: Any) -> Any:
    """A value without the keys that hold None in it."""
    if isinstance(value, dict):
        return {key: _present(part) for key, part in value.items() if part is not None}
    return [_present(part) for part in value] if isinstance(value, list) else value


def _shown(value: Any) -> str:
    return repr(str(value)[:200])
