"""Times reading uniformly spaced frames of a long H.264 file: by seeking, and by decoding the file from end to end.

    python benchmarks/video_read.py --minutes 10 60 --num-frames 128 --json video_read.json

The file (640x360, 24 frames per second, at most 250 frames from keyframe to keyframe) is made once and kept in the
temporary folder. Both ways must give the same pixels before anything is timed.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from rich.console import Console
from rich.table import Table

from storm_vlm.storage import atomic_file
from storm_vlm.video import VideoReader, open_video

FRAMES_PER_SECOND = 24
HEIGHT, WIDTH = 360, 640


def make_film(minutes: float) -> Path:
    """Encodes a film with slow movement and a cut every ten seconds, unless it was made before."""
    path = Path(tempfile.gettempdir()) / f"storm-vlm-film-{minutes:g}min.mp4"
    if path.exists():
        return path
    generator = np.random.default_rng(0)
    options = {"preset": "ultrafast", "bf": "2", "g": "250"}
    with atomic_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(int(minutes * 60 * FRAMES_PER_SECOND)):
            if index % (10 * FRAMES_PER_SECOND) == 0:
                coarse = generator.integers(16, 235, (HEIGHT * 3 // 40 + 1, WIDTH // 20 + 1), dtype=np.uint8)
                scene = np.kron(coarse, np.ones((20, 20), np.uint8))[: HEIGHT * 3 // 2, :WIDTH]
            planes = np.roll(scene, index // 2 % WIDTH, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), "yuv420p")))
        container.mux(stream.encode(None))
    return path


def read_by_seeking(reader: VideoReader, targets: tuple[float, ...]) -> np.ndarray:
    """Reads the frames on screen at the targets with the package's reader."""
    return np.concatenate([chunk.frames for chunk in reader.iter_chunks(targets)])


def read_sequentially(path: Path, targets: tuple[float, ...]) -> np.ndarray:
    """Decodes everything with plain PyAV and keeps the last frame at or before each target."""
    with open_video(path) as reader:
        times = reader.plan()
    wanted = {bisect_right(times, target + 1e-9) - 1 for target in targets}
    kept = []
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                kept.append(frame.to_ndarray(format="rgb24", interpolation="BICUBIC"))
    return np.stack(kept)


def measure(run: Callable[[], object], repeats: int) -> list[float]:
    """Returns the seconds that each of several runs takes."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def compare(minutes: float, num_frames: int, repeats: int) -> dict[str, object]:
    """Checks that both ways agree on a film and times them."""
    path = make_film(minutes)

    def seek() -> np.ndarray:
        with open_video(path) as reader:
            return read_by_seeking(reader, reader.plan(num_frames))

    with open_video(path) as reader:
        targets = reader.plan(num_frames)
    if not np.array_equal(seek(), read_sequentially(path, targets)):
        sys.exit(f"{path}: seeking and sequential decoding differ")
    by_seeking = measure(seek, repeats)
    in_sequence = measure(lambda: read_sequentially(path, targets), (repeats + 1) // 2)
    return {
        "minutes": minutes,
        "num_frames": num_frames,
        "file_bytes": path.stat().st_size,
        "seek_seconds": by_seeking,
        "sequential_seconds": in_sequence,
        "ratio": statistics.median(in_sequence) / statistics.median(by_seeking),
    }


def show(results: list[dict[str, object]], machine: str) -> None:
    """Prints one row per film: median and spread of both ways and how many times faster seeking is."""
    table = Table("film", "frames", "seeking s", "sequential s", "ratio", title=machine)
    for result in results:
        cells = []
        for key in ("seek_seconds", "sequential_seconds"):
            seconds = result[key]
            cells.append(f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})")
        table.add_row(
            f"{result['minutes']:g} min", str(result["num_frames"]), *cells, f"{result['ratio']:.1f}x"
        )
    Console().print(table)


def main() -> None:
    """Runs the comparison for each length asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, nargs="+", default=[10.0], help="lengths of the films")
    parser.add_argument("--num-frames", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, PyAV {av.__version__}, libav {av.ffmpeg_version_info}"
    )
    results = [compare(minutes, arguments.num_frames, arguments.repeats) for minutes in arguments.minutes]
    show(results, machine)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
