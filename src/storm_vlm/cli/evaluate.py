"""`storm eval`: asks a model the questions of a benchmark and tells how many answers are right."""

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from storm_vlm.cli import options as opt
from storm_vlm.cli.lists import parse_numbers

if TYPE_CHECKING:
    from storm_vlm.evaluation import Answerer, Benchmark

_WORLD = "world"
LIST_PATTERNS = {"frames": r"\d+"}


def evaluate(
    data: Annotated[Path, typer.Option("--data", help="Folder of the benchmark.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; a cut run goes on where it was.")],
    task: Annotated[
        str, typer.Option("--task", help="Benchmark: world, videomme, mlvu, ...; see docs/evaluate.md.")
    ] = _WORLD,
    model: opt.ModelOption = None,
    splits: Annotated[
        str | None,
        typer.Option("--splits", help="Of the world: splits, separated by commas [all for testing]."),
    ] = None,
    max_videos: Annotated[
        int | None,
        typer.Option("--max-videos", min=1, help="Of the world: only so many first videos of each split."),
    ] = None,
    frames: Annotated[
        str | None,
        typer.Option(
            "--frames",
            help="Frames to sample, uniformly over the whole video; several, as 8 16 32, for a table and a picture.",
        ),
    ] = None,
    temporal_pool: opt.TemporalPoolOption = None,
    spatial_pool: opt.SpatialPoolOption = None,
    temporal_sample: opt.TemporalSampleOption = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Show no video, as a control.")] = False,
    likelihood: Annotated[
        bool,
        typer.Option("--likelihood", help="Choose the likeliest option, whatever the model would write."),
    ] = False,
    max_new_tokens: opt.MaxNewTokensOption = 16,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Questions that are answered together.")
    ] = 1,
    ray_workers: Annotated[
        int | None,
        typer.Option(
            "--ray-workers",
            min=1,
            help="Workers of the Ray cluster that RAY_ADDRESS names, or of this machine.",
        ),
    ] = None,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
) -> None:
    """Ask a model a benchmark's questions; answers, scores and settings are written to a folder."""
    from storm_vlm.cli.processes import leave_process_group
    from storm_vlm.cli.session import warn_if_untrained
    from storm_vlm.cli.terminal import output_console, progress_bars
    from storm_vlm.evaluation import EvaluationSettings, evaluate_frames, process_state
    from storm_vlm.evaluation import evaluate as run_evaluation

    num_frames = [] if frames is None else parse_numbers("--frames", frames)
    if len(num_frames) > 1:
        _require_matplotlib()
    benchmark = _benchmark(task, splits, max_videos)
    questions = benchmark.questions(data)
    answerer = _answerer(model, device, dtype, ray_workers)
    warn_if_untrained(is_trained=answerer.describe()["projector_is_trained"])
    settings = EvaluationSettings(
        num_frames=num_frames[0] if num_frames else None,
        temporal_pool=temporal_pool,
        spatial_pool=spatial_pool,
        temporal_sample=temporal_sample,
        text_only=text_only,
        max_new_tokens=max_new_tokens,
        likelihood=likelihood,
    )
    with progress_bars(enabled=process_state().is_main_process) as progress:
        run = partial(
            run_evaluation,
            answerer,
            questions,
            model_name=model or "storm-smol",
            benchmark=benchmark,
            data=data,
            batch_size=batch_size,
            report_progress=progress,
        )
        if len(num_frames) > 1:
            table = evaluate_frames(
                lambda count, folder: run(folder, settings=replace(settings, num_frames=count)),
                num_frames,
                out,
            )
        else:
            table = run(out, settings=settings).to_markdown()
    if process_state().is_main_process:
        output_console.print(table, end="", markup=False, highlight=False)
    leave_process_group()


def _answerer(model: str | None, device: str, dtype: str, ray_workers: int | None) -> "Answerer":
    """Returns who asks the model: workers of a cluster, or this process, on a device of its own among several."""
    from storm_vlm.cli.session import load_video_qa
    from storm_vlm.errors import StormError
    from storm_vlm.evaluation import LocalAnswerer, RayAnswerer, process_state

    state = process_state()
    load = partial(load_video_qa, model, dtype=dtype, max_memory_gib=None, cache=False)
    if ray_workers is not None:
        if state.num_processes > 1:
            raise StormError("--ray-workers: one process gives out the questions, do not start several")
        return RayAnswerer(partial(load, device=device, quiet=True), ray_workers)
    if state.num_processes > 1 and device == "auto":
        device = str(state.device)
    return LocalAnswerer(load(device=device, quiet=not state.is_main_process))


def _require_matplotlib() -> None:
    """Fails before the work and not after it."""
    from storm_vlm.errors import StormError

    if importlib.util.find_spec("matplotlib") is None:
        raise StormError("several --frames are drawn as a picture: pip install 'storm-vlm[train]'")


def _benchmark(task: str, splits: str | None, max_videos: int | None) -> "Benchmark":
    """Finds a benchmark; of the world, its splits and videos can be chosen."""
    from storm_vlm.errors import StormError
    from storm_vlm.evaluation import BENCHMARKS, read_world_questions
    from storm_vlm.evaluation.benchmarks.world import TEST_SPLITS

    if task not in BENCHMARKS:
        raise StormError(f"--task: {task!r} is unknown; there are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[task]
    if task != _WORLD:
        given = {"--splits": splits, "--max-videos": max_videos}
        if names := [name for name, value in given.items() if value is not None]:
            raise StormError(f"{', '.join(names)}: only for --task {_WORLD}; {task} is scored as a whole")
        return benchmark
    chosen = splits.split(",") if splits else TEST_SPLITS
    return replace(
        benchmark,
        annotations=tuple(f"{split}/annotations.json" for split in chosen),
        read=partial(read_world_questions, splits=chosen, max_videos=max_videos),
    )
