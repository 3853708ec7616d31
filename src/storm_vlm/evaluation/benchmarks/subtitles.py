"""Subtitles that belong to the frames shown: as a text before the question, or between the frames."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storm_vlm.errors import DataError
from storm_vlm.pipeline import Caption

_TAG = re.compile(r"<[^>]*>")
_TIMES = re.compile(r"(\d+):(\d+):(\d+)[,.](\d+)\s*-->\s*(\d+):(\d+):(\d+)[,.](\d+)")


@dataclass(frozen=True, slots=True)
class Subtitle:
    """A text and when it is shown.

    Attributes:
        start_seconds: From here on,
        end_seconds: and before this.
        text: The text on one line.
    """

    start_seconds: float
    end_seconds: float
    text: str


def read_srt(file: Path) -> tuple[Subtitle, ...]:
    """Reads a SubRip file; tags such as ``<font>`` are taken out, and subtitles without text with them.

    Args:
        file: The file.

    Returns:
        Its subtitles.

    Raises:
        DataError: It cannot be read.
    """
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    subtitles = []
    for block in re.split(r"\n\s*\n", content.replace("\r\n", "\n")):
        lines = block.strip().split("\n")
        if len(lines) >= 3 and (times := _TIMES.search(lines[1])):
            text = _TAG.sub("", " ".join(lines[2:])).strip()
            start, end = (_seconds(*times.groups()[i : i + 4]) for i in (0, 4))
            if text:
                subtitles.append(Subtitle(start, end, text))
    return tuple(subtitles)


def read_longvideobench_subtitles(
    file: Path, offset_seconds: float, duration_seconds: float
) -> tuple[Subtitle, ...]:
    """Reads a subtitle file of LongVideoBench.

    Args:
        file: A list of ``{"start", "end", "line"}`` with ``h:mm:ss.sss``, or ``{"timestamp": [start, end], "text"}``.
        offset_seconds: Time in the subtitles at which the video begins.
        duration_seconds: End of a subtitle that has none.

    Returns:
        Its subtitles, at least a second long around the same midpoint.

    Raises:
        DataError: It cannot be read, or a subtitle has other fields.

    Source:
        ``insert_subtitles_into_frames`` of LongVideoBench, longvideobench/longvideobench_dataset.py.
    """
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
        return tuple(_longvideobench_subtitle(record, offset_seconds, duration_seconds) for record in records)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file}: cannot be read as subtitles: {error}") from error
    except KeyError as error:
        raise DataError(f"{file}: a subtitle has no field {error}") from error


def shown_text(subtitles: Sequence[Subtitle], timestamps_seconds: Sequence[float]) -> str:
    """Returns the texts on screen in some frame, one a line, each once."""
    return "\n".join(
        subtitle.text
        for subtitle in subtitles
        if any(subtitle.start_seconds <= time < subtitle.end_seconds for time in timestamps_seconds)
    )


def captions_between(subtitles: Sequence[Subtitle], timestamps_seconds: Sequence[float]) -> list[Caption]:
    """Returns the midpoints and texts of the subtitles that cover a frame."""
    return [
        ((subtitle.start_seconds + subtitle.end_seconds) / 2, subtitle.text)
        for subtitle in subtitles
        if any(subtitle.start_seconds < time < subtitle.end_seconds for time in timestamps_seconds)
    ]


def _longvideobench_subtitle(
    record: dict[str, Any], offset_seconds: float, duration_seconds: float
) -> Subtitle:
    if "timestamp" in record:
        start, end = record["timestamp"]
        end = end if isinstance(end, float) else duration_seconds
        text = record["text"]
    else:
        start, end = (_clock_seconds(record[name]) for name in ("start", "end"))
        text = record["line"]
    start, end = start - offset_seconds, end - offset_seconds
    if end - start < 1:
        middle = (start + end) / 2
        start, end = middle - 0.5, middle + 0.5
    return Subtitle(start, end, text)


def _clock_seconds(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def _seconds(hours: str, minutes: str, seconds: str, fraction: str) -> float:
    return int(hours) * 3600 + int(minutes) * 60 + float(f"{seconds}.{fraction}")
