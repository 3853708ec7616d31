"""Measures VideoQA: memory and time of encoding a long video, and the first token of a first and a second question.

    python benchmarks/pipeline.py --minutes 10 --num-frames 64 256 --json pipeline.json

Each row is measured in a process of its own, on a generated film (see video_read.py), without the cache on disk. Memory
is the peak of the resident set over what the process holds once the model is loaded and its weights are in memory.
Before anything is timed, the answer that uses the kept keys and values must equal one that does not.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table
from video_read import make_film

from storm_vlm.model.default_model import default_model_path
from storm_vlm.pipeline import VideoQA, VideoTokens, estimate_memory

FIRST_QUESTION = "What happens in this video?"
OTHER_QUESTIONS = ("Which colours do you see?", "Does the camera move?", "How does it end?")
MIB = 2**20


class PeakMemory:
    """Watches the resident set of this process, every two milliseconds."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.idle_bytes = self.peak_bytes = self._process.memory_info().rss

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Notes the peak while the block runs."""
        is_done = threading.Event()

        def sample() -> None:
            while not is_done.wait(0.002):
                self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            is_done.set()
            thread.join()


def load(arguments: argparse.Namespace) -> VideoQA:
    """Loads the model and brings its weights into memory, so that they do not count as the work's."""
    transformers.utils.logging.disable_progress_bar()
    video_qa = VideoQA.from_pretrained(
        arguments.model or default_model_path(),
        device=arguments.device,
        dtype=arguments.dtype,
        use_cache=False,
    )
    for parameter in video_qa.model.parameters():
        parameter.sum()
    return video_qa


def encode(video_qa: VideoQA, arguments: argparse.Namespace) -> VideoTokens:
    """Encodes the film as asked."""
    return video_qa.encode(
        make_film(arguments.minutes),
        num_frames=arguments.num_frames[0],
        temporal_pool=arguments.temporal_pool,
        spatial_pool=arguments.spatial_pool,
        temporal_sample=arguments.temporal_sample,
    )


def measure_encoding(arguments: argparse.Namespace) -> dict[str, Any]:
    """Encodes the film once and notes peak memory and the time of each part."""
    video_qa = load(arguments)
    memory = PeakMemory()
    started = time.perf_counter()
    with memory.watch():
        video = encode(video_qa, arguments)
    estimate = estimate_memory(
        video_qa.model, video_qa.processor.video_processor.frame_size, video.num_frames, video.compression
    )
    return {
        "num_frames": video.num_frames,
        "num_visual_tokens": video.num_visual_tokens,
        "num_uncompressed_tokens": video.num_uncompressed_tokens,
        "idle_bytes": memory.idle_bytes,
        "peak_over_idle_bytes": memory.peak_bytes - memory.idle_bytes,
        "estimated_bytes": estimate.encode_bytes,
        "total_seconds": time.perf_counter() - started,
        "seconds": video.seconds,
    }


def measure_questions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times the first token of a question whose video is new to the language model, and of the questions after it."""
    video_qa = load(arguments)
    video = encode(video_qa, arguments)
    check_kept_keys(video_qa, video)
    first, second, peak = [], [], 0
    for _ in range(arguments.repeats):
        asker = VideoQA(video_qa.model, video_qa.processor)
        memory = PeakMemory()
        with memory.watch():
            answer = asker.ask(video, FIRST_QUESTION, max_new_tokens=4)
            answer.text()
        peak = max(peak, memory.peak_bytes - memory.idle_bytes)
        first.append(answer.report.time_to_first_token_seconds)
        num_prompt_tokens = answer.report.num_prompt_tokens
        for question in OTHER_QUESTIONS:
            answer = asker.ask(video, question, max_new_tokens=4)
            answer.text()
            second.append(answer.report.time_to_first_token_seconds)
        num_cached_tokens = answer.report.num_cached_tokens
    return {
        "num_frames": video.num_frames,
        "num_visual_tokens": video.num_visual_tokens,
        "num_prompt_tokens": num_prompt_tokens,
        "num_cached_tokens": num_cached_tokens,
        "first_seconds": first,
        "second_seconds": second,
        "peak_over_idle_bytes": peak,
        "ratio": statistics.median(first) / statistics.median(second),
    }


def check_kept_keys(video_qa: VideoQA, video: VideoTokens) -> None:
    """Ends the benchmark unless a question after another is answered as if it came first."""
    video_qa.ask(video, FIRST_QUESTION, max_new_tokens=8).text()
    for question in OTHER_QUESTIONS[:1]:
        kept = video_qa.ask(video, question, max_new_tokens=8).text()
        cold = VideoQA(video_qa.model, video_qa.processor).ask(video, question, max_new_tokens=8).text()
        if kept != cold:
            sys.exit(f"{question!r}: {kept!r} with kept keys, {cold!r} without")


def run_apart(what: str, num_frames: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures in a fresh process."""
    options = [
        "--minutes",
        str(arguments.minutes),
        "--num-frames",
        str(num_frames),
        "--device",
        arguments.device,
    ]
    options += ["--dtype", arguments.dtype, "--repeats", str(arguments.repeats)]
    for name in ("model", "temporal_pool", "spatial_pool", "temporal_sample"):
        if (value := getattr(arguments, name)) is not None:
            options += [f"--{name.replace('_', '-')}", str(value)]
    finished = subprocess.run(
        [sys.executable, __file__, "--measure", what, *options],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        sys.exit(finished.returncode)
    return json.loads(finished.stdout.splitlines()[-1])


def show(encodings: list[dict[str, Any]], questions: list[dict[str, Any]], title: str) -> None:
    """Prints one row for each number of frames: memory and time of encoding, and the first tokens."""
    table = Table("frames", "tokens", "peak over idle", "estimated", "total s", "time per part", title=title)
    for row in encodings:
        table.add_row(
            str(row["num_frames"]),
            f"{row['num_visual_tokens']} of {row['num_uncompressed_tokens']}",
            f"{row['peak_over_idle_bytes'] / MIB:.0f} MiB",
            f"{row['estimated_bytes'] / MIB:.0f} MiB",
            f"{row['total_seconds']:.2f}",
            " ".join(f"{part} {seconds:.2f}" for part, seconds in row["seconds"].items()),
        )
    Console().print(table)
    table = Table(
        "frames", "prompt", "kept", "peak over idle", "first question s", "second question s", "ratio"
    )
    for row in questions:
        first, second = (
            f"{statistics.median(row[key]):.3f} ({min(row[key]):.3f} to {max(row[key]):.3f})"
            for key in ("first_seconds", "second_seconds")
        )
        table.add_row(
            str(row["num_frames"]), str(row["num_prompt_tokens"]), str(row["num_cached_tokens"]),
            f"{row['peak_over_idle_bytes'] / MIB:.0f} MiB", first, second, f"{row['ratio']:.1f}x",
        )  # fmt: skip
    table.title = "time to first token"
    Console().print(table)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub id [default: storm-smol]")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the film")
    parser.add_argument("--num-frames", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--temporal-pool", type=int)
    parser.add_argument("--spatial-pool", type=int)
    parser.add_argument("--temporal-sample", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="first questions to time")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--measure", choices=["encoding", "questions"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures each number of frames, each in a process of its own."""
    arguments = parse_arguments()
    if arguments.measure is not None:
        measure = measure_encoding if arguments.measure == "encoding" else measure_questions
        print(json.dumps(measure(arguments)))
        return
    make_film(arguments.minutes)
    encodings = [run_apart("encoding", count, arguments) for count in arguments.num_frames]
    questions = [run_apart("questions", count, arguments) for count in arguments.num_frames]
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    show(encodings, questions, f"{arguments.minutes:g} minutes of film; {machine}")
    if arguments.json is not None:
        facts = {"machine": machine, "encodings": encodings, "questions": questions}
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
