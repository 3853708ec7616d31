"""Measures every number of frames with every compression; what does not fit is skipped and named."""

import gc
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from storm_vlm.errors import BudgetError
from storm_vlm.model import visual_grid
from storm_vlm.model.image_processing_storm import check_size
from storm_vlm.pipeline import VideoQA
from storm_vlm.pipeline.memory import check_memory
from storm_vlm.profiling.measure import Measurement, measure
from storm_vlm.profiling.report import ProfileReport, Skipped
from storm_vlm.profiling.request import Setting
from storm_vlm.profiling.settings import ProfileSettings, compression_name
from storm_vlm.video import probe_video

# What PyTorch says where a CPU has no memory left, which is no OutOfMemoryError.
_NO_MEMORY = ("can't allocate memory", "not enough memory")


def profile(
    video_qa: VideoQA,
    video: str | Path,
    settings: ProfileSettings,
    *,
    model_name: str,
    video_name: str | None = None,
    report_progress: Callable[[str, int, int], None] = lambda *_: None,
    report_skipped: Callable[[Skipped], None] = lambda _: None,
) -> ProfileReport:
    """Measures a model.

    Args:
        video_qa: The model.
        video: The video that each request is about.
        settings: What is measured, and how often.
        model_name: Name of the model, for the report.
        video_name: Name of the video, for the report; the file's if None.
        report_progress: Is told what is measured, how many requests are done, and of how many.
        report_skipped: Is told of each setting that does not fit.

    Returns:
        The report; a compression that the model's grid of tokens does not allow is a StormError before any work.
    """
    grid = [
        Setting(frames, compression)
        for frames in settings.num_frames
        for compression in settings.compressions
    ]
    for setting in grid:
        _check_grid(video_qa, setting)
    facts = _facts(video_qa, video, settings, model_name, video_name)
    num_requests = settings.num_warm_ups + settings.num_repeats
    measurements: list[Measurement] = []
    skipped: list[Skipped] = []
    for index, setting in enumerate(grid):
        done = [index * num_requests]

        def count_request(done: list[int] = done) -> None:
            done[0] += 1
            report_progress("requests", done[0], len(grid) * num_requests)

        outcome = _measure_or_skip(video_qa, video, setting, settings, count_request)
        if isinstance(outcome, Skipped):
            skipped.append(outcome)
            report_skipped(outcome)
        else:
            measurements.append(outcome)
    return ProfileReport(facts, measurements, skipped)


def _measure_or_skip(
    video_qa: VideoQA,
    video: str | Path,
    setting: Setting,
    settings: ProfileSettings,
    count_request: Callable[[], None],
) -> Measurement | Skipped:
    frame_size = video_qa.processor.video_processor.frame_size
    try:
        check_memory(
            video_qa.model, frame_size, setting.num_frames, setting.compression, video_qa.max_memory_bytes
        )
        return measure(video_qa, video, setting, settings, count_request)
    except BudgetError as error:
        reason = str(error)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        reason = "the memory was not enough, against its estimate"
    # Only now is the error, and with it what its frames held, forgotten.
    gc.collect()
    if video_qa.model.device.type == "cuda":
        torch.cuda.empty_cache()
    return Skipped(setting, " ".join(reason.split()))


def _check_grid(video_qa: VideoQA, setting: Setting) -> None:
    """Raises a StormError for a ``spatial_pool`` that does not divide the model's grid of tokens."""
    processor = video_qa.processor.video_processor
    patch_grid = (setting.num_frames, *check_size(processor.size, processor.patch_size))
    visual_grid(patch_grid, video_qa.model.config.projector_config.downsample, setting.compression)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


def _facts(
    video_qa: VideoQA,
    video: str | Path,
    settings: ProfileSettings,
    model_name: str,
    video_name: str | None,
) -> dict[str, dict[str, object]]:
    """Returns what a reader of the figures must know."""
    metadata = probe_video(video)
    device = video_qa.model.device
    return {
        "model": {"name": model_name, **video_qa.describe()},
        "machine": {
            "processor": f"{platform.machine()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "video": {
            "name": video_name or metadata.source,
            "duration_seconds": metadata.duration_seconds,
            "num_frames": metadata.num_frames,
            "size": f"{metadata.width}x{metadata.height}",
            "codec": metadata.codec_name,
        },
        "settings": asdict(settings)
        | {"compressions": [compression_name(compression) for compression in settings.compressions]},
    }
