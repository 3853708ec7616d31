"""`storm world`: a synthetic world of scripted videos with questions, to train and to test on."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from storm_vlm.data.world import WorldConfig

world = typer.Typer(
    no_args_is_help=True, help="Make videos of named things, with questions and exact scripts."
)

_SPLITS = "train,test_in_vocabulary,test_unseen_objects,test_unseen_style,test_long"
SeedOption = Annotated[
    int, typer.Option("--seed", help="Sample i of a split depends on it, the split and i.")
]
SizeOption = Annotated[int, typer.Option("--size", min=64, help="Width and height in pixels, even.")]
FpsOption = Annotated[int, typer.Option("--fps", min=1, help="Frames per second.")]
MinSecondsOption = Annotated[int, typer.Option("--min-seconds", help="Shortest video; test_long: 4 times.")]
MaxSecondsOption = Annotated[int, typer.Option("--max-seconds", help="Longest video; test_long: 4 times.")]
StylesOption = Annotated[str, typer.Option("--styles", help="Sprite styles, separated by commas.")]
UnseenStyleOption = Annotated[str, typer.Option("--unseen-style", help="Sprite style of test_unseen_style.")]


@world.command("generate")
def generate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; a cut run goes on where it was.")],
    train: Annotated[int, typer.Option("--train", min=0, help="Videos for training.")] = 1000,
    test: Annotated[int, typer.Option("--test", min=0, help="Videos of each test split.")] = 100,
    questions: Annotated[int, typer.Option("--questions", help="Multiple-choice questions per video.")] = 4,
    open_questions: Annotated[int, typer.Option("--open", help="Open questions per video.")] = 1,
    answers: Annotated[
        str, typer.Option("--answers", help="Options are named by their `letter` or their text (`option`).")
    ] = "letter",
    things: Annotated[
        str,
        typer.Option("--things", help="Show the `usual` things, or `other` ones that no usual world shows."),
    ] = "usual",
    names: Annotated[
        int | None, typer.Option("--names", help="Show only so many different things [all].")
    ] = None,
    difficulties: Annotated[
        str, typer.Option("--difficulties", help="Of each video one is drawn, separated by commas.")
    ] = "easy,medium,hard",
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes [all cores].")] = None,
    seed: SeedOption = 0,
    size: SizeOption = 256,
    fps: FpsOption = 4,
    min_seconds: MinSecondsOption = 8,
    max_seconds: MaxSecondsOption = 10,
    styles: StylesOption = "openmoji",
    unseen_style: UnseenStyleOption = "openmoji-grey",
) -> None:
    """Write videos (H.264), their scripts and LLaVA annotations."""
    from storm_vlm.cli.terminal import output_console, progress_bars
    from storm_vlm.data.world import generate_dataset

    config = _config(seed, size, fps, (min_seconds, max_seconds), styles, unseen_style)
    counts = {split: train if split == "train" else test for split in _SPLITS.split(",")}
    config = replace(
        config,
        num_videos=counts,
        questions_per_video=questions,
        open_per_video=open_questions,
        things=things,  # type: ignore[arg-type]  # the config checks it
        num_names=names,
        difficulties=tuple(difficulties.split(",")),  # type: ignore[arg-type]  # the config checks it
        answer_style=answers,  # type: ignore[arg-type]  # the config checks it
    )
    with progress_bars() as report:
        generate_dataset(config, out, workers=workers, report=report)
    output_console.print(f"{sum(counts.values())} videos in {out}", highlight=False)


@world.command("preview")
def preview(
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file to write.")],
    split: Annotated[str, typer.Option("--split", help=f"One of {_SPLITS}.")] = "train",
    videos: Annotated[int, typer.Option("--videos", min=1, help="Number of videos.")] = 6,
    seed: SeedOption = 0,
    size: SizeOption = 256,
    fps: FpsOption = 4,
    min_seconds: MinSecondsOption = 8,
    max_seconds: MaxSecondsOption = 10,
    styles: StylesOption = "openmoji",
    unseen_style: UnseenStyleOption = "openmoji-grey",
) -> None:
    """Draw a contact sheet: frames of the events, the script's words, questions and answers."""
    from storm_vlm.cli.terminal import output_console
    from storm_vlm.data.world import SPLITS, draw_preview
    from storm_vlm.errors import StormError

    chosen = next((known for known in SPLITS if known == split), None)
    if chosen is None:
        raise StormError(f"--split: {split!r} is unknown; there are {_SPLITS}")
    draw_preview(
        _config(seed, size, fps, (min_seconds, max_seconds), styles, unseen_style), chosen, videos, out
    )
    output_console.print(str(out), highlight=False)


@world.command("stats")
def stats(folder: Annotated[Path, typer.Argument(help="Folder that `generate` wrote.")]) -> None:
    """Count tasks, letters and things, what splits share, and what a guesser without eyes reaches."""
    from rich.table import Table

    from storm_vlm.cli.terminal import output_console
    from storm_vlm.data.world import dataset_statistics

    splits = dataset_statistics(folder)
    table = Table("", *(split.split for split in splits))
    table.add_row("videos", *(str(s.num_videos) for s in splits))
    table.add_row("mean seconds", *(f"{s.duration_seconds / s.num_videos:.1f}" for s in splits))
    for task in sorted({task for s in splits for task in s.tasks}):
        table.add_row(f"questions: {task}", *(str(s.tasks.get(task, 0)) for s in splits))
    for letter in "ABCD":
        table.add_row(f"answers: {letter}", *(str(s.letters.get(letter, 0)) for s in splits))
    table.add_row("things", *(str(len(s.names)) for s in splits))
    table.add_row("things also in train", *(str(len(s.names_shared_with_train)) for s in splits))
    table.add_row("backgrounds also in train", *(str(len(s.backgrounds_shared_with_train)) for s in splits))
    accuracies = [s.text_only_accuracy for s in splits]
    table.add_row("text-only accuracy", *("-" if a is None else f"{a:.1%}" for a in accuracies))
    output_console.print(table)


@world.command("setup")
def setup(
    registry: Annotated[str, typer.Option("--registry", help="Address of the npm registry.")] = (
        "https://registry.npmjs.org"
    ),
) -> None:
    """Download more sprite styles (noto, fluent, twemoji), about 6 MB, pinned by hash."""
    from storm_vlm.cli.terminal import errors_console, output_console
    from storm_vlm.data.world import fetch_sprite_sets

    for path in fetch_sprite_sets(registry, report=errors_console.print):
        output_console.print(f"sprites: {path}", highlight=False)


def _config(
    seed: int, size: int, fps: int, seconds: tuple[int, int], styles: str, unseen_style: str
) -> "WorldConfig":
    from storm_vlm.data.world import WorldConfig

    return WorldConfig(
        seed=seed,
        width=size,
        height=size,
        fps=fps,
        min_seconds=seconds[0],
        max_seconds=seconds[1],
        styles=tuple(styles.split(",")),
        unseen_style=unseen_style,
    )
