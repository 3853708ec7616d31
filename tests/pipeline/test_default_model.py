"""The default model as it ships answers questions about videos that it has not seen."""

import pytest

from storm_vlm.data.world import WorldConfig, generate_dataset
from storm_vlm.errors import ModelError
from storm_vlm.evaluation import BENCHMARKS, EvaluationSettings, LocalAnswerer, evaluate, read_world_questions
from storm_vlm.model.default_model import default_model_path
from storm_vlm.pipeline import VideoQA

NUM_VIDEOS = 6


@pytest.fixture(scope="module")
def video_qa():
    try:
        folder = default_model_path()
    except ModelError as error:
        pytest.skip(str(error))
    return VideoQA.from_pretrained(folder, device="cpu", dtype="float32", use_cache=False)


@pytest.mark.parametrize(("text_only", "lowest", "highest"), [(False, 0.6, 1.0), (True, 0.05, 0.5)])
def test_it_answers_from_what_it_sees(video_qa, tmp_path, text_only, lowest, highest):
    """48 questions with 4 options: chance is 25%, give or take 6%."""
    config = WorldConfig(
        num_videos={"test_in_vocabulary": NUM_VIDEOS}, questions_per_video=8, answer_style="option"
    )
    generate_dataset(config, tmp_path / "world", workers=1)
    report = evaluate(
        LocalAnswerer(video_qa),
        read_world_questions(tmp_path / "world", ["test_in_vocabulary"]),
        tmp_path / "answers",
        model_name="storm-smol",
        benchmark=BENCHMARKS["world"],
        settings=EvaluationSettings(text_only=text_only),
        batch_size=8,
    )
    assert video_qa.is_projector_trained
    assert not report.errors
    assert lowest <= report.overall.value <= highest
