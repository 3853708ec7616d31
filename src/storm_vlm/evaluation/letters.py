"""From what a model writes to the option it chose."""

import re
import string
from collections.abc import Sequence

# "B", "(B)", "B.", "B) a dog", "The answer is B": the letter stands alone, or at the front with a mark after it.
_ALONE = r"\(?([{letters}])\)?[.:)]?"
_PATTERNS = (
    rf"^\W*{_ALONE}\s*$",
    r"^\W*\(?([{letters}])[.:)]\s*\S",
    rf"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*{_ALONE}(?=\W|$)",
)


def parse_letter(response: str, options: Sequence[str]) -> str | None:
    """Finds the letter of the option that an answer names.

    Args:
        response: What the model wrote.
        options: Texts of the options, the first one ``A``.

    Returns:
        The letter, also if the answer is an option's text and nothing more; None if no option, or more than one, is
        named: such an answer is wrong.
    """
    letters = string.ascii_uppercase[: len(options)]
    text = response.strip()
    for pattern in _PATTERNS:
        found = {match.group(1) for match in re.finditer(pattern.format(letters=letters), text)}
        if len(found) == 1:
            return found.pop()
    plain = text.rstrip(".").casefold()
    named = [
        letter
        for letter, option in zip(letters, options, strict=True)
        if option.casefold().rstrip(".") == plain
    ]
    return named[0] if len(named) == 1 else None
