"""Questions about a script whose answer the script alone decides.

The options of a question are exchangeable: either they are all values of one quantity that was drawn uniformly, or all
are things drawn alike of which chance made one the answer. So a text alone never favours an option.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from storm_vlm.data.world.directing import LOOK_CHANGES, MAX_REPEATS, MOTIONS, NUM_QUARTERS, NUM_THINGS, WORDS
from storm_vlm.data.world.script import Appearance, Change, Script
from storm_vlm.data.world.things import load_things

Task = Literal["needle", "order", "count", "direction", "change", "where", "when", "text", "describe"]
TASKS: tuple[Task, ...] = ("needle", "order", "count", "direction", "change", "where", "when", "text")
OPEN_TASKS: tuple[Task, ...] = ("describe", "order", "change", "count", "direction", "text", "where")
LETTERS = "ABCD"
CORNERS = ("top left", "top right", "bottom left", "bottom right")
_LETTER_HINT = "Answer with the option's letter from the given choices directly."
_OPTION_HINT = "Answer with the text of the right option."
_SHORT_HINT = "Answer briefly."
# How a multiple-choice question is to be answered.
AnswerStyle = Literal["letter", "option"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its answer.

    Attributes:
        task: What it tests.
        form: With options, or without.
        prompt: The question, without options.
        options: Four texts, or none.
        answer: Letter of the right option, or the text of the answer.
        answer_style: Whether an option is named by its letter or by its text, which small language models can learn.
    """

    task: Task
    form: Literal["multiple_choice", "open"]
    prompt: str
    options: tuple[str, ...]
    answer: str
    answer_style: AnswerStyle = "letter"

    @property
    def reply(self) -> str:
        """What a right answer says."""
        if self.form == "open" or self.answer_style == "letter":
            return self.answer
        return self.options[LETTERS.index(self.answer)]

    @property
    def text(self) -> str:
        """The whole question as a model reads it."""
        if self.form == "open":
            return f"{self.prompt}\n{_SHORT_HINT}" if self.task != "describe" else self.prompt
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=True)]
        hint = _LETTER_HINT if self.answer_style == "letter" else _OPTION_HINT
        return "\n".join([self.prompt, *lines, hint])


@dataclass(frozen=True, slots=True)
class _Draft:
    """A question before its options have letters."""

    prompt: str
    answer: str
    distractors: tuple[str, ...]


def ask_about(
    script: Script,
    task: Task,
    rng: random.Random,
    *,
    names: Sequence[str],
    letter: str,
    answer_style: AnswerStyle = "letter",
) -> Question:
    """Asks a multiple-choice question.

    Args:
        script: The video's script.
        task: One of `TASKS`.
        rng: Source of chance.
        names: Names from which absent things are drawn.
        letter: Letter that the right option shall have.
        answer_style: See `Question`.

    Returns:
        The question.
    """
    draft = _ask_needle(script, rng, names) if task == "needle" else _ASK[task](script, rng)
    options = list(draft.distractors)
    rng.shuffle(options)
    options.insert(LETTERS.index(letter), draft.answer)
    return Question(task, "multiple_choice", draft.prompt, tuple(options), letter, answer_style)


def ask_open(script: Script, task: Task, rng: random.Random) -> Question:
    """Asks a question without options, of one of `OPEN_TASKS`."""
    draft = _describe(script) if task == "describe" else _ASK[task](script, rng)
    return Question(task, "open", draft.prompt, (), draft.answer)


def with_article(name: str) -> str:
    """Puts the article before a name of a thing; plural names take none."""
    if name in _PLURALS:
        return name
    return f"{'an' if name[0] in 'aeiou' and name not in _CONSONANT_SOUND else 'a'} {name}"


_PLURALS = {
    "grapes", "cherries", "peanuts", "pancakes", "fries", "glasses", "jeans", "gloves", "socks", "scissors", "books",
    "bacon", "bread", "sushi", "broccoli", "garlic", "popcorn", "corn", "cheese", "ping pong", "badminton", "bowling",
}  # fmt: skip
_CONSONANT_SOUND = {"unicorn"}


def _things_in_order(script: Script) -> list[str]:
    """Names by first appearance, each once."""
    return list(dict.fromkeys(appearance.thing for appearance in script.appearances))


def _appearing_once(script: Script) -> list[Appearance]:
    """Appearances of things that come once and do not change."""
    counts = Counter(appearance.thing for appearance in script.appearances)
    changing = {change.thing for change in script.changes}
    return [a for a in script.appearances if counts[a.thing] == 1 and a.thing not in changing]


def _others(script: Script, rng: random.Random, *without: str) -> tuple[str, ...]:
    """Draws three other things of the video."""
    return tuple(rng.sample([name for name in _things_in_order(script) if name not in without], 3))


def _ask_needle(script: Script, rng: random.Random, names: Sequence[str]) -> _Draft:
    if rng.random() < 1 / 2:
        text = rng.choice(script.texts)
        shown = next(a for a in script.appearances if a.start_seconds <= text.start_seconds < a.end_seconds)
        prompt = f'Which thing is visible while the word "{text.word.upper()}" is on the screen?'
        return _Draft(prompt, shown.thing, _others(script, rng, shown.thing))
    things = load_things()
    absent = [name for name in names if name not in script.seen_names]
    answer = rng.choice(_things_in_order(script))
    if script.difficulty == "hard":
        similar = [name for name in absent if things[name].group == things[answer].group]
        absent = similar if len(similar) >= len(LETTERS) - 1 else absent
    return _Draft("Which of these things appears in the video?", answer, tuple(rng.sample(absent, 3)))


def _ask_order(script: Script, rng: random.Random) -> _Draft:
    names = _things_in_order(script)
    pairs = zip(script.appearances, script.appearances[1:], strict=False)
    once = {appearance.thing for appearance in _appearing_once(script)}
    followed = [(first.thing, second.thing) for first, second in pairs if first.thing in once]
    kind = rng.choice(
        ("first", "last", "after") if len(names) > len(LETTERS) and followed else ("first", "last")
    )
    if kind == "after":
        before, answer = rng.choice(followed)
        prompt = f"Which thing do you see next after the {before}?"
        return _Draft(prompt, answer, _others(script, rng, before, answer))
    answer = script.appearances[0 if kind == "first" else -1].thing
    return _Draft(f"Which of the things appears {kind} in the video?", answer, _others(script, rng, answer))


def _ask_count(script: Script, rng: random.Random) -> _Draft:
    is_clear = not any(change.into for change in script.changes)
    if script.difficulty != "easy" and is_clear and rng.random() < 1 / 2:
        answer = len(_things_in_order(script))
        choices: Sequence[int] = NUM_THINGS
        prompt = "How many different things appear in the video?"
    else:
        changing = {change.thing for change in script.changes}
        counts = Counter(a.thing for a in script.appearances if a.thing not in changing)
        answer = max(counts.values())
        name = rng.choice([name for name, count in counts.items() if count == answer])
        choices = range(1, MAX_REPEATS + 1)
        prompt = f"How many separate times do you see the {name}?"
    return _Draft(prompt, str(answer), tuple(str(choice) for choice in choices if choice != answer))


def _ask_direction(script: Script, rng: random.Random) -> _Draft:
    moving = rng.choice([a for a in _appearing_once(script) if a.motion != "still"])
    distractors = tuple(motion for motion in MOTIONS if motion != moving.motion)
    return _Draft(f"In which direction do you see the {moving.thing} move?", moving.motion, distractors)


def _ask_change(script: Script, rng: random.Random) -> _Draft:
    change = rng.choice(script.changes)
    if change.into:
        return _Draft(
            f"What do you see the {change.thing} turn into?", change.into, _others(script, rng, change.thing)
        )
    distractors = tuple(_look(kind) for kind in LOOK_CHANGES if kind != change.kind)
    return _Draft(f"What happens to the {change.thing}?", _look(change.kind), distractors)


def _look(kind: str) -> str:
    return f"it becomes {kind}" if kind in ("larger", "smaller") else f"it turns {kind}"


def _ask_where(script: Script, rng: random.Random) -> _Draft:
    staying = rng.choice([a for a in _appearing_once(script) if a.motion == "still"])
    answer = _corner(staying)
    prompt = f"In which part of the picture do you see the {staying.thing}?"
    return _Draft(prompt, answer, tuple(corner for corner in CORNERS if corner != answer))


def _corner(appearance: Appearance) -> str:
    place = appearance.path[0]
    return f"{'top' if place.y < 1 / 2 else 'bottom'} {'left' if place.x < 1 / 2 else 'right'}"


def _ask_when(script: Script, rng: random.Random) -> _Draft:
    quarter_seconds = script.duration_seconds / NUM_QUARTERS
    quarters: dict[int, list[str]] = {}
    for appearance in _appearing_once(script):
        quarters.setdefault(int(appearance.start_seconds / quarter_seconds), []).append(appearance.thing)
    quarter = rng.choice(sorted(quarters))
    spans = [
        _span(number * quarter_seconds, (number + 1) * quarter_seconds) for number in range(NUM_QUARTERS)
    ]
    prompt = f"When do you see the {rng.choice(quarters[quarter])}?"
    return _Draft(prompt, spans[quarter], tuple(spans[:quarter] + spans[quarter + 1 :]))


def _span(start_seconds: float, end_seconds: float) -> str:
    return f"from {start_seconds:g} s to {end_seconds:g} s"


def _ask_text(script: Script, rng: random.Random) -> _Draft:
    words = [text.word for text in script.texts]
    absent = rng.sample([word for word in WORDS if word not in words], len(LETTERS) - len(words))
    if len(words) == 1:
        return _Draft("Which word is written on the screen?", words[0], tuple(absent))
    first = rng.random() < 1 / 2
    answer = words[0] if first else words[-1]
    prompt = f"Which word is written on the screen {'first' if first else 'last'}?"
    return _Draft(prompt, answer, tuple(word for word in (*words, *absent) if word != answer))


def _describe(script: Script) -> _Draft:
    sentences = []
    changes = {change.appearance: change for change in script.changes}
    for index, appearance in enumerate(script.appearances):
        opening = "First" if index == 0 else "Then"
        action = f"moves {appearance.motion}" if appearance.motion != "still" else "stays in place"
        if index in changes:
            action = _told_change(changes[index])
        sentences.append(f"{opening} {with_article(appearance.thing)}: it {action}.")
    words = " and ".join(f'"{text.word.upper()}"' for text in script.texts)
    sentences.append(f"The screen shows {words}.")
    return _Draft("Describe what happens in the video.", " ".join(sentences), ())


def _told_change(change: Change) -> str:
    into = (
        f"turns into {with_article(change.into)}" if change.into else _look(change.kind).removeprefix("it ")
    )
    return f"stays in place and {into}"


_ASK: dict[Task, Callable[[Script, random.Random], _Draft]] = {
    "order": _ask_order,
    "count": _ask_count,
    "direction": _ask_direction,
    "change": _ask_change,
    "where": _ask_where,
    "when": _ask_when,
    "text": _ask_text,
}
