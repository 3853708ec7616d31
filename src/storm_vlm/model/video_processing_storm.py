"""Video processor: chooses frames, reads them with PyAV and normalises them in plain torch.

Shapes: ``t`` frames, ``h`` rows and ``w`` columns of pixels.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import BatchFeature
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, make_batched_videos

from storm_vlm.model.image_processing_storm import check_size
from storm_vlm.model.token_compression import FramePlan, TokenCompression, plan_frames
from storm_vlm.video import VideoReader, open_video

_INTERPOLATION = {
    PILImageResampling.NEAREST: "nearest-exact",
    PILImageResampling.BILINEAR: "bilinear",
    PILImageResampling.BICUBIC: "bicubic",
}


class StormVideosKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict
    """Options of `StormVideoProcessor` beside those of every video processor.

    Attributes:
        patch_size: Pixels between two patches of the vision encoder.
        downsample: Patches that the projector merges into one token.
        temporal_pool: See `TokenCompression`.
        spatial_pool: See `TokenCompression`.
        temporal_sample: See `TokenCompression`.
        token_budget: Most visual tokens for one video.
        start_seconds: Where to begin in a video file.
        end_seconds: Where to end in a video file.
        allow_urls: Whether videos may be read from the network.
    """

    patch_size: int | None
    downsample: int | None
    temporal_pool: int | None
    spatial_pool: int | None
    temporal_sample: int | None
    token_budget: int | None
    start_seconds: float | None
    end_seconds: float | None
    allow_urls: bool | None


@dataclass(frozen=True, slots=True)
class _SampledVideo:
    """The chosen frames of one video: pixels ``(t, 3, height, width)``, times if known, plan and metadata."""

    pixels: torch.Tensor
    timestamps_seconds: tuple[float, ...] | None
    compression: TokenCompression
    metadata: VideoMetadata


class StormVideoProcessor(BaseVideoProcessor):
    """Samples, resizes and normalises videos given as files, URLs, arrays or lists of pictures.

    Files are sampled uniformly over their whole length (``num_frames``) unless ``fps`` is asked; with both, ``fps`` up
    to ``num_frames``. Arrays are taken as they are unless ``num_frames``, ``fps`` or ``token_budget`` is given. More
    frames than a video has is no error. It needs no torchvision.
    """

    valid_kwargs = StormVideosKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw", "video_compression"]

    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    size = {"height": 448, "width": 448}
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    num_frames = 32
    patch_size = 14
    downsample = 4
    temporal_pool = 1
    spatial_pool = 1
    temporal_sample = 1

    def __init__(self, **kwargs: Unpack[StormVideosKwargs]) -> None:
        super().__init__(**kwargs)
        check_size(self.size, self.patch_size)
        _ = self.compression  # a bad value is an error here and not at the first video

    @property
    def compression(self) -> TokenCompression:
        """Token compression used unless a call asks for another."""
        return TokenCompression(self.temporal_pool, self.spatial_pool, self.temporal_sample)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the frames that the vision encoder gets, in pixels."""
        return self.size["height"], self.size["width"]

    @property
    def decode_size(self) -> tuple[int, int] | None:
        """Size that the reader decodes to: it scales bicubically, other filters need the full frame."""
        if not self.do_resize or self.resample != PILImageResampling.BICUBIC:
            return None
        return self.frame_size

    def plan_video(
        self,
        reader: VideoReader,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        token_budget: int | None = None,
        compression: TokenCompression | None = None,
        size: SizeDict | None = None,
    ) -> tuple[tuple[float, ...], FramePlan]:
        """Chooses the frames of a video file and the compression of its tokens.

        Args:
            reader: The opened video.
            num_frames: Frames asked for; the processor's default if neither ``fps`` nor ``token_budget`` is given.
            fps: Frames per second asked for.
            token_budget: Most visual tokens for the video.
            compression: Compression asked for; the processor's default if None.
            size: Height and width of the frames in pixels; the processor's default if None.

        Returns:
            Times to read frames at, in seconds, and the plan; a budget that not even one frame fits is a BudgetError.
        """
        compression, size = compression or self.compression, size or self.size
        if num_frames is None and fps is None and token_budget is None:
            num_frames = self.num_frames
        if fps is not None or num_frames is not None:
            targets = reader.plan(num_frames=num_frames, fps=fps)
            return targets, self._plan(len(targets), len(targets), token_budget, compression, size)
        # A budget alone: no plan holds more frames than the budget has tokens times the frames of a group.
        most_frames = max(1, token_budget or 1) * compression.frames_per_group
        available = len(reader.plan(num_frames=most_frames))
        plan = self._plan(available, None, token_budget, compression, size)
        return reader.plan(num_frames=plan.num_frames), plan

    def to_pixel_values(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Resizes, rescales and normalises frames.

        Args:
            frames: RGB frames, ``(t, h, w, 3)``, uint8 or float in 0..255.

        Returns:
            Pixels for the vision encoder, ``(t, 3, height, width)``, float32.
        """
        settings = {name: getattr(self, name) for name in self.valid_kwargs.__annotations__}
        return _normalise(_channels_first(frames), settings)

    def preprocess(self, videos: Any, **kwargs: Unpack[StormVideosKwargs]) -> BatchFeature:
        """Reads and normalises a batch of videos of any lengths.

        Args:
            videos: One or several videos: paths, URLs (with ``allow_urls``), arrays ``(t, h, w, 3)`` or
                ``(t, 3, h, w)``, lists of pictures or of paths of pictures.
            **kwargs: Options that override the processor's own; see `StormVideosKwargs`.

        Returns:
            ``pixel_values_videos`` ``(f, 3, height, width)`` with the frames of all videos, ``video_grid_thw`` and
            ``video_compression`` ``(num_videos, 3)``, ``video_timestamps`` in seconds for each frame (None where
            unknown) and, with ``return_metadata``, ``video_metadata``.

        Raises:
            TypeError: An option is unknown.
        """
        unknown = kwargs.keys() - set(self.valid_kwargs.__annotations__) - {"return_tensors"}
        if unknown:
            raise TypeError(f"unknown video options: {', '.join(sorted(unknown))}")
        asked = {name: value for name, value in kwargs.items() if value is not None}
        settings = {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__} | asked
        settings = self._standardize_kwargs(**settings)
        videos = make_batched_videos(_pictures_to_arrays(videos))
        metadata = _batched_metadata(asked.get("video_metadata"), len(videos))
        sampled = [
            self._sample(video, given, asked, settings) for video, given in zip(videos, metadata, strict=True)
        ]
        return self._to_batch(sampled, settings)

    def _sample(
        self, video: Any, metadata: VideoMetadata | None, asked: dict[str, Any], settings: dict[str, Any]
    ) -> _SampledVideo:
        """Reads one video, from a file or from memory, and normalises the frames chosen."""
        compression = TokenCompression(
            settings["temporal_pool"], settings["spatial_pool"], settings["temporal_sample"]
        )
        if isinstance(video, str | os.PathLike):
            return self._sample_file(video, asked, settings, compression)
        if isinstance(video, list):
            video = _stack_frames(video)
        return self._sample_array(video, metadata, asked, settings, compression)

    def _sample_file(
        self, source: Any, asked: dict[str, Any], settings: dict[str, Any], compression: TokenCompression
    ) -> _SampledVideo:
        with open_video(
            source,
            allow_urls=bool(settings["allow_urls"]),
            start_seconds=settings["start_seconds"],
            end_seconds=settings["end_seconds"],
        ) as reader:
            if asked.get("do_sample_frames") is False:
                num_frames: int | None = reader.metadata.num_frames
            else:
                num_frames = asked.get("num_frames")
            targets, plan = self.plan_video(
                reader,
                num_frames=num_frames,
                fps=asked.get("fps"),
                token_budget=settings["token_budget"],
                compression=compression,
                size=settings["size"],
            )
            chunks = list(reader.iter_chunks(targets, resize=_reader_size(settings)))
            pixels = torch.cat([_normalise(_channels_first(chunk.frames), settings) for chunk in chunks])
            indices = [index for chunk in chunks for index in chunk.frame_indices]
            metadata = VideoMetadata(
                total_num_frames=reader.metadata.num_frames,
                fps=reader.metadata.average_fps,
                width=reader.metadata.width,
                height=reader.metadata.height,
                duration=reader.metadata.duration_seconds,
                video_backend="pyav",
                frames_indices=indices,
            )
        times = tuple(time for chunk in chunks for time in chunk.timestamps_seconds)
        return _SampledVideo(pixels, times, plan.compression, metadata)

    def _sample_array(
        self,
        video: np.ndarray | torch.Tensor,
        metadata: VideoMetadata | None,
        asked: dict[str, Any],
        settings: dict[str, Any],
        compression: TokenCompression,
    ) -> _SampledVideo:
        frames = _channels_first(video, settings["input_data_format"])
        if frames.shape[0] == 0:
            raise ValueError("a video must have at least one frame, got 0")
        metadata = metadata or VideoMetadata(total_num_frames=frames.shape[0])
        num_frames, fps = _frames_of_array(frames.shape[0], metadata, asked, self.num_frames)
        size = (
            settings["size"]
            if settings["do_resize"]
            else {"height": frames.shape[2], "width": frames.shape[3]}
        )
        plan = self._plan(frames.shape[0], num_frames, settings["token_budget"], compression, size)
        if fps is None and num_frames is None and settings["token_budget"] is None:
            indices = list(range(frames.shape[0]))
        else:
            # The middle frame of each of num_frames equal segments, as for files.
            indices = [(2 * i + 1) * frames.shape[0] // (2 * plan.num_frames) for i in range(plan.num_frames)]
        original = metadata.frames_indices if metadata.frames_indices is not None else range(frames.shape[0])
        original = [int(original[index]) for index in indices]
        times = None if not metadata.fps else tuple(index / metadata.fps for index in original)
        metadata.frames_indices = original
        return _SampledVideo(_normalise(frames[indices], settings), times, plan.compression, metadata)

    def _plan(
        self,
        available: int,
        num_frames: int | None,
        token_budget: int | None,
        compression: TokenCompression,
        size: SizeDict | dict[str, int],
    ) -> FramePlan:
        if num_frames is None and token_budget is None:
            num_frames = available
        return plan_frames(
            check_size(size, self.patch_size),
            self.downsample,
            compression,
            available_frames=available,
            num_frames=num_frames,
            token_budget=token_budget,
        )

    def _to_batch(self, sampled: Sequence[_SampledVideo], settings: dict[str, Any]) -> BatchFeature:
        patch_size = settings["patch_size"]
        grids = [
            (video.pixels.shape[0], video.pixels.shape[2] // patch_size, video.pixels.shape[3] // patch_size)
            for video in sampled
        ]
        data = {
            "pixel_values_videos": torch.cat([video.pixels for video in sampled]),
            "video_grid_thw": torch.tensor(grids, dtype=torch.long),
            "video_compression": torch.tensor(
                [
                    (
                        video.compression.temporal_pool,
                        video.compression.spatial_pool,
                        video.compression.temporal_sample,
                    )
                    for video in sampled
                ],
                dtype=torch.long,
            ),
            "video_timestamps": [video.timestamps_seconds for video in sampled],
        }
        if settings["return_metadata"]:
            data["video_metadata"] = [video.metadata for video in sampled]
        return BatchFeature(
            data,
            tensor_type=settings["return_tensors"],
            skip_tensor_conversion=["video_timestamps", "video_metadata"],
        )


def _frames_of_array(
    total: int, metadata: VideoMetadata, asked: dict[str, Any], default_num_frames: int
) -> tuple[int | None, float | None]:
    """Returns how many of an array's frames are wanted, None for all or as the budget allows, and the fps asked."""
    if asked.get("do_sample_frames") is False:
        return None, None
    num_frames, fps = asked.get("num_frames"), asked.get("fps")
    if fps is not None:
        if not metadata.fps:
            raise ValueError(
                "fps was asked for a video without a known frame rate: give video_metadata with fps"
            )
        wanted = max(1, round(total / metadata.fps * fps))
        num_frames = wanted if num_frames is None else min(wanted, num_frames)
    elif num_frames is None and asked.get("do_sample_frames") and asked.get("token_budget") is None:
        num_frames = default_num_frames
    return (None if num_frames is None else min(num_frames, total)), fps


def _pictures_to_arrays(videos: Any) -> Any:
    """Returns videos with every Pillow picture, of whatever mode, as an RGB array."""
    if isinstance(videos, Image.Image):
        return np.asarray(videos.convert("RGB"))
    if isinstance(videos, list | tuple):
        return [_pictures_to_arrays(video) for video in videos]
    return videos


def _stack_frames(frames: list[Any]) -> np.ndarray:
    """Returns frames given as arrays or paths of pictures as one array ``(t, h, w, 3)``."""
    arrays = [
        np.asarray(Image.open(frame).convert("RGB") if isinstance(frame, str | os.PathLike) else frame)
        for frame in frames
    ]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        raise ValueError(f"the frames of a video must have one size, got {sorted(shapes)}")
    return np.stack(arrays)


def _reader_size(settings: dict[str, Any]) -> tuple[int, int] | None:
    """Returns the size to decode to: the reader scales bicubically, other filters take the full frame."""
    if not settings["do_resize"] or settings["resample"] != PILImageResampling.BICUBIC:
        return None
    return settings["size"]["height"], settings["size"]["width"]


def _channels_first(frames: np.ndarray | torch.Tensor, input_data_format: str | None = None) -> torch.Tensor:
    """Returns frames as ``(t, 3, h, w)``; channels are looked for last and then second, unless said."""
    frames = torch.as_tensor(np.ascontiguousarray(frames) if isinstance(frames, np.ndarray) else frames)
    if frames.ndim != 4:
        raise ValueError(
            f"a video must have 4 dimensions (frames, height, width, 3), got shape {tuple(frames.shape)}"
        )
    layout = str(getattr(input_data_format, "value", input_data_format or ""))
    if frames.shape[-1] == 3 and layout != "channels_first":
        return frames.permute(0, 3, 1, 2)
    if frames.shape[1] == 3 and layout != "channels_last":
        return frames
    raise ValueError(f"a video must have 3 colour channels, got shape {tuple(frames.shape)}")


def _normalise(frames: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """Resizes, rescales and normalises frames ``(t, 3, h, w)``."""
    pixels = frames.to(torch.float32)
    if settings["do_resize"]:
        size = settings["size"]["height"], settings["size"]["width"]
        if tuple(pixels.shape[2:]) != size:
            mode = _INTERPOLATION[PILImageResampling(settings["resample"])]
            antialias = mode != "nearest-exact"
            pixels = functional.interpolate(pixels, size, mode=mode, antialias=antialias)
            if not frames.is_floating_point():
                pixels = pixels.round_().clamp_(0, 255)
    else:
        check_size({"height": pixels.shape[2], "width": pixels.shape[3]}, settings["patch_size"])
    if settings["do_rescale"]:
        pixels = pixels * settings["rescale_factor"]
    if settings["do_normalize"]:
        mean, std = (torch.tensor(settings[name]).view(-1, 1, 1) for name in ("image_mean", "image_std"))
        pixels = (pixels - mean) / std
    if not torch.isfinite(pixels).all():
        raise ValueError("the video has NaN or infinite pixels")
    return pixels.contiguous()


def _batched_metadata(given: Any, num_videos: int) -> list[VideoMetadata | None]:
    """Returns the metadata of each video as objects, from a dict, an object or (nested) lists of them."""
    if given is None:
        return [None] * num_videos
    flat: list[Any] = given if isinstance(given, list) else [given]
    if flat and isinstance(flat[0], list):
        flat = [entry for entries in flat for entry in entries]
    if len(flat) != num_videos:
        raise ValueError(f"{num_videos} videos but {len(flat)} entries of video_metadata")
    return [VideoMetadata(**entry) if isinstance(entry, dict) else entry for entry in flat]
