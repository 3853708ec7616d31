"""MVBench: twenty tasks on short clips, five of them on a part of the video, one on folders of pictures."""

from dataclasses import dataclass
from pathlib import Path

from storm_vlm.evaluation.benchmark import Benchmark
from storm_vlm.evaluation.benchmarks.annotations import AnnotationRow, lettered, read_annotations
from storm_vlm.evaluation.benchmarks.extraction import first_word
from storm_vlm.evaluation.question import MultipleChoiceQuestion

_SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of objects, "
    "and the action and pose of persons. Based on your observations, select the best option that accurately addresses "
    "the question.\n"
)
_FOLDER_FPS = 3.0
# The first picture has the number 1, and so the time 1 / 3 s where the annotations count from 0.
_FOLDER_OFFSET_SECONDS = 1 / _FOLDER_FPS


@dataclass(frozen=True, slots=True)
class _Task:
    """Where a task's videos are, whether a record says which part is shown, and whether they are folders of pictures."""

    videos: str
    is_bounded: bool = False
    is_folders: bool = False


_TASKS = {
    "Action Sequence": _Task("star/Charades_v1_480", is_bounded=True),
    "Action Prediction": _Task("star/Charades_v1_480", is_bounded=True),
    "Action Antonym": _Task("ssv2_video"),
    "Fine-grained Action": _Task("Moments_in_Time_Raw/videos"),
    "Unexpected Action": _Task("FunQA_test/test"),
    "Object Existence": _Task("clevrer/video_validation"),
    "Object Interaction": _Task("star/Charades_v1_480", is_bounded=True),
    "Object Shuffle": _Task("perception/videos"),
    "Moving Direction": _Task("clevrer/video_validation"),
    "Action Localization": _Task("sta/sta_video", is_bounded=True),
    "Scene Transition": _Task("scene_qa/video"),
    "Action Count": _Task("perception/videos"),
    "Moving Count": _Task("clevrer/video_validation"),
    "Moving Attribute": _Task("clevrer/video_validation"),
    "State Change": _Task("perception/videos"),
    "Fine-grained Pose": _Task("nturgbd"),
    "Character Order": _Task("perception/videos"),
    "Egocentric Navigation": _Task("vlnqa"),
    "Episodic Reasoning": _Task("tvqa/frames_fps3_hq", is_bounded=True, is_folders=True),
    "Counterfactual Inference": _Task("clevrer/video_validation"),
}


def read_mvbench(folder: Path) -> list[MultipleChoiceQuestion]:
    """Reads the questions of MVBench.

    Args:
        folder: Holds ``json/<task>.json`` and ``video/`` with the folders of the source data sets.

    Returns:
        The questions; annotations that cannot be read are a DataError.

    Source:
        Layout of the data set OpenGVLab/MVBench; tasks and prompt of Ask-Anything, video_chat2/mvbench.ipynb.
    """
    return [
        _question(row, folder, name, number)
        for name in _TASKS
        for number, row in enumerate(read_annotations(folder / _file(name)))
    ]


def _file(task: str) -> str:
    return f"json/{task.lower().replace(' ', '_').replace('-', '_')}.json"


def _question(row: AnnotationRow, folder: Path, name: str, number: int) -> MultipleChoiceQuestion:
    task, options = _TASKS[name], row.texts("candidates")
    start, end = _bounds(row, task)
    asked = f"Question: {row.text('question')}\nOptions:\n{lettered(options, '(A) {}')}".rstrip()
    return MultipleChoiceQuestion(
        identity=f"{name}-{number}",
        video=folder / "video" / task.videos / row.text("video"),
        split="test",
        task=name,
        # The instruction is the system message and stands before the question once more, as in the notebook.
        prompt=f"{_SYSTEM}{asked}\nOnly give the best option.",
        options=options,
        answer=row.letter_of_text("answer", options),
        start_seconds=start,
        end_seconds=end,
        folder_fps=_FOLDER_FPS,
        system=_SYSTEM,
        answer_start="Best option:(",
    )


def _bounds(row: AnnotationRow, task: _Task) -> tuple[float | None, float | None]:
    if not task.is_bounded:
        return None, None
    start, end = row.number("start"), row.number("end")
    if end <= start:
        raise row.error("end", f"expected more than start, {start:g}, got {end:g}")
    if not task.is_folders:
        return start, end
    return max(0.0, start - _FOLDER_OFFSET_SECONDS), max(_FOLDER_OFFSET_SECONDS, end - _FOLDER_OFFSET_SECONDS)


MVBENCH = Benchmark(
    name="mvbench",
    annotations=tuple(_file(name) for name in _TASKS),
    read=read_mvbench,
    prompt="Ask-Anything, video_chat2/mvbench.ipynb; the answer begins with 'Best option:('.",
    scoring="The answer's first word fits one option (same notebook; an empty answer is wrong); share of right questions, "
    "the mean of the twenty tasks as each has 200.",
    parse=first_word,
)
