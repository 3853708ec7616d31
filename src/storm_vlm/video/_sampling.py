"""Which times of a video to look at."""

import math
from collections.abc import Callable, Sequence

from storm_vlm.errors import VideoError

# Below this many frames per frame asked for, an estimated frame count is not trusted: the true times are looked up.
EXACT_BELOW_RATIO = 4


def check_request(name: str, num_frames: int | None, fps: float | None) -> None:
    """Raises a VideoError when ``num_frames`` or ``fps`` cannot be meant."""
    if num_frames is not None and (
        isinstance(num_frames, bool) or int(num_frames) != num_frames or num_frames < 1
    ):
        raise VideoError(f"{name}: num_frames is {num_frames}, expected a whole number of at least 1")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise VideoError(f"{name}: fps is {fps}, expected a finite number above 0")


def check_window(
    name: str, start_seconds: float | None, end_seconds: float | None, duration_seconds: float
) -> tuple[float, float]:
    """Returns the window ``(start, end)`` within the video, or raises a VideoError that says what is wrong."""
    start = 0.0 if start_seconds is None else float(start_seconds)
    end = math.inf if end_seconds is None else float(end_seconds)
    if not (math.isfinite(start) and start >= 0):
        raise VideoError(f"{name}: start_seconds is {start_seconds}, expected a finite number of at least 0")
    if not end > start:
        raise VideoError(f"{name}: end_seconds is {end_seconds}, expected more than start_seconds {start:g}")
    if start >= duration_seconds:
        raise VideoError(
            f"{name}: start_seconds is {start:g}, but the video ends at {duration_seconds:.3f} s"
        )
    return start, min(end, duration_seconds)


def plan_targets(
    window: tuple[float, float],
    num_frames: int | None,
    fps: float | None,
    estimated_total: float,
    find_times: Callable[[], Sequence[float]],
) -> tuple[float, ...]:
    """Chooses target times within a window; never more of them than the window has frames.

    Args:
        window: Start and end in seconds; the end does not belong to it.
        num_frames: Midpoints of that many equal segments of the window.
        fps: One target each ``1 / fps`` from the start on; above ``num_frames`` of them, as ``num_frames`` alone.
            With neither, every frame.
        estimated_total: About how many frames the window has.
        find_times: Looks up the exact times of all frames of the video; called only where they may matter.

    Returns:
        Increasing times in seconds.
    """
    start, end = window
    wanted = num_frames
    if fps is not None:
        by_rate = max(1, math.ceil((end - start) * fps - 1e-6))
        wanted = by_rate if num_frames is None else min(by_rate, num_frames)
    if wanted is None or wanted * EXACT_BELOW_RATIO >= estimated_total:
        times = tuple(time for time in find_times() if start <= time < end) or (start,)
        if wanted is None or wanted >= len(times):
            return times
    if fps is not None and wanted == by_rate:
        return tuple(start + i / fps for i in range(wanted))
    return tuple(start + (i + 0.5) * (end - start) / wanted for i in range(wanted))
