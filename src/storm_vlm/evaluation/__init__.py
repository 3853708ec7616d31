"""Measures how well a model answers: questions of a benchmark, answers on disk, scores with intervals."""

from storm_vlm.evaluation.answering import Answerer, EvaluationSettings, LocalAnswerer
from storm_vlm.evaluation.benchmark import Benchmark
from storm_vlm.evaluation.benchmarks import BENCHMARKS
from storm_vlm.evaluation.benchmarks.world import read_world_questions
from storm_vlm.evaluation.frames import evaluate_frames
from storm_vlm.evaluation.letters import parse_letter
from storm_vlm.evaluation.question import MultipleChoiceQuestion
from storm_vlm.evaluation.ray_answering import RayAnswerer
from storm_vlm.evaluation.report import Accuracy, EvaluationReport, summarise
from storm_vlm.evaluation.run import evaluate, process_state

__all__ = [
    "BENCHMARKS",
    "Accuracy",
    "Answerer",
    "Benchmark",
    "EvaluationReport",
    "EvaluationSettings",
    "LocalAnswerer",
    "MultipleChoiceQuestion",
    "RayAnswerer",
    "evaluate",
    "evaluate_frames",
    "parse_letter",
    "process_state",
    "read_world_questions",
    "summarise",
]
