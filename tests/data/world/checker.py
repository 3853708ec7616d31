"""Recomputes answers from the JSON of a script, by the words of the question alone."""

import re
from itertools import pairwise


def answers(script, prompt, options):  # noqa: C901 (one branch for each kind of question)
    """Returns all options that the script makes right."""
    shown = script["appearances"]
    names = [a["thing"] for a in shown]
    into = [c["into"] for c in script["changes"] if c["into"]]
    words = [t["word"] for t in sorted(script["texts"], key=lambda t: t["start_seconds"])]

    def only(name):
        (appearance,) = [a for a in shown if a["thing"] == name]
        return appearance

    if prompt == "Which of these things appears in the video?":
        return [o for o in options if o in names or o in into]
    if match := re.fullmatch(r'Which thing is visible while the word "(\w+)" is on the screen\?', prompt):
        (text,) = [t for t in script["texts"] if t["word"].upper() == match[1]]
        return sorted({
            a["thing"]
            for a in shown
            if a["start_seconds"] < text["end_seconds"] and a["end_seconds"] > text["start_seconds"]
        })  # fmt: skip
    if prompt == "Which of the things appears first in the video?":
        return [min(options, key=lambda o: min(a["start_seconds"] for a in shown if a["thing"] == o))]
    if prompt == "Which of the things appears last in the video?":
        return [max(options, key=lambda o: max(a["start_seconds"] for a in shown if a["thing"] == o))]
    if match := re.fullmatch(r"Which thing do you see next after the (.+)\?", prompt):
        assert names.count(match[1]) == 1
        assert match[1] not in options
        return [after for before, after in pairwise(names) if before == match[1]]
    if prompt == "How many different things appear in the video?":
        return [str(len({*names, *into}))]
    if match := re.fullmatch(r"How many separate times do you see the (.+)\?", prompt):
        assert match[1] not in into
        return [str(names.count(match[1]))]
    if match := re.fullmatch(r"In which direction do you see the (.+) move\?", prompt):
        first, last = only(match[1])["path"]
        across, along = last["x"] - first["x"], last["y"] - first["y"]
        assert max(abs(across), abs(along)) > 0.3
        assert min(abs(across), abs(along)) == 0
        return [("right" if across > 0 else "left") if across else ("down" if along > 0 else "up")]
    if match := re.fullmatch(r"What do you see the (.+) turn into\?", prompt):
        return [c["into"] for c in script["changes"] if c["thing"] == match[1]]
    if match := re.fullmatch(r"What happens to the (.+)\?", prompt):
        (kind,) = [c["kind"] for c in script["changes"] if c["thing"] == match[1]]
        return [o for o in (f"it becomes {kind}", f"it turns {kind}") if o in options or not options]
    if match := re.fullmatch(r"In which part of the picture do you see the (.+)\?", prompt):
        places = {
            ("top" if p["y"] < 0.4 else "bottom" if p["y"] > 0.6 else "middle")
            + (" left" if p["x"] < 0.4 else " right" if p["x"] > 0.6 else " middle")
            for p in only(match[1])["path"]
        }
        return sorted(places)
    if match := re.fullmatch(r"When do you see the (.+)\?", prompt):
        appearance = only(match[1])
        spans = {o: [float(x) for x in re.findall(r"[\d.]+", o)] for o in options}
        return [
            o
            for o, (a, b) in spans.items()
            if a < appearance["end_seconds"] and b > appearance["start_seconds"]
        ]
    if prompt == "Which word is written on the screen?":
        assert len(words) == 1
        return words
    if match := re.fullmatch(r"Which word is written on the screen (first|last)\?", prompt):
        return [words[0 if match[1] == "first" else -1]]
    raise AssertionError(f"unknown question: {prompt}")
