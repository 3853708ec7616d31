"""How the benchmarks' own scripts read an answer. Each returns a letter, or None where the answer is then wrong.

The scripts that draw a random letter, or accept an empty answer, do not do so here.
"""

import re
import string
from collections.abc import Sequence

_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)


def first_letter(response: str, options: Sequence[str]) -> str | None:
    """Takes the first capital letter of an option that stands anywhere after the usual phrases are taken out.

    Args:
        response: What the model wrote.
        options: Texts of the options.

    Returns:
        The letter.

    Source:
        ``extract_characters_regex`` of lmms-eval, tasks/videomme/utils.py and tasks/timescope/utils.py, which follow
        Video-MME's evaluation script; tasks/longvideobench/utils.py, without its random letter.
    """
    for prefix in _PREFIXES:
        response = response.replace(prefix, "")
    found = re.search(f"[{_letters(options)}]", response)
    return found[0] if found else None


def before_bracket(response: str, options: Sequence[str]) -> str | None:
    """Takes what stands before the first ``)``, if that is a letter and no more: answers begin with ``(`` already.

    Args:
        response: What the model wrote.
        options: Texts of the options.

    Returns:
        The letter.

    Source:
        ``check_ans`` of MLVU, videochat2/choice_bench.py; white space is dropped as in Evaluation_Test/test_bench.py.
    """
    return _known(response.split(")")[0].strip(), options)


def first_word(response: str, options: Sequence[str]) -> str | None:
    """Takes the option whose ``(a)`` contains the answer's first word or is contained in it; case does not matter.

    Args:
        response: What the model wrote after ``(``.
        options: Texts of the options.

    Returns:
        The letter; None if several fit, as for an empty answer, which the script would call right.

    Source:
        ``check_ans`` of MVBench, Ask-Anything video_chat2/mvbench.ipynb.
    """
    line = "(" + response.strip().split("\n")[0]
    word = line.lower().split(" ")[0]
    fitting = [
        letter
        for letter in _letters(options)
        if word.replace(".", "") in f"({letter.lower()})" or f"({letter.lower()})" in word
    ]
    return fitting[0] if len(fitting) == 1 else None


def inside_brackets(response: str, options: Sequence[str]) -> str | None:
    """Takes the first character of what stands before the first ``)`` and, if there is one, after the ``(``.

    Args:
        response: What the model wrote.
        options: Texts of the options.

    Returns:
        The letter.

    Source:
        ``polish_answer`` of LVBench, lvbench/utils/answer_util.py.
    """
    answer = response.strip().split(")")[0].strip()
    if "(" in answer:
        answer = answer.split("(")[1].strip()
    return _known(answer[:1], options)


def earliest_option(response: str, options: Sequence[str]) -> str | None:
    """Takes the earliest letter of the alphabet that occurs before the first period.

    Args:
        response: What the model wrote.
        options: Texts of the options.

    Returns:
        The letter.

    Source:
        VideoNIAH, evaluation/eval.py.
    """
    start = response.split(".")[0]
    return next((letter for letter in _letters(options) if letter in start), None)


def _letters(options: Sequence[str]) -> str:
    return string.ascii_uppercase[: len(options)]


def _known(letter: str, options: Sequence[str]) -> str | None:
    return letter if len(letter) == 1 and letter in _letters(options) else None
