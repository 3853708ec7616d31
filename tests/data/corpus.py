"""Small data sets of real files in the published formats: what the tests of data and training share."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from tests.model.tiny import make_image
from tests.video.clips import write_clip

QUESTIONS = [("which?", "A"), ("what is it, then?", "a dog, and a long answer"), ("how many?", "3")]
QUESTION, ANSWERS = "which?", ("A", "the second", "C", "a fourth one")


def write_media(folder: Path, num_clips: int = 4, num_images: int = 2) -> None:
    """Writes ``0.mp4``, ... of 10 and more frames, and ``0.png``, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_clips):
        write_clip(folder / f"{i}.mp4", num_frames=10 + i, fps=10, size=(48, 64))
    for i in range(num_images):
        Image.fromarray(make_image(i)).save(folder / f"{i}.png")


def llava(name: str, question: str, answer: str, **files: Any) -> dict[str, Any]:
    """Returns one record of LLaVA's format."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **files, "conversations": turns}


def write_corpus(folder: Path) -> Path:
    """Writes ten records, of videos, pictures, both and text, and returns their file."""
    write_media(folder)
    records = [llava(f"v{i}", f"<video>\n{QUESTION}", ANSWERS[i], video=f"{i}.mp4") for i in range(4)]
    records += [
        llava(f"i{i}", f"<image>\n{QUESTION} {'x' * 20 * i}", ANSWERS[i], image=f"{i}.png") for i in range(2)
    ]
    records += [llava(f"t{i}", "say it" + i * "!", "yes " * (i + 1)) for i in range(3)]
    records.append(llava("both", "<image>\n<video>\nsame?", "no", image="0.png", video="1.mp4"))
    return write_json(folder / "train.json", records)


def write_questions(folder: Path) -> Path:
    """Writes three questions about a video, one about another, two about a picture, and two texts."""
    records = [llava(f"v{i}", f"<video>\n{q}", a, video="0.mp4") for i, (q, a) in enumerate(QUESTIONS)]
    records.append(llava("w", "<video>\nwhich?", "B", video="1.mp4"))
    records += [llava(f"p{i}", f"<image>\n{q}", a, image="0.png") for i, (q, a) in enumerate(QUESTIONS[:2])]
    records += [llava(f"t{i}", "say it", "yes") for i in range(2)]
    return write_json(folder / "questions.json", records)


def write_json(path: Path, records: list[dict[str, Any]]) -> Path:
    """Writes records as a list, or a line each to a ``.jsonl`` file."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    return path
