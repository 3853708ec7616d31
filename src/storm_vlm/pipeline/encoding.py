"""A video to visual tokens, in pieces: memory does not grow with the video but for its projected tokens.

Shapes: ``t`` frames, ``h`` rows, ``w`` columns of tokens, ``d`` width of the projector.
"""

import math
import time
from collections.abc import Callable

import torch

from storm_vlm.errors import ModelError, StormError
from storm_vlm.model import (
    FramePlan,
    StormForConditionalGeneration,
    StormVideoProcessor,
    TokenCompression,
    visual_grid,
)
from storm_vlm.model.image_processing_storm import check_size
from storm_vlm.model.vision_features import extract_features
from storm_vlm.pipeline.memory import CHUNK_FRAMES, MIX_CHUNK_TOKENS
from storm_vlm.pipeline.video_tokens import Provenance, VideoTokens
from storm_vlm.video import VideoReader

Progress = Callable[[str, int, int], None]


# Not in inference mode: a user may go on to train with the tokens.
@torch.no_grad()
def encode_frames(
    model: StormForConditionalGeneration,
    processor: StormVideoProcessor,
    reader: VideoReader,
    targets: tuple[float, ...],
    plan: FramePlan,
    provenance: Provenance,
    progress: Progress | None = None,
) -> VideoTokens:
    """Reads and encodes frames piece by piece, then mixes and compresses all tokens.

    Args:
        model: The model.
        processor: Its video processor.
        reader: The opened video.
        targets: Times of the frames in seconds.
        plan: Compression of the tokens.
        provenance: Where the tokens come from.
        progress: Called with the part, what is done and what there is to do.

    Returns:
        The encoded video.

    Raises:
        ModelError: The model gives numbers that are not finite.
    """
    stopwatch = Stopwatch(model.device)
    tokens, times = _project_frames(model, processor, reader, targets, stopwatch, progress)
    with stopwatch.part("projector"):
        mixed = model.temporal_projector.mix([tokens], chunk_size=MIX_CHUNK_TOKENS)[0]
        del tokens
    with stopwatch.part("compression"):
        # A copy, as a view would keep all tokens in memory.
        compressed = model.model.compress(mixed, plan.compression).clone()
    if not torch.isfinite(compressed).all():
        raise ModelError(
            f"{reader.metadata.source}: the model computes NaN or infinite visual tokens in {provenance.dtype}; try "
            f"dtype float32 or bfloat16, and if that is the same, its weights are damaged"
        )
    patch_grid = (len(times), *check_size(processor.size, processor.patch_size))
    uncompressed = visual_grid(patch_grid, model.config.projector_config.downsample, TokenCompression())
    return VideoTokens(
        tokens=compressed,
        timestamps_seconds=times,
        patch_grid=patch_grid,
        num_uncompressed_tokens=math.prod(uncompressed),
        compression=plan.compression,
        provenance=provenance,
        seconds=stopwatch.seconds,
    )


def _project_frames(
    model: StormForConditionalGeneration,
    processor: StormVideoProcessor,
    reader: VideoReader,
    targets: tuple[float, ...],
    stopwatch: "Stopwatch",
    progress: Progress | None,
) -> tuple[torch.Tensor, tuple[float, ...]]:
    """Returns the projected tokens of all frames and the frames' times; pixels live for one piece only."""
    tokens: torch.Tensor | None = None
    times: list[float] = []
    chunks = reader.iter_chunks(targets, chunk_frames=CHUNK_FRAMES, resize=processor.decode_size)
    while True:
        with stopwatch.part("read"):
            chunk = next(chunks, None)
            if chunk is None:
                break
            pixels = processor.to_pixel_values(chunk.frames)
        with stopwatch.part("vision"):
            features = extract_features(
                model.vision_tower,
                pixels,
                patch_size=model.config.vision_patch_size,
                feature_layer=model.config.vision_feature_layer,
            )
        with stopwatch.part("projector"):
            projected = model.temporal_projector.project(features.to(model.model.temporal_projector_device))
            if tokens is None:
                tokens = projected.new_empty(len(targets), *projected.shape[1:])  # (t, h, w, d)
            tokens[len(times) : len(times) + len(projected)] = projected
        times.extend(chunk.timestamps_seconds)
        del chunk, pixels, features, projected
        if progress is not None:
            progress("frames", len(times), len(targets))
    if tokens is None:
        raise StormError(f"{reader.metadata.source} has no frames")
    # A file that was cut short has fewer frames than it promised.
    return tokens[: len(times)], tuple(times)


class Stopwatch:
    """Adds up the time of each part; on a GPU, after its work is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    def part(self, name: str) -> "_Lap":
        """Returns a context whose time is added to ``name``."""
        return _Lap(self, name)

    def synchronize(self) -> None:
        """Waits for the GPU."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Lap:
    """One stretch of a stopwatch."""

    def __init__(self, stopwatch: Stopwatch, name: str) -> None:
        self._stopwatch, self._name = stopwatch, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._stopwatch.synchronize()
        seconds = self._stopwatch.seconds
        seconds[self._name] = seconds.get(self._name, 0.0) + time.perf_counter() - self._started
