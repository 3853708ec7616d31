"""Whole evaluations on a tiny model and real files: answers, resumption, missing videos, scores."""

import json
from dataclasses import replace

import pytest

from storm_vlm.errors import DataError
from storm_vlm.evaluation import (
    Benchmark,
    EvaluationSettings,
    LocalAnswerer,
    MultipleChoiceQuestion,
    evaluate,
    summarise,
)
from storm_vlm.pipeline import VideoQA
from tests.pipeline.conftest import clip, model_folder, video_qa  # noqa: F401 (fixtures)


class CutError(Exception):
    """Stands for a run that is cut."""


@pytest.fixture
def questions(clip):  # noqa: F811 (the fixture)
    missing = clip.with_name("missing.mp4")
    return [
        MultipleChoiceQuestion(f"q{i}", video, "dev", task, f"Which? {i}", ("x", "y"), "A")
        for i, (video, task) in enumerate([(clip, "one"), (clip, "two"), (missing, "one"), (clip, "one")])
    ]


@pytest.fixture
def says(monkeypatch):
    """Makes the model write what it is told to, and keeps what it was asked."""
    asked = []

    def answer_with(text):
        def ask_batch(self, prompts, **options):
            asked.extend((prompt.question, prompt.video, options) for prompt in prompts)
            return [text] * len(prompts)

        monkeypatch.setattr(VideoQA, "ask_batch", ask_batch)
        return asked

    return answer_with


def read_answers(out):
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def test_scores_are_those_of_the_answers(video_qa, questions, says, tmp_path):  # noqa: F811
    asked = says("(A)")
    report = evaluate(LocalAnswerer(video_qa), questions, tmp_path / "out", model_name="tiny")
    assert [prompt for prompt, _, _ in asked] == ["Which? 0", "Which? 1", "Which? 3"]
    assert len({id(tokens) for _, tokens, _ in asked[:2]}) == 1, "one video is encoded once"
    scores = report.accuracies["dev"]
    assert {task: (score.num_questions, score.value) for task, score in scores.items()} == {
        "one": (3, 2 / 3), "two": (1, 1.0), "all": (4, 3 / 4),
    }  # fmt: skip
    assert list(report.errors) == ["dev/missing.mp4"]
    assert report.num_unparseable == 0
    answers = read_answers(tmp_path / "out")
    assert [answer["chosen"] for answer in answers] == ["A", "A", None, "A"]
    assert "missing.mp4" in answers[2]["error"]
    assert json.loads((tmp_path / "out/report.json").read_text())["accuracies"]["dev"]["all"]["value"] == 0.75
    table = (tmp_path / "out/report.md").read_text()
    assert "| all | 75.0 (" in table
    assert "Videos not read: 1" in table


def test_answers_that_are_wrong_or_name_no_option_score_nothing(video_qa, questions, says, tmp_path):  # noqa: F811
    for text, count in (("B", 0), ("perhaps", 3)):
        says(text)
        report = evaluate(LocalAnswerer(video_qa), questions, tmp_path / text, model_name="tiny")
        assert report.accuracies["dev"]["all"].value == 0
        assert report.num_unparseable == count


def test_a_cut_run_goes_on_to_the_same_answers(video_qa, questions, tmp_path):  # noqa: F811
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    evaluate(LocalAnswerer(video_qa), questions, whole, model_name="tiny")

    def stop(part, done, total):
        if done == 2:
            raise CutError

    with pytest.raises(CutError):
        evaluate(LocalAnswerer(video_qa), questions, cut, model_name="tiny", report_progress=stop)
    with (cut / "answers.jsonl").open("a") as file:
        file.write('{"id": "q2", "vid')  # what a kill leaves
    evaluate(LocalAnswerer(video_qa), questions, cut, model_name="tiny")
    for name in ("answers.jsonl", "report.json", "report.md"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_answers_of_other_settings_are_left_alone(video_qa, questions, says, tmp_path):  # noqa: F811
    says("A")
    out = tmp_path / "out"
    evaluate(LocalAnswerer(video_qa), questions, out, model_name="tiny")
    before = (out / "answers.jsonl").read_bytes()
    with pytest.raises(DataError, match="another num_frames"):
        evaluate(
            LocalAnswerer(video_qa),
            questions,
            out,
            model_name="tiny",
            settings=EvaluationSettings(num_frames=4),
        )
    with pytest.raises(DataError, match="q3, which is not asked"):
        evaluate(LocalAnswerer(video_qa), questions[:3], out, model_name="tiny")
    assert (out / "answers.jsonl").read_bytes() == before


def test_a_folder_that_cannot_be_used_is_an_error(video_qa, questions, says, tmp_path):  # noqa: F811
    says("A")

    def evaluate_into(out):
        evaluate(LocalAnswerer(video_qa), questions, out, model_name="tiny")

    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    for content in ("", "3", "[1]"):
        (tmp_path / "broken/settings.json").write_text(content)
        for out in (tmp_path / "file", tmp_path / "broken"):
            with pytest.raises(DataError, match=rf"{out} cannot hold the answers .*: choose another folder"):
                evaluate_into(out)
    evaluate_into(tmp_path / "out")
    for line in ("{", "[]", "{}"):
        (tmp_path / "out/answers.jsonl").write_text(f"{line}\n")
        with pytest.raises(DataError, match="holds a broken answer"):
            evaluate_into(tmp_path / "out")


def test_settings_reach_the_video(video_qa, questions, says, tmp_path):  # noqa: F811
    asked = says("A")
    settings = EvaluationSettings(num_frames=8, temporal_pool=4, temporal_sample=2, max_new_tokens=3)
    evaluate(LocalAnswerer(video_qa), questions[:1], tmp_path / "some", model_name="tiny", settings=settings)
    ((_, tokens, options),) = asked
    assert tokens.patch_grid[0] == 8
    assert tokens.compression.temporal_sample == 2
    assert options["max_new_tokens"] == 3
    asked.clear()
    blind = replace(settings, text_only=True)
    evaluate(LocalAnswerer(video_qa), questions, tmp_path / "blind", model_name="tiny", settings=blind)
    assert [tokens for _, tokens, _ in asked] == [None] * 4


def test_the_likeliest_option_is_chosen(video_qa, questions, tmp_path, monkeypatch):  # noqa: F811
    """Letters, which a text may follow, or the texts of the options, which end; a missing video stays wrong."""
    asked = []

    def score_answers(self, prompt, answers, *, with_end):
        asked.append((prompt.question, prompt.video is None, answers, with_end))
        return [-9.0 if answer in ("B", "why") else -10.0 for answer in answers]

    monkeypatch.setattr(VideoQA, "score_answers", score_answers)
    monkeypatch.setattr(VideoQA, "ask_batch", None)
    questions[0] = replace(questions[0], options=("why", "ex"), answers=("why", "ex"))
    settings = EvaluationSettings(likelihood=True)
    out = tmp_path / "out"
    report = evaluate(LocalAnswerer(video_qa), questions, out, model_name="tiny", settings=settings)
    assert asked == [
        ("Which? 0", False, ("why", "ex"), True),
        ("Which? 1", False, ("A", "B"), False),
        ("Which? 3", False, ("A", "B"), False),
    ]
    answers = read_answers(out)
    assert [(answer["response"], answer["chosen"], answer["is_right"]) for answer in answers] == [
        ("why", "A", True), ("B", "B", False), ("", None, False), ("B", "B", False),
    ]  # fmt: skip
    assert report.num_unparseable == 0
    assert list(report.errors) == ["dev/missing.mp4"]
    with pytest.raises(DataError, match="another likelihood"):
        evaluate(LocalAnswerer(video_qa), questions, out, model_name="tiny")


def test_intervals_resample_videos_and_not_questions():
    def interval(videos):
        answers = [
            {"split": "s", "task": "t", "video": video, "is_right": right, "chosen": "A", "error": None}
            for video, right in videos
        ]
        return summarise(answers, "m").accuracies["s"]["t"]

    alone = interval([(i, i % 2 == 0) for i in range(400)])
    # 400 fair coins: 0.5 within 1.96 x sqrt(0.25 / 400) = 0.049; in 40 videos of 10 equal answers, sqrt(10) times that.
    assert (alone.low, alone.high) == pytest.approx((0.451, 0.549), abs=0.006)
    together = interval([(i // 10, i // 10 % 2 == 0) for i in range(400)])
    assert together.high - together.low == pytest.approx(10**0.5 * (alone.high - alone.low), rel=0.1)


def test_a_mean_over_tasks_weighs_each_task_the_same():
    answers = [
        {"split": "s", "task": task, "video": i, "is_right": right, "chosen": "A", "error": None}
        for i, (task, right) in enumerate([("few", i % 2 == 0) for i in range(40)] + [("many", True)] * 400)
    ]
    score = summarise(answers, "m", mean_over="tasks").overall
    assert (score.num_questions, score.value) == (440, 0.75)
    # Half the interval of 40 fair coins: 1.96 x sqrt(0.25 / 40) / 2 = 0.077.
    assert (score.low, score.high) == pytest.approx((0.673, 0.827), abs=0.015)
    assert summarise(answers, "m").overall.value == pytest.approx(420 / 440)


def test_files_of_other_annotations_are_another_evaluation(video_qa, questions, says, tmp_path):  # noqa: F811
    says("A")
    (tmp_path / "q.json").write_text("1")
    benchmark = Benchmark("b", ("q.json",), lambda folder: questions, "as asked", "as scored")
    options = {"model_name": "tiny", "benchmark": benchmark, "data": tmp_path}
    report = evaluate(LocalAnswerer(video_qa), questions, tmp_path / "out", **options)
    assert list(report.about["annotations"]) == ["q.json"]
    (tmp_path / "q.json").write_text("2")
    with pytest.raises(DataError, match="another annotations"):
        evaluate(LocalAnswerer(video_qa), questions, tmp_path / "out", **options)
