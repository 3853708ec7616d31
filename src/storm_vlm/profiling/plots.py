"""Pictures of a profile: where the time goes, and how it grows with the video."""

from collections import Counter
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from storm_vlm.profiling.measure import Measurement
from storm_vlm.profiling.request import PARTS
from storm_vlm.profiling.settings import compression_name

_COLORS = {
    "decode": "tab:gray",
    "vision": "tab:blue",
    "projector": "tab:green",
    "compression": "tab:olive",
    "prefill": "tab:orange",
    "other": "lightgray",
}
_DOTS_PER_INCH = 120
# Width of a bar where the distance from bar to bar is 1.
_BAR_WIDTH = 0.7


def draw_pictures(measurements: list[Measurement]) -> dict[str, bytes]:
    """Draws the three pictures.

    Args:
        measurements: What was measured; at least one.

    Returns:
        PNG files by name: ``latency_by_compression`` for one number of frames and ``latency_by_frames`` (as the paper's
        Figure 4), and ``latency_by_part`` with all settings (as its Figure 8).
    """
    return {
        "latency_by_compression": _png(_by_compression(measurements)),
        "latency_by_frames": _png(_by_frames(measurements)),
        "latency_by_part": _png(_by_part(measurements)),
    }


def _by_compression(measurements: list[Measurement]) -> Figure:
    """Draws one bar for each compression, at the largest of the numbers of frames that most of them were measured at."""
    counts = Counter(measurement.setting.num_frames for measurement in measurements)
    num_frames = max(counts, key=lambda frames: (counts[frames], frames))
    chosen = [measurement for measurement in measurements if measurement.setting.num_frames == num_frames]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    _draw_bars(axes, chosen, [compression_name(measurement.setting.compression) for measurement in chosen])
    axes.set(ylabel="seconds to the first token", title=f"{num_frames} frames")
    axes.legend()
    return figure


def _by_frames(measurements: list[Measurement]) -> Figure:
    """Draws one line for each compression, with the range of the repeats."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, group in _by_name(measurements).items():
        frames = [measurement.setting.num_frames for measurement in group]
        totals = [measurement.total() for measurement in group]
        below = [total.median - total.low for total in totals]
        above = [total.high - total.median for total in totals]
        axes.errorbar(
            frames, [total.median for total in totals], yerr=[below, above], marker="o", capsize=3, label=name
        )
    frames = sorted({measurement.setting.num_frames for measurement in measurements})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(frames, [str(count) for count in frames])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel="frames", ylabel="seconds to the first token")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _by_part(measurements: list[Measurement]) -> Figure:
    """Draws one panel for each compression, with one bar for each number of frames."""
    groups = _by_name(measurements)
    figure = Figure(figsize=(4 * len(groups), 4), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        _draw_bars(axes, group, [str(measurement.setting.num_frames) for measurement in group])
        axes.set(xlabel="frames", title=name)
    panels[0].set_ylabel("seconds to the first token")
    panels[0].legend()
    return figure


def _draw_bars(axes: Axes, measurements: list[Measurement], labels: list[str]) -> None:
    """Stacks the parts of each measurement: their mean over the repeats, which adds up to the mean of the whole."""
    positions, bottoms = list(range(len(measurements))), [0.0] * len(measurements)
    for part in PARTS:
        times = [measurement.seconds[part] for measurement in measurements]
        heights = [sum(repeats) / len(repeats) for repeats in times]
        axes.bar(positions, heights, _BAR_WIDTH, bottom=bottoms, color=_COLORS[part], label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(positions, labels)


def _by_name(measurements: list[Measurement]) -> dict[str, list[Measurement]]:
    groups: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        groups.setdefault(compression_name(measurement.setting.compression), []).append(measurement)
    return groups


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue()
