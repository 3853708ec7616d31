"""Answers read as the benchmarks' scripts read them, by hand."""

import pytest

from storm_vlm.evaluation.benchmarks.extraction import (
    before_bracket,
    earliest_option,
    first_letter,
    first_word,
    inside_brackets,
)

OPTIONS = ("cup", "hat", "ball", "shoe")


@pytest.mark.parametrize(
    ("extract", "response", "letter"),
    [
        (first_letter, "C", "C"),
        (first_letter, "The best answer is: (D) shoe.", "D"),
        (first_letter, "E", None),
        (first_letter, "", None),
        (before_bracket, "B) hat", "B"),
        (before_bracket, " B ", "B"),
        (before_bracket, "B. hat", None),
        (before_bracket, "E) hat", None),
        (first_word, "B) hat", "B"),
        (first_word, "b", "B"),
        (first_word, "", None),
        (first_word, "hat", None),
        (inside_brackets, "(C) ball", "C"),
        (inside_brackets, "C: ball", "C"),
        (inside_brackets, "The answer is C", None),
        (inside_brackets, "", None),
        (earliest_option, "B. hat, not A", "B"),
        (earliest_option, "D or B", "B"),
        (earliest_option, "none", None),
    ],
)
def test_letter(extract, response, letter):
    assert extract(response, OPTIONS) == letter
