"""Processor: text, images and videos to the inputs of a STORM model."""

import functools
import logging
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import AudioKwargs, MultiModalData, ProcessingKwargs, TextKwargs

from storm_vlm.model.image_processing_storm import StormImageProcessor, StormImagesKwargs, check_size
from storm_vlm.model.token_compression import TokenCompression, visual_grid
from storm_vlm.model.video_processing_storm import StormVideoProcessor, StormVideosKwargs

logger = logging.getLogger(__name__)

FrameSeparator = Literal["none", "newline", "timestamp"]


_PART_CLASSES = {
    "image_processor": StormImageProcessor,
    "tokenizer": PreTrainedTokenizerBase,
    "video_processor": StormVideoProcessor,
}


class StormProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict
    """Options of a call, sorted by the part that they go to."""

    images_kwargs: StormImagesKwargs
    videos_kwargs: StormVideosKwargs
    # Padding on the left, so that a batch can generate; training takes either side.
    _defaults = {"text_kwargs": {"padding": False, "padding_side": "left"}}


_OPTION_NAMES = {"common_kwargs", *ProcessingKwargs.__annotations__}.union(
    *(group.__annotations__ for group in (TextKwargs, AudioKwargs, StormImagesKwargs, StormVideosKwargs))
)


class StormProcessor(ProcessorMixin):
    """Joins the tokenizer, the image processor and the video processor of a STORM model.

    Each ``<image>`` and ``<video>`` in a text becomes as many placeholders as the model makes visual tokens; the frame
    groups of a video are told apart by a separator.

    Args:
        image_processor: A `StormImageProcessor`.
        tokenizer: The language model's tokenizer, with both placeholders as special tokens.
        video_processor: A `StormVideoProcessor`.
        chat_template: Jinja template for messages with items of type text, image and video.
        image_token: Placeholder of images.
        video_token: Placeholder of videos.
        frame_separator: Nothing, a newline after each frame group, or its time in front of it, ``[12.5s]``.

    Raises:
        ValueError: ``frame_separator`` is unknown or a placeholder is not one token of the tokenizer.
    """

    valid_processor_kwargs = StormProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        frame_separator: FrameSeparator = "timestamp",
    ) -> None:
        if frame_separator not in ("none", "newline", "timestamp"):
            raise ValueError(f"frame_separator must be none, newline or timestamp, got {frame_separator!r}")
        self.image_token = image_token
        self.video_token = video_token
        self.frame_separator = frame_separator
        self.image_token_id = _placeholder_id(tokenizer, image_token)
        self.video_token_id = _placeholder_id(tokenizer, video_token)
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Turns texts with placeholders, and the pictures and videos that they stand for, into model inputs.

        Args:
            images: One or several pictures, or a list of them for each text.
            text: One or several texts.
            videos: One or several videos, or a list of them for each text; see `StormVideoProcessor.preprocess`.
            audio: None; no STORM model listens.
            **kwargs: Options of the tokenizer, the image processor and the video processor.

        Returns:
            The model's inputs.

        Raises:
            TypeError: An option is unknown.
        """
        unknown = kwargs.keys() - _OPTION_NAMES
        if unknown:
            raise TypeError(f"unknown processor options: {', '.join(sorted(unknown))}")
        return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

    @property
    def unused_input_names(self) -> list[str]:
        """Names that the video processor returns for the placeholders and that the model does not take."""
        return ["video_timestamps"]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """Returns the class that a part must have; transformers' own check needs torchvision.

        Args:
            argument_name: Name of the part.
            argument: The part.

        Returns:
            The class.

        Raises:
            TypeError: The part is of another class.
        """
        expected = _PART_CLASSES[argument_name]
        if not isinstance(argument, expected):
            raise TypeError(f"{argument_name} must be a {expected.__name__}, got {type(argument).__name__}")
        return expected

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any
    ) -> Any:
        """Returns the inputs in the form that transformers expects; a `pathlib.Path` becomes a string."""
        return super().prepare_inputs_layout(
            images=images, text=text, videos=_paths_to_strings(videos), **kwargs
        )

    def get_text_with_replacements(
        self,
        text: list[str],
        images_replacements: Sequence[str] = (),
        videos_replacements: Sequence[str] = (),
        audio_replacements: Sequence[str] = (),
    ) -> Any:
        """Puts the placeholders of each picture and video where it is mentioned; transformers 5.17 does not count.

        Args:
            text: Texts that mention each picture and video once; changed in place.
            images_replacements: Placeholders of each image.
            videos_replacements: Placeholders of each video.
            audio_replacements: Nothing.

        Returns:
            The texts, and where what was replaced.

        Raises:
            ValueError: The texts mention more or fewer than there are.
        """
        given = ((self.image_token, images_replacements), (self.video_token, videos_replacements))
        for token, replacements in given:
            count = sum(sample.count(token) for sample in text)
            if replacements and count != len(replacements):
                raise ValueError(f"the text has {count} {token} but {len(replacements)} were given")
        return super().get_text_with_replacements(
            text, images_replacements, videos_replacements, audio_replacements
        )

    def replace_image_token(self, image_inputs: BatchFeature, image_idx: int, **kwargs: Any) -> str:
        """Returns the placeholders of one image."""
        compression = TokenCompression(*map(int, image_inputs["image_compression"][image_idx]))
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        patch_size = self.image_processor.patch_size
        grid = visual_grid(
            (1, height // patch_size, width // patch_size), self.image_processor.downsample, compression
        )
        return self.image_token * math.prod(grid)

    def replace_video_token(self, video_inputs: BatchFeature, video_idx: int, **kwargs: Any) -> str:
        """Returns the placeholders of one video, with the separators between its frame groups."""
        t, h, w = map(int, video_inputs["video_grid_thw"][video_idx])
        compression = TokenCompression(*map(int, video_inputs["video_compression"][video_idx]))
        timestamps = video_inputs["video_timestamps"][video_idx]
        return self.video_text((t, h, w), compression, timestamps)

    def video_text(
        self,
        patch_grid: tuple[int, int, int],
        compression: TokenCompression,
        timestamps_seconds: tuple[float, ...] | None,
    ) -> str:
        """Writes a video as text: the placeholders of each frame group and the separators.

        Args:
            patch_grid: Frames, rows and columns of patches.
            compression: Token compression of this video.
            timestamps_seconds: Time of each frame; None if unknown, which turns timestamps into newlines.

        Returns:
            Text with one placeholder for each visual token.
        """
        return "".join(self.frame_group_texts(patch_grid, compression, timestamps_seconds))

    def frame_group_texts(
        self,
        patch_grid: tuple[int, int, int],
        compression: TokenCompression,
        timestamps_seconds: tuple[float, ...] | None,
    ) -> list[str]:
        """Writes each frame group of a video as text, with its separator; see `video_text`."""
        num_groups, rows, columns = visual_grid(patch_grid, self.video_processor.downsample, compression)
        group = self.video_token * (rows * columns)
        separator = self.frame_separator
        if separator == "timestamp" and timestamps_seconds is None:
            _warn_of_unknown_times()
            separator = "newline"
        if separator == "timestamp" and timestamps_seconds is not None:
            # A group bears the time of its first frame.
            starts = timestamps_seconds[:: compression.frames_per_group]
            return [f"[{start:.1f}s]{group}" for start in starts]
        return [group + "\n" if separator == "newline" else group] * num_groups

    def _get_num_multimodal_tokens(
        self,
        image_sizes: list[tuple[int, int]] | None = None,
        video_sizes: list[tuple[int, int, int]] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Returns the number of placeholders for pictures (height, width) and videos (frames, height, width).

        Serving engines ask this before they have the pixels; every picture is resized to the processor's size.
        """
        merged = self._merge_kwargs(StormProcessorKwargs, **kwargs) if kwargs else {}
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            tokens = math.prod(self._grid(self.image_processor, 1, merged.get("images_kwargs", {})))
            data["num_image_tokens"] = [tokens] * len(image_sizes)
            data["num_image_patches"] = [1] * len(image_sizes)
        if video_sizes is not None:
            options = merged.get("videos_kwargs", {})
            data["num_video_tokens"] = [
                math.prod(self._grid(self.video_processor, num_frames, options))
                for num_frames, _, _ in video_sizes
            ]
        return MultiModalData(**data)

    def _grid(self, part: Any, num_frames: int, options: Any) -> tuple[int, int, int]:
        names = ("temporal_pool", "spatial_pool", "temporal_sample")
        compression = TokenCompression(*(options.get(name) or int(getattr(part, name, 1)) for name in names))
        rows, columns = check_size(options.get("size") or part.size, part.patch_size)
        return visual_grid((num_frames, rows, columns), part.downsample, compression)


@functools.cache
def _warn_of_unknown_times() -> None:
    logger.warning(
        "a video without a known frame rate: its frame groups are separated by newlines, not by times"
    )


def _placeholder_id(tokenizer: Any, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {token!r}: add it as a special token")
    return token_id


def _paths_to_strings(videos: Any) -> Any:
    if isinstance(videos, os.PathLike):
        return os.fspath(videos)
    if isinstance(videos, list | tuple):
        return [_paths_to_strings(video) for video in videos]
    return videos
