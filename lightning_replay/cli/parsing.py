"""Parsers of the commands: options by their full names only, and what may have been meant by another."""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from typing_extensions import override

from lightning_replay.cli.commands import COMMANDS
from lightning_replay.cli.help import Help, brief

__all__ = ["Parser", "command_parser", "reason", "settings_of", "take_arguments"]


class Parser(ArgumentParser):
    """Refuses an option by a part of its name, and says which one may have been meant by an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        asked = getattr(ex, "subcommand_parser", None) or self
        if self.exit_on_error:  # else it is a parser of a part, and the message a part of another's
            message = _hinted(message, asked._option_string_actions)
        super().error(message, ex)


def command_parser(
    name: str, shown: Collection[str], example: str, description: str | None = None, **options: Any
) -> Parser:
    """The parser of a command of our own, without its settings.

    Args:
        name: The command's.
        shown: Settings in the help; all if there are none.
        example: A command line.
        description: What the command does; its summary by default.
        options: More of the parser's.
    """
    more = {"epilog": f"All settings: lightning-replay {name} --help=full"} if "usage" in options else {}
    return Parser(
        prog=f"lightning-replay {name}",
        description=f"{description or COMMANDS[name].summary}\nExample: {example}",
        formatter_class=brief(shown) if shown else Help,
        **more | options,
    )


def take_arguments(parser: Parser, function: Callable[..., Any]) -> None:
    """Let a command have the arguments of a function, on the command line or in a file."""
    parser.add_argument("--config", action="config", help="A YAML file with the settings.")
    parser.add_function_arguments(function, as_group=False)


def settings_of(parser: Parser, arguments: Sequence[str]) -> dict[str, Any]:
    """The settings by name, with objects made."""
    settings: dict[str, Any] = vars(parser.instantiate_classes(parser.parse_args(arguments)))
    settings.pop("config", None)
    return settings


def reason(message: str) -> str:
    """What an object's own code said, where the parser lists all types that a setting might have had instead."""
    head, union, parts = message.partition("Does not validate against any of the Union")
    if not union:
        return message
    listed = re.split(r"\n\s*- ", re.sub(r"\n\s*Given value.*", "", parts))[1:]
    said = (" ".join(part.split()) for part in listed)
    told = dict.fromkeys(part for part in said if not part.startswith(_OF_THE_PARSER))
    return "\n".join(dict.fromkeys([head.strip(), *told])).strip() if told else message


_OF_THE_PARSER = (
    "Does not validate",
    "Expected a",
    "Not a valid subclass",
    "Import path",
    "a class path",
    "a dict with",
)
"""How the parser's own lines begin."""


def _hinted(message: str, options: Iterable[str]) -> str:
    """The parser's message, and what may have been meant."""
    message, meant = reason(message), []
    if found := re.match(r"[Uu]nrecognized arguments: (.*)", message, re.DOTALL):
        known = [option for option in options if option.startswith("--") and not option.endswith("+")]
        for part in found[1].split():
            meant += _meant(part.partition("=")[0], known) if part.startswith("--") else []
    elif found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
        meant = _meant(found[1], re.findall(r"[\w-]+", found[2]))
    elif found := re.search(r"class_path '(.*?)':\s+Option '(.*?)' is not accepted", message):
        module, _, name = found[1].rpartition(".")
        meant = _meant(found[2], list(inspect.signature(getattr(import_module(module), name)).parameters))
    return f"{message}. Did you mean {' or '.join(meant)}?" if meant else message


def _meant(name: str, known: Sequence[str]) -> list[str]:
    """The names that begin as one does if they are few, or else the one that is most like it, its last part too."""
    begun = [each for each in known if each.startswith(name)]
    if 0 < len(begun) <= 3:
        return begun
    alike = [each for each in get_close_matches(name, known) if get_close_matches(_last(name), [_last(each)])]
    return alike[:1]


def _last(name: str) -> str:
    return name.lstrip("-").rpartition(".")[2]
