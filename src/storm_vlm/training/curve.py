"""The training curve as a picture, from the log that transformers' Trainer keeps."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from storm_vlm.errors import DataError
from storm_vlm.storage import atomic_file

_INCHES, _DOTS_PER_INCH = (8, 4.5), 120


def plot_curve(trainer_state: Path, picture: Path) -> None:
    """Draws loss and learning rate over the steps.

    Args:
        trainer_state: A ``trainer_state.json``.
        picture: PNG file to write.

    Raises:
        DataError: The file is no log with losses.
    """
    try:
        history: list[dict[str, Any]] = json.loads(trainer_state.read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{trainer_state} is no log of a training run: {error}") from error
    lines = [entry for entry in history if "loss" in entry]
    if not lines:
        raise DataError(f"{trainer_state}: the log has no losses yet")
    steps = [entry["step"] for entry in lines]
    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [entry["loss"] for entry in lines], color="tab:blue", label="loss")
    axes.set(xlabel="step", ylabel="loss a token")
    rates = axes.twinx()
    rates.plot(steps, [entry.get("learning_rate", 0.0) for entry in lines], color="tab:gray", linewidth=0.8)
    rates.set_ylabel("learning rate (gray)")
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=_DOTS_PER_INCH)
