"""Tables for a terminal and for a page alike."""

from collections.abc import Iterable, Sequence

__all__ = ["markdown"]


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Example:
        >>> print(markdown(["set", "loss"], [["stories", "1.5"]]))
        | set | loss |
        | --- | --- |
        | stories | 1.5 |
    """
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))
