"""MVBench, MLVU and VNBench: parts of videos, folders of pictures, means over tasks, circular tries."""

import pytest
from PIL import Image

from storm_vlm.errors import DataError
from storm_vlm.evaluation import BENCHMARKS
from storm_vlm.evaluation.benchmarks import mlvu, mvbench
from tests.evaluation.conftest import percent, write_json
from tests.video.clips import draw_frame

CANDIDATES = ["a cup", "a hat", "a ball"]


def record(name, video, answer="a hat", **more):
    return {
        "video": video,
        "question": f"What is in {name}?",
        "candidates": CANDIDATES,
        "answer": answer,
        **more,
    }


@pytest.fixture
def mvbench_folder(tmp_path, put_clip):
    """One record a task, on one video each, a folder of pictures for one of them; one video is missing."""
    folder = tmp_path / "mvbench"
    for name, task in mvbench._TASKS.items():
        part = {"start": 1.0, "end": 3.0} if task.is_bounded else {}
        video = "castle" if task.is_folders else f"{name}.mp4"
        write_json(folder / mvbench._file(name), [record(name, video, **part)])
        path = folder / "video" / task.videos / video
        if task.is_folders:
            path.mkdir(parents=True)
            for number in range(1, 13):
                Image.fromarray(draw_frame(number)).save(path / f"{number:05d}.jpg")
        elif name != "Action Count":
            put_clip(path)
    return folder


def test_mvbench(mvbench_folder, run_benchmark):
    responses = {f"in {name}?": "B) a hat" for name in mvbench._TASKS}
    responses |= {"in Scene Transition?": "C", "in State Change?": "", "in Object Shuffle?": "b"}
    del responses["in Action Count?"]
    run = run_benchmark("mvbench", mvbench_folder, responses, num_frames=4)
    asked = run.asked["in Action Antonym?"]
    instruction = (
        "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
        "objects, and the action and pose of persons. Based on your observations, select the best option that "
        "accurately addresses the question.\n"
    )
    assert asked["system"] == instruction
    assert asked["prompt"] == (
        f"{instruction}Question: What is in Action Antonym?\nOptions:\n(A) a cup\n(B) a hat\n(C) a ball\n"
        "Only give the best option."
    )
    assert asked["answer_start"] == "Best option:("
    assert percent(run.report.overall) == 100 * 17 / 20
    assert run.report.num_unparseable == 1
    assert list(run.report.errors) == ["test/Action Count.mp4"]
    assert run.report.accuracies["test"]["Episodic Reasoning"].num_questions == 1


def test_only_the_part_of_the_record_is_shown(mvbench_folder, run_benchmark):
    responses = {f"in {name}?": "B" for name in mvbench._TASKS}
    run = run_benchmark("mvbench", mvbench_folder, responses, num_frames=4)
    assert run.asked["in Action Sequence?"]["tokens"].timestamps_seconds == pytest.approx(
        (1.2, 1.7, 2.2, 2.7)
    )
    assert run.asked["in Action Antonym?"]["tokens"].timestamps_seconds[0] < 1
    # Pictures 3 to 8 of 3 a second: number 3 is the picture of the first second, at 2 / 3 s from the first picture.
    times = run.asked["in Episodic Reasoning?"]["tokens"].timestamps_seconds
    assert all(2 / 3 - 1e-6 <= time < 8 / 3 for time in times)
    assert len(times) == 4


def test_a_broken_mvbench_file_is_named(mvbench_folder):
    write_json(mvbench_folder / "json/action_sequence.json", [record("x", "x.mp4", start=1.0, end=1.0)])
    with pytest.raises(
        DataError, match=r"action_sequence.json: record 0: field 'end': expected more than start"
    ):
        BENCHMARKS["mvbench"].questions(mvbench_folder)
    write_json(mvbench_folder / "json/action_sequence.json", [record("x", "x.mp4", answer="a dog")])
    with pytest.raises(DataError, match="field 'start': is missing"):
        BENCHMARKS["mvbench"].questions(mvbench_folder)


def test_mlvu_is_the_mean_over_tasks(tmp_path, put_clip, run_benchmark):
    folder, responses = tmp_path / "mlvu", {}
    for task in mlvu._TASKS:
        kind = task.partition("_")[2]
        names = [f"{kind} 1"] if kind != "count" else ["count 1", "count 2", "count 3", "count 4"]
        rows = [record(name, f"{name}.mp4", duration=5.0, question_type=kind) for name in names]
        write_json(folder / f"json/{task}.json", rows)
        for name in names:
            responses[f"in {name}?"] = "B) a hat"
            if name != "order 1":
                put_clip(folder / f"video/{task}/{name}.mp4")
    del responses["in order 1?"]
    responses |= {"in count 1?": "A", "in count 2?": "C) a ball", "in count 3?": "a hat"}
    run = run_benchmark("mlvu", folder, responses)
    asked = run.asked["in ego 1?"]
    assert asked["system"] == (
        "Carefully watch this video and pay attention to every detail. "
        "Based on your observations, select the best option that accurately addresses the question."
    )
    assert asked["prompt"] == (
        "Question: What is in ego 1?\nOptions:\n(A) a cup\n(B) a hat\n(C) a ball\nOnly give the best option."
    )
    assert asked["answer_start"] == "Best Option: ("
    # Five tasks all right, one with one of four, one without its video.
    assert percent(run.report.overall) == pytest.approx(100 * (5 + 0.25) / 7)
    assert percent(run.report.accuracies["dev"]["all"]) == 60
    assert (run.report.num_unparseable, list(run.report.errors)) == (1, ["dev/order 1.mp4"])
    assert "Overall, mean over tasks: 75.0 (" in run.table
    write_json(folder / "json/3_ego.json", [record("x", "x.mp4", answer="a dog", question_type="ego")])
    with pytest.raises(DataError, match=r"3_ego.json: record 0: field 'answer': expected one of the options"):
        BENCHMARKS["mlvu"].questions(folder)


def vnbench_tries(video, kind):
    options = ["cat", "dog", "cow", "hen"]
    return [
        {
            "video": f"/VNBench_new/{video}.mp4", "question": f"Which in {video} try {i}?", "type": kind, "try": i,
            "options": options[i:] + options[:i], "gt": "cat", "gt_option": "ADCB"[i], "length": 5, "needle_time": [],
        }
        for i in range(4)
    ]  # fmt: skip


def test_vnbench_needs_all_four_tries(tmp_path, put_clip, run_benchmark):
    folder = tmp_path / "vnbench"
    kinds = {"v1": "ret_edit", "v2": "ret_edit", "v3": "cnt_insert", "gone": "ord_edit"}
    records = [row for video, kind in kinds.items() for row in vnbench_tries(video, kind)]
    write_json(folder / "VNBench-main-4try.json", records)
    for video in ("v1", "v2", "v3"):
        put_clip(folder / f"VNBench_new/{video}.mp4")
    right = "ADCB"
    responses = {f"in {video} try {i}?": f"{right[i]}. cat" for video in ("v1", "v2", "v3") for i in range(4)}
    responses |= {"in v2 try 3?": "C", "in v3 try 0?": "it is"}
    run = run_benchmark("vnbench", folder, responses)
    assert run.asked["in v1 try 1?"]["prompt"] == (
        "Which in v1 try 1?\nA. dog\nB. cow\nC. hen\nD. cat\n"
        "Answer with the option's letter from the given choices directly."
    )
    scores = run.report.accuracies["test"]
    assert (percent(scores["ret_edit"]), scores["ret_edit"].num_questions) == (50, 2)
    assert percent(scores["retrieval"]) == 50
    assert percent(scores["cnt_insert"]) == 0
    assert percent(run.report.overall) == pytest.approx(100 * (0.5 + 0 + 0) / 3)
    assert (run.report.num_unparseable, list(run.report.errors)) == (1, ["test/gone.mp4"])
    write_json(folder / "VNBench-main-4try.json", records[:3])
    with pytest.raises(
        DataError, match=r"4try.json: field 'try': VNBench_new/v1.mp4 has 3 tries, expected 4"
    ):
        BENCHMARKS["vnbench"].questions(folder)
