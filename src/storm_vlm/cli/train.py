"""`storm train`: trains what a recipe says, or prints what it would train."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from storm_vlm.training import TrainingPlan, TrainingResult

_MISSING = "training needs more packages: pip install 'storm-vlm[train]'"


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file; see recipes/.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Another value, such as schedule.max_steps=10.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained, and stop.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Refuse to go on from checkpoints in the output folder.")
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the CPU even if there is a GPU.")] = False,
) -> None:
    """Train a model in the stage that a recipe describes; an interrupted run goes on where it was saved."""
    from storm_vlm.cli.processes import leave_process_group
    from storm_vlm.cli.terminal import errors_console, hide_library_progress
    from storm_vlm.errors import StormError

    try:
        from storm_vlm import training
    except ModuleNotFoundError as error:
        raise StormError(f"{_MISSING} ({error.name} is missing)") from error
    read = training.read_recipe(recipe, settings or [])
    hide_library_progress()
    if dry_run:
        _print_plan(training.plan_training(read))
        return
    try:
        result = training.train(read, resume=not fresh, use_cpu=cpu)
    except KeyboardInterrupt:
        errors_console.print(
            f"stopped; the same command goes on from the last checkpoint in {read.output.folder}"
        )
        raise
    _print_result(result)
    leave_process_group()


def _print_plan(plan: "TrainingPlan") -> None:
    from rich.table import Table

    from storm_vlm.cli.terminal import output_console

    table = Table("part", "parameters", "trained", "learning rate", title="would train", title_justify="left")
    for part in plan.parts:
        rate = "frozen" if part.learning_rate is None else f"{part.learning_rate:g}"
        table.add_row(part.name, f"{part.num_parameters:,}", f"{part.num_trained:,}", rate)
    output_console.print(table)
    for name, value in (
        ("records", f"{plan.num_records:,}"),
        ("steps", f"{plan.num_steps:,} ({plan.num_batches:,} batches)"),
        (
            "tokens a sample",
            f"{plan.median_tokens_per_sample:,} (median), {plan.max_tokens_per_sample:,} (most)",
        ),
        ("tokens a step", f"{plan.tokens_per_step:,}"),
        ("memory", f"about {plan.memory_bytes / 2**30:.1f} GiB in one process without sharding"),
    ):
        output_console.print(f"{name + ':':17}{value}", highlight=False)


def _print_result(result: "TrainingResult") -> None:
    import os

    from storm_vlm.cli.terminal import output_console

    if os.environ.get("RANK", "0") != "0":
        return
    loss = "" if result.final_loss is None else f", loss {result.final_loss:.4f}"
    output_console.print(
        f"trained: {result.num_steps} steps{loss}, {result.num_bad_samples} bad samples", highlight=False
    )
    for folder in result.folders:
        output_console.print(f"{folder.name + ':':9}{folder}", highlight=False)
    if result.curve is not None:
        output_console.print(f"curve:   {result.curve}", highlight=False)
