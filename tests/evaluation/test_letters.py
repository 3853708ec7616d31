"""Which option an answer names: an answer that names none, or several, names none."""

import pytest

from storm_vlm.evaluation import parse_letter

OPTIONS = ("a dog", "A cat", "two birds.", "none")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        (" C.\n", "C"),
        ("(D)", "D"),
        ("A) a dog", "A"),
        ("B. A cat", "B"),
        ("C: two birds", "C"),
        ("The answer is D.", "D"),
        ("Answer: (A)", "A"),
        ("The best option is B, because it purrs.", "B"),
        ("a cat", "B"),
        ("Two birds", "C"),
        ("", None),
        ("E", None),
        ("b", None),
        ("A dog and a cat", None),
        ("A or B", None),
        ("The answer is A. The answer is B.", None),
        ("Dogs are nice", None),
        ("I do not know", None),
    ],
)
def test_the_option_that_is_named(response, letter):
    assert parse_letter(response, OPTIONS) == letter


def test_there_are_as_many_letters_as_options():
    assert parse_letter("E", ("1", "2", "3", "4", "5")) == "E"
    assert parse_letter("D", ("yes", "no", "maybe")) is None


def test_two_options_with_one_text_name_none():
    assert parse_letter("one", ("one", "One", "two")) is None
