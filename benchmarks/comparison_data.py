"""What the models of `comparison.py` learn from: a small world, texts that tell of such videos, a tokenizer."""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from storm_vlm.data.world import Question, Script, WorldConfig, generate_dataset, make_sample, tell
from storm_vlm.storage import atomic_file

TRAIN, TEST = "train", "test_in_vocabulary"
IMAGE_SIZE = (64, 64)
SECONDS = 32
# Words on the screen cannot be read at this size. Descriptions only teach: no two that are right need the same words.
LEFT_OUT = {TRAIN: ("text",), TEST: ("text", "describe")}
QUESTIONS_PER_VIDEO = 7
QUESTIONS_KEPT = {TRAIN: 6, TEST: 5}
VOCABULARY = 1024
# Lines in which a text tells of a video, as finely as groups of frames do.
TOLD_LINES = (32, 16, 8, 8, 8)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{%- generation -%}{{ message.content + eos_token }}{%- endgeneration -%}"
    "{%- else -%}{{ '?' + message.content + ':' }}{%- endif -%}"
    "{%- endfor -%}"
)


def questions_file(out: Path, split: str) -> Path:
    """Returns the file of a split's questions that are asked."""
    return out / "world" / split / "questions.json"


def reading_file(out: Path) -> Path:
    """Returns the file of texts for the language model."""
    return out / "reading.json"


def reading_test_file(out: Path) -> Path:
    """Returns the file of texts about the test's videos, a question each."""
    return out / "reading_test.json"


def make_data(out: Path, num_videos: dict[str, int], num_names: int, num_texts: int) -> None:
    """Writes videos and questions, and texts about other videos of the same world, or what is missing of them.

    Args:
        out: Folder for all of it.
        num_videos: Of each split.
        num_names: Number of things.
        num_texts: Videos of which only texts tell.
    """
    config = WorldConfig(
        num_videos=num_videos,
        width=IMAGE_SIZE[1],
        height=IMAGE_SIZE[0],
        min_seconds=SECONDS,
        max_seconds=SECONDS,
        questions_per_video=0,
        open_per_video=QUESTIONS_PER_VIDEO,
        num_names=num_names,
        # Few things, each as long to be seen as a group of frames or longer.
        difficulties=("easy",),
    )
    generate_dataset(config, out / "world")
    for split in num_videos:
        _write(questions_file(out, split), list(_asked(out / "world" / split / "annotations.json", split)))
    first = num_videos[TRAIN]
    texts = (_text_record(config, index) for index in range(first, first + num_texts))
    if not reading_file(out).is_file():
        _write(reading_file(out), list(texts))
    tests = (record for index in range(num_videos[TEST]) for record in _text_tests(config, index))
    _write(reading_test_file(out), list(tests))


def _asked(annotations: Path, split: str) -> Iterator[dict[str, Any]]:
    for record in json.loads(annotations.read_text(encoding="utf-8")):
        if record["task"] not in LEFT_OUT[split]:
            answer = record["conversations"][-1]
            answer["value"] = _without_screen(answer["value"])
            yield record


def _without_screen(answer: str) -> str:
    return answer.partition(" The screen shows")[0]


def _text_record(config: WorldConfig, index: int) -> dict[str, Any]:
    """Tells of a video in words, and asks about it: a description alone, or after other questions."""
    script, asked = make_sample(config, TRAIN, index)
    rng = random.Random(index)
    questions = [question for question in asked if question.task not in LEFT_OUT[TRAIN]]
    rng.shuffle(questions)
    if questions[0].task == "describe":
        questions = questions[:1]
    questions.sort(key=lambda question: question.task == "describe")
    turns = _turns_after(_told(script, rng), questions)
    return {"id": index, "conversations": turns}


def _text_tests(config: WorldConfig, index: int) -> Iterator[dict[str, Any]]:
    """Tells of a video of the test in words, once for each of its questions."""
    script, asked = make_sample(config, TEST, index)
    told = _told(script, random.Random(index))
    for question in asked:
        if question.task not in LEFT_OUT[TEST]:
            turns = _turns_after(told, [question])
            yield {"id": f"{index} {question.task}", "task": question.task, "conversations": turns}


def _turns_after(told: str, questions: Iterable[Question]) -> list[dict[str, str]]:
    """Returns questions and answers in turn, the first after what is told."""
    turns = [
        turn
        for question in questions
        for turn in (
            {"from": "human", "value": question.text},
            {"from": "gpt", "value": _without_screen(question.answer)},
        )
    ]
    turns[0]["value"] = f"{told}\n{turns[0]['value']}"
    return turns


def _told(script: Script, rng: random.Random) -> str:
    """Tells of a video line by line, as visual tokens do group by group: of each thing and what it does, in order."""
    line_seconds = SECONDS // rng.choice(TOLD_LINES)
    lines = []
    for start in range(0, SECONDS, line_seconds):
        moments = [second + 0.5 for second in range(start, start + line_seconds)]
        lines.append("".join(dict.fromkeys("".join(words_at(script, [moment])) for moment in moments)))
    return "\n".join(lines)


def words_at(script: Script, moments_seconds: Iterable[float]) -> list[str]:
    """Returns the words of `tell` for several moments, each once, without those that are written on the screen.

    Each begins with a space, as within a sentence.
    """
    told = [tell(script, seconds) for seconds in moments_seconds]
    words = (f" {word}" for moment in told for kind, word in moment.items() if kind != "word")
    return list(dict.fromkeys(words))


def make_tokenizer(out: Path) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on what training says: short answers are few tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    records = json.loads(questions_file(out, TRAIN).read_text(encoding="utf-8"))
    texts = (turn["value"] for record in records for turn in record["conversations"])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", chat_template=CHAT_TEMPLATE
    )


def _write(file: Path, records: list[dict[str, Any]]) -> None:
    with atomic_file(file) as path:
        path.write_text(json.dumps(records) + "\n", encoding="utf-8")
