"""Options that take several values: `--frames 8 16 32` as well as `--frames 8,16,32`."""

import re
from typing import Any

from typer.core import TyperCommand

from storm_vlm.errors import StormError


def list_command(patterns: dict[str, str]) -> type[TyperCommand]:
    """Returns a command class some of whose options take every value after them that looks like theirs.

    Args:
        patterns: For each option's name, what one of its values looks like, as a regular expression.

    Returns:
        The class; the option itself gets the values joined by commas.
    """

    class ListCommand(TyperCommand):
        """A command whose list options are joined before they are parsed."""

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            """Joins the values, then parses as ever."""
            return super().parse_args(ctx, _join(args, patterns))

    return ListCommand


def parse_numbers(option: str, text: str) -> list[int]:
    """Returns the numbers, 1 or more, that an option was given.

    Args:
        option: The option, for messages.
        text: Numbers, separated by commas.

    Returns:
        The numbers.

    Raises:
        StormError: Something else was given.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not part.isdecimal() or int(part) < 1]
    if wrong:
        raise StormError(f"{option}: expected numbers from 1, got {wrong[0]!r}")
    return [int(part) for part in parts]


def _join(arguments: list[str], patterns: dict[str, str]) -> list[str]:
    """Joins the values of each list option into one argument."""
    joined: list[str] = []
    pattern: str | None = None
    for argument in arguments:
        if pattern is not None and joined[-1].startswith("--"):
            joined.append(argument)  # what follows an option is its value, whatever it looks like
        elif pattern is not None and re.fullmatch(pattern, argument):
            joined[-1] += f",{argument}"
        else:
            pattern = patterns.get(argument.removeprefix("--")) if argument.startswith("--") else None
            joined.append(argument)
    return joined
