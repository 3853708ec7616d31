"""LongVideoBench, LVBench and EgoSchema: groups of durations, subtitles between frames, public answers."""

import json

import pytest

from storm_vlm.errors import DataError
from storm_vlm.evaluation import BENCHMARKS
from tests.evaluation.conftest import percent, write_json

SUBTITLES = [
    {"start": "00:00:10.000", "end": "00:00:11.000", "line": "first words"},
    {"start": "00:00:12.300", "end": "00:00:12.400", "line": "short, made longer"},
    {"start": "00:01:00.000", "end": "00:01:02.000", "line": "after the video"},
]


def record(number, group, video, **changes):
    return {
        "id": f"q{number}", "video_id": "v", "video_path": video, "subtitle_path": "v_en.json",
        "question": f"What is no. {number}?", "candidates": ["a cup", "a hat", "a ball"], "correct_choice": 1,
        "question_category": "S2E", "duration": 5.0, "duration_group": group,
        "starting_timestamp_for_subtitles": 10, **changes,
    }  # fmt: skip


@pytest.fixture
def longvideobench(tmp_path, put_clip):
    folder = tmp_path / "lvb"
    records = [
        record(1, 15, "v.mp4"),
        record(2, 15, "v.mp4"),
        record(3, 3600, "v.mp4"),
        record(4, 3600, "gone.mp4"),
    ]
    write_json(folder / "lvb_val.json", records)
    write_json(folder / "subtitles/v_en.json", SUBTITLES)
    put_clip(folder / "videos/v.mp4")
    return folder


RESPONSES = {"no. 1?": "B", "no. 2?": "C. a ball", "no. 3?": "none of them"}


def test_longvideobench(longvideobench, run_benchmark):
    run = run_benchmark("longvideobench", longvideobench, RESPONSES)
    assert run.asked["no. 1?"]["prompt"] == (
        "Question: What is no. 1?\nA. a cup\nB. a hat\nC. a ball\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert run.asked["no. 1?"]["captions"] == ()
    assert percent(run.report.overall) == 25
    assert {split: percent(s["all"]) for split, s in run.report.accuracies.items()} == {
        "15 s": 50, "3600 s": 0, "all": 25,
    }  # fmt: skip
    assert run.report.num_unparseable == 1
    assert list(run.report.errors) == ["3600 s/gone.mp4"]


def test_subtitles_stand_between_the_frames_they_cover(longvideobench, run_benchmark):
    run = run_benchmark("longvideobench-subtitles", longvideobench, RESPONSES, num_frames=8)
    asked = run.asked["no. 1?"]
    # Frames each 0.625 s; the second subtitle lasts from 2.3 s to 2.4 s and is made a second long around 2.35 s.
    assert asked["captions"] == [(0.5, "first words"), (pytest.approx(2.35), "short, made longer")]
    assert asked["prompt"].startswith("Question: What is no. 1?")


def test_questions_about_a_video_follow_each_other_and_have_ids_of_their_own(longvideobench):
    videos = ["v.mp4", "w.mp4", "v.mp4"]
    write_json(longvideobench / "lvb_val.json", [record(i, 15, video) for i, video in enumerate(videos)])
    assert [q.identity for q in BENCHMARKS["longvideobench"].questions(longvideobench)] == ["q0", "q2", "q1"]
    write_json(longvideobench / "lvb_val.json", [record(1, 15, "v.mp4")] * 2)
    with pytest.raises(DataError, match="two questions with the id q1"):
        BENCHMARKS["longvideobench"].questions(longvideobench)


def test_a_broken_record_or_subtitle_file_is_named(longvideobench):
    write_json(longvideobench / "lvb_val.json", [record(1, 15, "v.mp4", correct_choice=3)])
    with pytest.raises(DataError, match=r"lvb_val.json: record 0: field 'correct_choice': .* 0 to 2, got 3"):
        BENCHMARKS["longvideobench"].questions(longvideobench)
    write_json(longvideobench / "lvb_val.json", [record(1, 15, "v.mp4")])
    write_json(longvideobench / "subtitles/v_en.json", [{"start": "00:00:01.0", "end": "00:00:02.0"}])
    with pytest.raises(DataError, match=r"v_en.json: a subtitle has no field 'line'"):
        BENCHMARKS["longvideobench-subtitles"].questions(longvideobench)


def test_lvbench(tmp_path, put_clip, run_benchmark):
    folder = tmp_path / "lvbench"

    def question(uid, kinds, answer):
        text = f"What is no. {uid}?\n(A) a cup\n(B) a hat\n(C) a ball\n(D) a shoe"
        return {
            "uid": uid,
            "question": text,
            "answer": answer,
            "question_type": kinds,
            "time_reference": "00:15",
        }

    videos = [
        {"key": "v", "type": "sport", "video_info": {}, "qa": [
            question("1", ["reasoning", "summarization"], "B"), question("2", ["reasoning"], "A"),
            question("3", ["temporal grounding"], "C"),
        ]},
        {"key": "gone", "type": "sport", "video_info": {}, "qa": [question("4", ["reasoning"], "A")]},
    ]  # fmt: skip
    put_clip(folder / "all_videos/v.mp4")
    file = folder / "video_info.meta.jsonl"
    file.write_text("\n".join(map(json.dumps, videos)))
    responses = {"no. 1?": "(B) a hat", "no. 2?": "B", "no. 3?": "It cannot be said"}
    run = run_benchmark("lvbench", folder, responses)
    assert run.asked["no. 1?"]["prompt"] == (
        "What is no. 1?\n(A) a cup\n(B) a hat\n(C) a ball\n(D) a shoe\nAnswer the question with the option letter."
    )
    scores = run.report.accuracies["test"]
    assert percent(run.report.overall) == percent(scores["all"]) == 25
    assert scores["all"].num_questions == 4, "a question of two capabilities counts once in the whole"
    assert percent(scores["summarization"]) == 100
    assert percent(scores["reasoning"]) == pytest.approx(100 / 3)
    assert (run.report.num_unparseable, list(run.report.errors)) == (1, ["test/gone.mp4"])
    del videos[0]["qa"][1]["answer"]
    file.write_text("\n".join(map(json.dumps, videos)))
    with pytest.raises(DataError, match=r"meta.jsonl: record 0, qa\[1\]: field 'answer': is missing"):
        BENCHMARKS["lvbench"].questions(folder)


def test_egoschema(tmp_path, put_clip, run_benchmark):
    folder = tmp_path / "egoschema"
    records = [
        {"q_uid": uid, "google_drive_id": "", "question": f"What does C do in {uid}?"}
        | {f"option {i}": f"C does {i}." for i in range(5)}
        for uid in ("u1", "u2", "u3", "u4", "hidden")
    ]
    write_json(folder / "questions.json", records)
    write_json(folder / "subset_answers.json", {"u1": 4, "u2": 0, "u3": 1, "u4": 1})
    for uid in ("u1", "u2", "u3"):
        put_clip(folder / f"videos/{uid}.mp4")
    run = run_benchmark("egoschema", folder, {"u1?": "C does 4.", "u2?": "B", "u3?": "perhaps A or B"})
    assert run.asked["u1?"]["prompt"] == (
        "What does C do in u1?\nA. C does 0.\nB. C does 1.\nC. C does 2.\nD. C does 3.\nE. C does 4.\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (percent(run.report.overall), run.report.overall.num_questions) == (25, 4)
    assert (run.report.num_unparseable, list(run.report.errors)) == (1, ["subset/u4.mp4"])
    write_json(folder / "subset_answers.json", {"u1": 5})
    with pytest.raises(
        DataError, match=r"subset_answers.json: field 'u1': expected a number from 0 to 4, got 5"
    ):
        BENCHMARKS["egoschema"].questions(folder)
