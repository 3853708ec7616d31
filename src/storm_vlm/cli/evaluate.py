"""`storm eval`: asks a model the questions of a benchmark and tells how many answers are right."""

from pathlib import Path
from typing import Annotated

import typer

from storm_vlm.cli import options as opt

_TASKS = ("world",)


def evaluate(
    data: Annotated[Path, typer.Option("--data", help="Folder of the benchmark.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; a cut run goes on where it was.")],
    task: Annotated[str, typer.Option("--task", help=f"Benchmark: {', '.join(_TASKS)}.")] = "world",
    model: opt.ModelOption = None,
    splits: Annotated[
        str | None, typer.Option("--splits", help="Splits, separated by commas [all for testing].")
    ] = None,
    max_videos: Annotated[
        int | None, typer.Option("--max-videos", min=1, help="Only so many first videos of each split.")
    ] = None,
    frames: opt.FramesOption = None,
    temporal_pool: opt.TemporalPoolOption = None,
    spatial_pool: opt.SpatialPoolOption = None,
    temporal_sample: opt.TemporalSampleOption = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Show no video, as a control.")] = False,
    max_new_tokens: opt.MaxNewTokensOption = 16,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
) -> None:
    """Ask a model a benchmark's questions; answers, scores and settings are written to a folder."""
    from storm_vlm.cli.session import load_video_qa, warn_if_untrained
    from storm_vlm.cli.terminal import output_console, progress_bars
    from storm_vlm.errors import StormError
    from storm_vlm.evaluation import EvaluationSettings, read_world_questions
    from storm_vlm.evaluation import evaluate as run_evaluation
    from storm_vlm.evaluation.world import TEST_SPLITS

    if task not in _TASKS:
        raise StormError(f"--task: {task!r} is unknown; there are {', '.join(_TASKS)}")
    chosen = splits.split(",") if splits else TEST_SPLITS
    questions = read_world_questions(data, chosen, max_videos=max_videos)
    video_qa = load_video_qa(model, device=device, dtype=dtype, max_memory_gib=None, cache=False)
    warn_if_untrained(video_qa)
    settings = EvaluationSettings(
        num_frames=frames,
        temporal_pool=temporal_pool,
        spatial_pool=spatial_pool,
        temporal_sample=temporal_sample,
        text_only=text_only,
        max_new_tokens=max_new_tokens,
    )
    with progress_bars() as progress:
        report = run_evaluation(
            video_qa,
            questions,
            out,
            model_name=model or "storm-smol",
            settings=settings,
            report_progress=progress,
        )
    output_console.print(report.to_markdown(), end="", markup=False, highlight=False)
