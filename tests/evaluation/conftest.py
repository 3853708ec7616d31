"""Runs a benchmark on a tiny model that answers as a test tells it to."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from storm_vlm.evaluation import BENCHMARKS, EvaluationReport, EvaluationSettings, LocalAnswerer, evaluate
from storm_vlm.pipeline import VideoQA
from tests.pipeline.conftest import clip, model_folder, video_qa  # noqa: F401 (fixtures)


@dataclass
class Run:
    """What a benchmark gave and how the model was asked."""

    report: EvaluationReport
    answers: dict[str, dict[str, Any]]
    folder: Path
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def table(self) -> str:
        return (self.folder / "report.md").read_text()


@pytest.fixture
def run_benchmark(video_qa, monkeypatch, tmp_path):  # noqa: F811 (the fixture)
    """Returns a function that asks a benchmark's questions; each response belongs to a part of a prompt."""

    def run(name: str, folder: Path, responses: dict[str, str], **settings: Any) -> Run:
        asked: dict[str, dict[str, Any]] = {}

        def ask_batch(self, prompts, **options):
            (prompt,) = prompts
            (part,) = [part for part in responses if part in prompt.question]
            assert part not in asked, "each question is asked once"
            surroundings = {name: getattr(prompt, name) for name in ("system", "captions", "answer_start")}
            asked[part] = {"prompt": prompt.question, "tokens": prompt.video, **surroundings, **options}
            return [responses[part]]

        monkeypatch.setattr(VideoQA, "ask_batch", ask_batch)
        benchmark, out = BENCHMARKS[name], tmp_path / f"out-{name}"
        report = evaluate(
            LocalAnswerer(video_qa),
            benchmark.questions(folder),
            out,
            model_name="tiny",
            benchmark=benchmark,
            data=folder,
            settings=EvaluationSettings(**settings),
        )
        lines = (out / "answers.jsonl").read_text().splitlines()
        answers = {answer["id"]: answer for answer in map(json.loads, lines)}
        return Run(report, answers, out, asked)

    return run


@pytest.fixture
def put_clip(clip):  # noqa: F811 (the fixture)
    """Returns a function that puts a real video of five seconds at a path."""

    def put(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip.read_bytes())
        return path

    return put


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def percent(score) -> float:
    return round(100 * score.value, 6)
