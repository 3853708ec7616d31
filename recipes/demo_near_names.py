"""Asks about the demo's videos under true names, and again under names that mean something near.

    python recipes/demo_near_names.py --worlds recipes/data/world-new-3 recipes/data/world-other-3 recipes/data/world-styles-3

A projector has words for the things that it was trained on, and says of all others what they are like. A language model
that has only ever found the very word of an option in a video learns to look for nothing else, and of what other names
stand for in training videos it learns one by one. So each new question has names drawn for it alone: what the
projector calls "octopus" is asked for as "lobster" once and as "shell" another time, beside options that mean something
farther off. How near two names are, the hidden states of the language model say, before any training. Names of unseen
things are not among them.

It writes ``train/near_names.json`` beside the ``annotations.json`` of a world: all its records, and eight new ones a video. It needs
`storm setup-demo`.
"""

import argparse
import dataclasses
import json
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from storm_vlm.data.world import Script
from storm_vlm.data.world.questions import LETTERS, Task, ask_about
from storm_vlm.data.world.things import vocabulary
from storm_vlm.errors import StormError
from storm_vlm.model.default_model import compose_default_parts
from storm_vlm.storage import atomic_file

TASKS: tuple[Task, ...] = ("needle", "needle", "order", "count", "direction", "change", "where", "when")
# Early among the language model's 30 layers: later ones turn to the next word.
LAYER = 8
# Ranks are drawn up to this, their logarithm uniformly: mostly near names, some that are hardly so.
FARTHEST = 150

Near = Mapping[str, Sequence[str]]


@torch.no_grad()
def rank_names(names: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Near:
    """Returns for each name the others, the nearest first: by the cosine of their mean hidden states."""
    states = []
    for name in track(names, "names"):
        token_ids = tokenizer(f"A {name} is a kind of", add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        hidden = model(input_ids=token_ids, output_hidden_states=True).hidden_states[LAYER]
        states.append(hidden[0, 1:].float().mean(0))
    scaled = torch.stack(states)
    scaled = (scaled - scaled.mean(0)) / scaled.std(0)
    scaled = torch.nn.functional.normalize(scaled, dim=-1)
    ranks = (scaled @ scaled.T).argsort(dim=-1, descending=True)
    return {name: [names[i] for i in ranks[k] if i != k] for k, name in enumerate(names)}


def draw_names(script: Script, near: Near, rng: random.Random) -> dict[str, str]:
    """Draws a near name for each thing of a video, no two the same and none of them a true one."""
    drawn: dict[str, str] = {}
    for thing in sorted(script.seen_names):
        free = [name for name in near[thing] if name not in script.seen_names and name not in drawn.values()]
        drawn[thing] = free[int(math.exp(rng.uniform(0, math.log(FARTHEST)))) - 1]
    return drawn


def rename(script: Script, names: Mapping[str, str]) -> Script:
    """Returns the script with other names of its things."""
    return dataclasses.replace(
        script,
        appearances=tuple(dataclasses.replace(a, thing=names[a.thing]) for a in script.appearances),
        changes=tuple(
            dataclasses.replace(c, thing=names[c.thing], into=names[c.into] if c.into else None)
            for c in script.changes
        ),
    )


def new_records(video: str, script: Script, near: Near, rng: random.Random) -> list[dict[str, Any]]:
    """Asks about a video under new names, drawn for each question."""
    records = []
    # True names would be right options, too.
    names = [name for name in near if name not in script.seen_names]
    for number, task in enumerate(TASKS):
        renamed = rename(script, draw_names(script, near, rng))
        question = ask_about(
            renamed, task, rng, names=names, letter=rng.choice(LETTERS), answer_style="option"
        )
        turns = [
            {"from": "human", "value": f"<video>\n{question.text}"},
            {"from": "gpt", "value": question.reply},
        ]
        records.append(
            {"id": f"near-{Path(video).stem}-{number}", "video": video, "conversations": turns, "task": task}
        )
    return records


def write_records(folder: Path, near: Near) -> None:
    """Writes the records of a training split and the new ones, each video's together."""
    records = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
    by_video = defaultdict(list)
    for record in records:
        by_video[record["video"]].append(record)
    rng = random.Random(folder.parent.name)  # noqa: S311 (no secret is drawn)
    for video, asked in track(by_video.items(), folder.parent.name):
        path = folder / "scripts" / f"{Path(video).stem}.json"
        script = Script.from_dict(json.loads(path.read_text(encoding="utf-8")))
        asked += new_records(video, script, near, rng)
    text = json.dumps([record for asked in by_video.values() for record in asked], indent=1)
    with atomic_file(folder / "near_names.json") as path:
        path.write_text(f"{text}\n", encoding="utf-8")


def main() -> None:
    """Writes the new records of each world."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--worlds", type=Path, nargs="+", required=True, help="folders with videos for training"
    )
    worlds = parser.parse_args().worlds
    if missing := [world for world in worlds if not (world / "train" / "annotations.json").is_file()]:
        parser.error(f"{missing[0]}: expected a world with train/annotations.json")
    try:
        model, processor = compose_default_parts()
    except StormError as error:
        parser.error(str(error))
    names = [thing.name for thing in (*vocabulary("usual"), *vocabulary("other"))]
    near = rank_names(names, model.language_model.float(), processor.tokenizer)
    for world in worlds:
        try:
            write_records(world / "train", near)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{world}: expected the files of a world, found {error!r}")


if __name__ == "__main__":
    main()
