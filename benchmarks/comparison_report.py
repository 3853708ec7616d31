"""Table, differences and plot of `comparison.py`, from the results of its runs."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from storm_vlm.storage import atomic_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ALL = "all"
NUM_RESAMPLES = 2000
# What is compared: the paper's claims, at one budget of the language model and at all tokens.
Key = tuple[str, int, int]
DIFFERENCES: tuple[tuple[str, Key, Key], ...] = (
    (
        "12.5% of 128 frames against VILA at the same tokens",
        ("STORM + T.pool", 128, 2),
        ("VILA + T.pool", 128, 2),
    ),
    ("12.5% of 128 frames against VILA, 32 frames, 100%", ("STORM + T.pool", 128, 2), ("VILA", 32, 1)),
    ("12.5% of 32 frames against VILA at the same tokens", ("STORM + T.pool", 32, 2), ("VILA", 32, 8)),
    ("12.5% of 32 frames against VILA, 32 frames, 100%", ("STORM + T.pool", 32, 2), ("VILA", 32, 1)),
    ("12.5% of 32 frames against STORM, 32 frames, 100%", ("STORM + T.pool", 32, 2), ("STORM", 32, 1)),
    ("Mamba, 8 frames", ("STORM", 8, 1), ("VILA", 8, 1)),
    ("Mamba, 32 frames", ("STORM", 32, 1), ("VILA", 32, 1)),
    ("Mamba with T.pool, 32 frames", ("STORM + T.pool", 32, 1), ("VILA + T.pool", 32, 1)),
    ("Mamba with T.pool, 128 frames", ("STORM + T.pool", 128, 1), ("VILA + T.pool", 128, 1)),
    (
        "both ways against one way, T.pool, 32 frames",
        ("STORM + T.pool", 32, 1),
        ("uni-directional + T.pool", 32, 1),
    ),
    ("STORM, 128 frames with T.pool against 32 at 100%", ("STORM + T.pool", 128, 1), ("STORM", 32, 1)),
    ("T.pool against S.pool, STORM, 32 frames", ("STORM + T.pool", 32, 1), ("STORM + S.pool", 32, 1)),
)


@dataclass(frozen=True, slots=True)
class Scores:
    """Shares of right answers of one kind of model: ``(seeds, videos)`` counts of right and asked."""

    right: np.ndarray
    asked: np.ndarray

    @property
    def by_seed(self) -> np.ndarray:
        """Share of right answers of each seed."""
        return self.right.sum(1) / self.asked.sum(1)

    def resampled(self, drawn: np.ndarray) -> np.ndarray:
        """Mean over seeds for each draw of videos ``(draws, videos)``."""
        return (self.right[:, drawn].sum(-1) / self.asked[:, drawn].sum(-1)).mean(0)


def write_report(
    results: list[dict[str, Any]], from_texts: dict[str, float], out: Path, machine: dict[str, Any]
) -> None:
    """Writes ``comparison.json``, ``comparison.md``, ``comparison.png`` and ``comparison_differences.png``.

    Args:
        results: Of the runs.
        from_texts: Share of right answers of each task, and of all, when texts stand in place of videos.
        out: Folder of the files.
        machine: On which they ran.
    """
    tests = _gather(results)
    tasks = sorted({task for scores in tests.values() for task in scores["scores"]} - {ALL})
    rows = [_row(key, entry, tasks) for key, entry in sorted(tests.items(), key=lambda item: _order(item[0]))]
    differences = [
        {"what": what, **_difference(tests[first]["scores"][ALL], tests[second]["scores"][ALL])}
        for what, first, second in DIFFERENCES
        if first in tests and second in tests
    ]
    report = {"machine": machine, "from_texts": from_texts, "rows": rows, "differences": differences}
    _write(out / "comparison.json", json.dumps(report, indent=1) + "\n")
    _write(out / "comparison.md", _markdown(rows, from_texts, differences, tasks))
    _plot(rows, out / "comparison.png")
    _plot_differences(differences, out / "comparison_differences.png")


def _order(key: Key) -> tuple[int, str, int]:
    variant, num_frames, temporal_sample = key
    return num_frames, variant, temporal_sample


def _gather(results: list[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    """Returns scores by task, tokens and times of each model and sampling, seeds together."""
    grouped: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for result in sorted(results, key=lambda result: result["seed"]):
        for test in result["tests"]:
            grouped[result["variant"], result["num_frames"], test["temporal_sample"]].append(test)
    gathered = {}
    for key, tests in grouped.items():
        tasks = [*tests[0]["right"], ALL]
        gathered[key] = {
            "scores": {task: _scores(tests, task) for task in tasks},
            "visual_tokens": tests[0]["visual_tokens"],
            "seconds_per_video": float(np.median([test["seconds_per_video"] for test in tests])),
        }
    return gathered


def _scores(tests: list[dict[str, Any]], task: str) -> Scores:
    videos = sorted({video for by_video in tests[0]["right"].values() for video in by_video})
    chosen = [name for name in tests[0]["right"] if task in (name, ALL)]

    def answers(test: dict[str, Any], video: str) -> list[bool]:
        return [right for name in chosen for right in test["right"][name].get(video, [])]

    right = np.array([[sum(answers(test, video)) for video in videos] for test in tests])
    asked = np.array([[len(answers(test, video)) for video in videos] for test in tests])
    return Scores(right, asked)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _drawn(num_videos: int) -> np.ndarray:
    return np.random.default_rng(0).integers(num_videos, size=(NUM_RESAMPLES, num_videos))


def _row(key: Key, entry: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    variant, num_frames, temporal_sample = key
    scores = entry["scores"]
    low, high = _interval(scores[ALL].resampled(_drawn(scores[ALL].right.shape[1])))
    return {
        "variant": variant,
        "num_frames": num_frames,
        "temporal_sample": temporal_sample,
        "visual_tokens": entry["visual_tokens"],
        "accuracy": float(scores[ALL].by_seed.mean()),
        "low": low,
        "high": high,
        "by_seed": scores[ALL].by_seed.tolist(),
        "by_task": {task: float(scores[task].by_seed.mean()) for task in tasks},
        "seconds_per_video": entry["seconds_per_video"],
    }


def _difference(first: Scores, second: Scores) -> dict[str, Any]:
    drawn = _drawn(first.right.shape[1])
    low, high = _interval(first.resampled(drawn) - second.resampled(drawn))
    by_seed = first.by_seed - second.by_seed
    return {"mean": float(by_seed.mean()), "low": low, "high": high, "by_seed": by_seed.tolist()}


def _markdown(
    rows: list[dict[str, Any]],
    from_texts: dict[str, float],
    differences: list[dict[str, Any]],
    tasks: list[str],
) -> str:
    head = ["model", "frames", "visual tokens", "accuracy (95%)", "seeds", *tasks, "ms a video"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        sampling = f" + T.sample {row['temporal_sample']}" if row["temporal_sample"] > 1 else ""
        cells = [
            row["variant"] + sampling,
            row["num_frames"],
            row["visual_tokens"],
            f"{_percent(row['accuracy'])} ({_percent(row['low'])} to {_percent(row['high'])})",
            ", ".join(_percent(value) for value in row["by_seed"]),
            *(_percent(row["by_task"][task]) for task in tasks),
            f"{1000 * row['seconds_per_video']:.1f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    told = (_percent(from_texts[task]) for task in tasks)
    cells = ["language model, from texts", "", "", _percent(from_texts[ALL]), "", *told, ""]
    lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| difference, in points | mean (95%) | by seed |", "|---|---|---|"]
    for entry in differences:
        interval = f"{_points(entry['mean'])} ({_points(entry['low'])} to {_points(entry['high'])})"
        lines.append(f"| {entry['what']} | {interval} | {', '.join(map(_points, entry['by_seed']))} |")
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws accuracy over visual tokens, a colour for each model and a mark for each number of frames."""
    figure, axes = plt.subplots(figsize=(9, 5.4), layout="constrained")
    marks = {8: "o", 32: "s", 128: "^"}
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for number, variant in enumerate(variants):
        # Many models have the same number of tokens: side by side.
        aside = 1.045 ** (number - len(variants) / 2)
        for row in (row for row in rows if row["variant"] == variant):
            accuracy = 100 * row["accuracy"]
            axes.errorbar(
                row["visual_tokens"] * aside,
                accuracy,
                yerr=[[accuracy - 100 * row["low"]], [100 * row["high"] - accuracy]],
                color=f"C{number}",
                marker=marks.get(row["num_frames"], "D"),
                fillstyle="full" if row["temporal_sample"] == 1 else "none",
                capsize=3,
                linestyle="none",
            )
        axes.plot([], [], color=f"C{number}", label=variant)
    for num_frames, mark in marks.items():
        axes.plot([], [], color="grey", marker=mark, linestyle="none", label=f"{num_frames} frames")
    axes.plot([], [], color="grey", marker="s", fillstyle="none", linestyle="none", label="with T.sample")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens := sorted({row["visual_tokens"] for row in rows}), map(str, tokens))
    axes.set(xlabel="visual tokens of a video", ylabel="right answers, %")
    axes.legend(fontsize="small", loc="best")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _plot_differences(differences: list[dict[str, Any]], file: Path) -> None:
    """Draws each difference with its interval, and a small mark for each seed."""
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.42 * len(differences)), layout="constrained")
    for place, entry in enumerate(reversed(differences)):
        mean, low, high = (100 * entry[name] for name in ("mean", "low", "high"))
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color="C0", marker="o", capsize=3)
        by_seed = [100 * value for value in entry["by_seed"]]
        axes.plot(by_seed, [place - 0.22] * len(by_seed), color="grey", marker="|", linestyle="none")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(differences)), [entry["what"] for entry in reversed(differences)])
    axes.set_xlabel("difference in right answers, points (95%; ticks: seeds)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _write(file: Path, text: str) -> None:
    with atomic_file(file) as path:
        path.write_text(text, encoding="utf-8")
