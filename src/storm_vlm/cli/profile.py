"""`storm profile`: where the time and the memory of a question go, over frames and token compression."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from storm_vlm.cli import options as opt
from storm_vlm.cli.lists import parse_numbers

if TYPE_CHECKING:
    from storm_vlm.pipeline import VideoQA
    from storm_vlm.profiling import ProfileReport

_MISSING = "profiling draws pictures and needs more packages: pip install 'storm-vlm[train]'"
_GIB = 2**30
# What values of the two list options look like; what they mean is checked where they are read.
LIST_PATTERNS = {"frames": r"\d+", "compression": r"(?i)none|\d+|[ts]\.(pool|sample)[\w.+]*"}


def profile(
    video: Annotated[
        str | None, typer.Argument(help="Video to read; a generated one if none is given.")
    ] = None,
    model: opt.ModelOption = None,
    paper_shape: Annotated[
        str | None,
        typer.Option(
            "--paper-shape",
            help="Random weights in the paper's shape, widths scaled: 1, 1/2, 1/4, 1/8. No model is read.",
        ),
    ] = None,
    frames: Annotated[
        str, typer.Option("--frames", help="Numbers of frames: 8 16 32, or 8,16,32.")
    ] = "8,16,32,64,128,256",
    compression: Annotated[
        str,
        typer.Option(
            "--compression", help="none, 2, 4, 8, 16, 32, or the paper's names: T.pool S.pool4+T.sample2."
        ),
    ] = "none,2,4,8",
    out: opt.OutOption = Path("profile"),
    overwrite: opt.OverwriteOption = False,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Requests to time.")] = 3,
    warm_up: Annotated[int, typer.Option("--warm-up", min=1, help="Requests before them.")] = 1,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="Tokens to write after the first.")
    ] = 16,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    max_memory: opt.MaxMemoryOption = None,
) -> None:
    """Measure decoding, vision, projector, compression, prefill and each token after it."""
    from storm_vlm.cli.terminal import errors_console, progress_bars
    from storm_vlm.errors import StormError

    try:
        from storm_vlm import profiling
    except ModuleNotFoundError as error:
        raise StormError(f"{_MISSING} ({error.name} is missing)") from error
    settings = profiling.ProfileSettings(
        num_frames=tuple(parse_numbers("--frames", frames)),
        compressions=tuple(map(profiling.parse_compression, compression.split(","))),
        num_repeats=repeats,
        num_warm_ups=warm_up,
        num_new_tokens=new_tokens,
    )
    if out.exists() and not overwrite:
        raise StormError(f"{out} already exists: choose another --out or give --overwrite")
    video_qa = _load(model, paper_shape, device, dtype, max_memory)
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bars())
        source = video or _generated(stack.enter_context(tempfile.TemporaryDirectory()), settings.num_frames)
        report = profiling.profile(
            video_qa,
            source,
            settings,
            model_name=f"the paper's shape, width {paper_shape}" if paper_shape else model or "storm-smol",
            video_name=None if video else "a generated film",
            report_progress=progress,
            report_skipped=lambda skipped: errors_console.print(
                skipped.line(), style="yellow", markup=False, highlight=False
            ),
        )
    files = profiling.write_profile(report, out, overwrite=overwrite)
    _print(report, files)


def _generated(folder: str, num_frames: tuple[int, ...]) -> Path:
    from storm_vlm.profiling import write_film

    path = Path(folder) / "film.mp4"
    write_film(path, max(num_frames))
    return path


def _load(
    model: str | None, paper_shape: str | None, device: str, dtype: str, max_memory_gib: float | None
) -> "VideoQA":
    from storm_vlm.cli.session import load_video_qa
    from storm_vlm.cli.terminal import spinner
    from storm_vlm.errors import StormError
    from storm_vlm.pipeline import VideoQA
    from storm_vlm.profiling import paper_shape as make_paper_shape

    if paper_shape is None:
        return load_video_qa(model, device=device, dtype=dtype, max_memory_gib=max_memory_gib, cache=False)
    if model is not None:
        raise StormError("--model and --paper-shape are two models: give one of them")
    max_memory_bytes = None if max_memory_gib is None else int(max_memory_gib * _GIB)
    with spinner("making the model"):
        return VideoQA(
            *make_paper_shape(paper_shape, device=device, dtype=dtype), max_memory_bytes=max_memory_bytes
        )


def _print(report: "ProfileReport", files: list[Path]) -> None:
    from rich.table import Table

    from storm_vlm.cli.terminal import output_console

    for table in report.tables():
        shown = Table(*table.columns, title=table.title, title_justify="left")
        for row in table.rows:
            shown.add_row(*row)
        output_console.print(shown)
    for file in files:
        output_console.print(f"wrote {file}", highlight=False, markup=False)
