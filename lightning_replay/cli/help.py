"""Help that fits a screen: the settings that most runs need, each in a sentence; ``--help=full`` lists all."""

import re
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Collection, Iterable
from typing import Any

from jsonargparse import DefaultHelpFormatter
from typing_extensions import override

__all__ = ["FULL", "Help", "brief"]

FULL = "--help=full"
"""The option that lists all settings of a command."""


class Help(DefaultHelpFormatter):
    """Keeps the command in an example whole, so that it can be copied, and paragraphs apart."""

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            textwrap.fill(
                " ".join(paragraph.split()),
                width,
                initial_indent=indent,
                subsequent_indent=indent,
                break_on_hyphens=False,
            )
            for paragraph in text.split("\n")
        )


def brief(shown: Collection[str]) -> type[Help]:
    """A formatter that lists some settings only, by name, and of each the first sentence and the default."""

    class Brief(Help):
        def __init__(self, prog: str, **kwargs: Any) -> None:
            super().__init__(prog, **{"max_help_position": 27} | kwargs)  # type: ignore[no-untyped-call]

        @override
        def add_arguments(self, actions: Iterable[Action]) -> None:
            super().add_arguments([action for action in actions if action.dest in shown])

        @override
        def start_section(self, heading: str | None) -> None:
            super().start_section(heading if heading == "options" else None)  # others are sentences on a class

        @override
        def _get_help_string(self, action: Action) -> str:
            sentence = re.split(r"(?<=\.)\s|(?<=\w:)\s", " ".join((action.help or "").split()))[0].rstrip(".;:")
            if action.required:
                return f"{sentence} (required)."
            default = "" if action.default in (None, SUPPRESS, ()) or action.nargs == 0 else " (default: %(default)s)"
            return f"{sentence[:1].upper()}{sentence[1:]}{default}."

        @override
        def _format_action_invocation(self, action: Action) -> str:
            return ", ".join(option for option in action.option_strings if not option.endswith("+")) or action.dest

    return Brief
