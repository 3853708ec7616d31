"""Accuracy against the number of frames: one evaluation for each, a table and a picture (as the paper's Figure 4, right)."""

import json
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from storm_vlm.evaluation.report import EvaluationReport
from storm_vlm.evaluation.run import process_state
from storm_vlm.storage import atomic_file

FRAMES_JSON, FRAMES_MARKDOWN, FRAMES_PICTURE = "frames.json", "frames.md", "frames.png"
_DOTS_PER_INCH = 120


def evaluate_frames(
    evaluate_at: Callable[[int, Path], EvaluationReport], num_frames: Sequence[int], out: Path
) -> str:
    """Evaluates at each number of frames and writes what comes of it.

    Args:
        evaluate_at: Evaluates at a number of frames, into a folder.
        num_frames: Numbers of frames, at least one.
        out: Folder for ``frames-8``, ... with each evaluation, ``frames.json``, ``frames.md`` and ``frames.png``.

    Returns:
        The table, in Markdown.
    """
    reports = {count: evaluate_at(count, out / f"frames-{count}") for count in sorted(set(num_frames))}
    table = _table(reports)
    if not process_state().is_main_process:
        return table
    content = {str(count): report.to_dict() for count, report in reports.items()}
    for name, data in (
        (FRAMES_JSON, json.dumps(content, indent=1).encode() + b"\n"),
        (FRAMES_MARKDOWN, table.encode()),
        (FRAMES_PICTURE, draw_frames(reports)),
    ):
        with atomic_file(out / name) as path:
            path.write_bytes(data)
    return table


def draw_frames(reports: Mapping[int, EvaluationReport]) -> bytes:
    """Draws one line for each split, with its 95% intervals.

    Args:
        reports: The evaluation at each number of frames.

    Returns:
        A PNG file.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 (an optional dependency)

    counts = list(reports)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for split in reports[counts[0]].accuracies:
        scores = [report.accuracies[split]["all"] for report in reports.values()]
        below = [100 * (score.value - score.low) for score in scores]
        above = [100 * (score.high - score.value) for score in scores]
        values = [100 * score.value for score in scores]
        axes.errorbar(counts, values, yerr=[below, above], marker="o", capsize=3, label=split)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="frames", ylabel="right answers in %", title=next(iter(reports.values())).model_name)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue()


def _table(reports: Mapping[int, EvaluationReport]) -> str:
    splits = list(next(iter(reports.values())).accuracies)
    lines = [f"| frames | {' | '.join(splits)} |", "|---|" + "---|" * len(splits)]
    for count, report in reports.items():
        cells = (str(report.accuracies[split]["all"]) for split in splits)
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Accuracy in %, with 95% bootstrap intervals over videos."]) + "\n"
