"""Video-MME and TimeScope: Parquet, subtitles of the frames shown, scores by length and kind."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storm_vlm.errors import DataError
from storm_vlm.evaluation import BENCHMARKS
from tests.evaluation.conftest import percent

OPTIONS = ["A. A cup.", "B. A hat.", "C. A ball.", "D. A shoe."]
SRT = """1
00:00:00,000 --> 00:00:00,500
<font color="white" size=".72c">at the start</font>

2
00:00:02,150 --> 00:00:02,160
<font color="white" size=".72c">between two frames</font>

3
00:00:04,000 --> 00:00:05,000
<font color="white" size=".72c">near</font>
<font color="white" size=".72c">the end</font>
"""


def record(number, duration, task, answer, video="v1"):
    return {
        "video_id": "001", "duration": duration, "domain": "Knowledge", "sub_category": "Law", "url": "",
        "videoID": video, "question_id": f"001-{number}", "task_type": task, "question": f"What is no. {number}?",
        "options": OPTIONS, "answer": answer,
    }  # fmt: skip


def write_parquet(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path)


@pytest.fixture
def videomme(tmp_path, put_clip):
    records = [
        record(1, "short", "OCR Problems", "C"),
        record(2, "short", "OCR Problems", "B"),
        record(3, "long", "Counting Problem", "A", "v2"),
        record(4, "long", "OCR Problems", "A", "gone"),
    ]
    write_parquet(tmp_path / "mme/videomme/test-00000-of-00001.parquet", records)
    for video in ("v1", "v2"):
        put_clip(tmp_path / f"mme/data/{video}.mp4")
    (tmp_path / "mme/subtitle").mkdir()
    (tmp_path / "mme/subtitle/v1.srt").write_text(SRT)
    return tmp_path / "mme"


RESPONSES = {"no. 1?": "The best answer is C.", "no. 2?": "A", "no. 3?": "no idea"}


def test_scores_by_length_and_task(videomme, run_benchmark):
    run = run_benchmark("videomme", videomme, RESPONSES)
    assert run.asked["no. 1?"]["prompt"] == (
        "Select the best answer to the following multiple-choice question based on the video. "
        "Respond with only the letter (A, B, C, or D) of the correct option.\n"
        "What is no. 1?\nA. A cup.\nB. A hat.\nC. A ball.\nD. A shoe.\nThe best answer is:"
    )
    report = run.report
    assert percent(report.overall) == 25
    assert {split: percent(scores["all"]) for split, scores in report.accuracies.items()} == {
        "short": 50, "long": 0, "all": 25,
    }  # fmt: skip
    assert percent(report.accuracies["all"]["OCR Problems"]) == pytest.approx(100 / 3)
    assert report.num_unparseable == 1
    assert list(report.errors) == ["long/gone.mp4"]
    assert [run.answers[f"001-{i}"]["chosen"] for i in (1, 2, 3, 4)] == ["C", "A", None, None]


def test_the_report_says_how_it_was_made(videomme, run_benchmark):
    run = run_benchmark("videomme", videomme, RESPONSES)
    assert "Overall, mean over questions: 25.0 (" in run.table
    assert "long/gone.mp4: " in run.table
    assert "Annotations: videomme/test-*.parquet (sha256 " in run.table
    assert "Prompt: README of Video-MME" in run.table
    assert "Scoring: First of A to D" in run.table
    assert run.report.to_dict()["about"]["benchmark"] == "videomme"


def test_subtitles_are_those_of_the_frames(videomme, run_benchmark):
    run = run_benchmark("videomme-subtitles", videomme, RESPONSES, num_frames=8)
    first = run.asked["no. 1?"]["prompt"]
    assert first.startswith(
        "This video's subtitles are listed below:\nat the start\nnear the end\n"
        "Select the best answer to the following multiple-choice question based on the video. "
    )
    third = run.asked["no. 3?"]["prompt"]
    assert third.startswith("This video's subtitles are listed below:\nNo subtitles available\nSelect ")


def test_missing_subtitles_and_broken_files_are_named(videomme):
    (videomme / "subtitle/v1.srt").unlink()
    (videomme / "subtitle").rmdir()
    with pytest.raises(DataError, match=r"subtitle: no such folder.*--task videomme"):
        BENCHMARKS["videomme-subtitles"].questions(videomme)
    file = videomme / "videomme/test-00000-of-00001.parquet"
    write_parquet(file, [record(1, "short", "OCR Problems", "E")])
    with pytest.raises(
        DataError, match=r"parquet: record 0: field 'answer': expected a letter of ABCD, got 'E'"
    ):
        BENCHMARKS["videomme"].questions(videomme)
    file.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        BENCHMARKS["videomme"].questions(videomme)
    file.unlink()
    with pytest.raises(DataError, match="expected one file videomme/test-"):
        BENCHMARKS["videomme"].questions(videomme)


def test_timescope(tmp_path, put_clip, run_benchmark):
    records = [
        {
            "id": number, "video": f"videos/{video}.mp4", "length": length, "type": kind, "answer": answer,
            "input": f"Question: What is no. {number}?\nA: x\nB: y\nC: z\nD: a\nE: b\nF: c",
        }
        for number, video, length, kind, answer in [
            (1, "v1", 60, "QA", "F"), (2, "v1", 60, "OCR", "A"), (3, "v1", 120, "QA", "B"), (4, "gone", 120, "QA", "B"),
        ]
    ]  # fmt: skip
    write_parquet(tmp_path / "ts/data/test-00000-of-00001.parquet", records)
    put_clip(tmp_path / "ts/videos/v1.mp4")
    run = run_benchmark("timescope", tmp_path / "ts", {"no. 1?": "F", "no. 2?": "B", "no. 3?": "who knows"})
    assert run.asked["no. 1?"]["prompt"] == records[0]["input"]
    assert percent(run.report.overall) == 25
    assert {split: percent(s["all"]) for split, s in run.report.accuracies.items()} == {
        "60": 50,
        "120": 0,
        "all": 25,
    }
    assert run.report.num_unparseable == 1
    del records[0]["input"]
    write_parquet(tmp_path / "ts/data/test-00000-of-00001.parquet", records[:1])
    with pytest.raises(DataError, match=r"test-00000-of-00001.parquet: record 0: field 'input': is missing"):
        BENCHMARKS["timescope"].questions(tmp_path / "ts")
