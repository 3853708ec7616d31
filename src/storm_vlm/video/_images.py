"""Still images, animations and folders of images as frames at times, read with Pillow.

Transparent pixels are shown on white. Shapes: h rows, w columns.
"""

from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack
from itertools import accumulate
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from storm_vlm.errors import VideoError
from storm_vlm.video._source import Source, list_pictures
from storm_vlm.video.frames import VideoMetadata

T = TypeVar("T")

STILL_SECONDS = 1.0
# Browsers show frames of an animation with less than this for a tenth of a second.
SHORTEST_FRAME_SECONDS = 0.02
DEFAULT_FRAME_SECONDS = 0.1
SIGNATURES = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*")
MOTION_JPEG_SUFFIXES = (".mjpeg", ".mjpg")


def is_picture(source: Source) -> bool:
    """Tells by its first bytes whether a file is an image or animation, whatever its name."""
    if source.url is not None:
        return False
    if source.path is not None and source.path.suffix.lower() in MOTION_JPEG_SUFFIXES:
        return False
    head = source.head(12)
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return is_webp or head[4:12] in (b"ftypavif", b"ftypavis") or head.startswith(SIGNATURES)


class PictureFrames:
    """Frames of a still image or animation, or the images of a folder at a fixed rate."""

    is_endless = False

    def __init__(self, source: Source, max_pixels: int, folder_fps: float) -> None:
        self._name = source.name
        self._max_pixels = max_pixels
        self._image: Image.Image | None = None
        self._paths = list_pictures(source) if source.path is not None and source.path.is_dir() else []
        with ExitStack() as on_error:
            on_error.callback(self.close)
            if self._paths:
                durations = [1 / folder_fps] * len(self._paths)
                with self._open(self._paths[0]) as first:
                    size, format_name = self._upright_size(first), first.format
            else:
                self._image = self._open(source.path or source.file)
                size, format_name = self._upright_size(self._image), self._image.format
                durations = self._read_durations(self._image)
            on_error.pop_all()
        ends = list(accumulate(durations))
        self.times = (0.0, *ends[:-1])
        self.end_seconds = ends[-1]
        self._size = size
        self.metadata = VideoMetadata(
            duration_seconds=ends[-1],
            average_fps=len(durations) / ends[-1],
            num_frames=len(durations),
            width=size[1],
            height=size[0],
            rotation_degrees=0,
            codec_name=(format_name or "unknown").lower(),
            source=source.name,
        )

    def picture_at(self, seconds: float, resize: tuple[int, int] | None) -> tuple[float, np.ndarray] | None:
        """Returns the time and ``(h, w, 3)`` picture of the frame on screen; None after the end."""
        if seconds >= self.end_seconds:
            return None
        index = max(0, bisect_right(self.times, seconds + 1e-9) - 1)
        if self._paths:
            with self._open(self._paths[index]) as image:
                picture = self._load(image, self._paths[index].name, resize)
        elif self._image is None:
            raise VideoError(f"{self._name}: the reader is closed")
        else:
            _guarded(self._name, self._image.seek, index)
            picture = self._load(self._image, f"frame {index}", resize)
        return self.times[index], picture

    def close(self) -> None:
        """Closes the file; harmless when it is closed."""
        if self._image is not None:
            self._image.close()
            self._image = None

    def _open(self, file: object) -> Image.Image:
        image = _guarded(self._name, Image.open, file)
        width, height = image.size
        if width * height > self._max_pixels:
            image.close()
            raise VideoError(
                f"{self._name}: the picture is {width}x{height}, expected at most {self._max_pixels} pixels;"
                " pass a larger max_pixels to read it"
            )
        return image

    def _read_durations(self, image: Image.Image) -> list[float]:
        """Goes through an animation once; a frame that cannot be read ends it, if it is not the first."""
        num_frames = _guarded(self._name, getattr, image, "n_frames", 1)
        if num_frames == 1:
            return [STILL_SECONDS]
        durations = []
        for index in range(num_frames):
            _guarded(self._name, image.seek, index)
            _guarded(self._name, image.load)
            seconds = float(image.info.get("duration", 0) or 0) / 1000
            durations.append(seconds if seconds >= SHORTEST_FRAME_SECONDS else DEFAULT_FRAME_SECONDS)
        return durations

    def _upright_size(self, image: Image.Image) -> tuple[int, int]:
        """Returns ``(h, w)`` after the turn that EXIF asks for."""
        width, height = image.size
        orientation = _guarded(self._name, image.getexif).get(0x0112, 1)
        return (width, height) if orientation in (5, 6, 7, 8) else (height, width)

    def _load(self, image: Image.Image, part: str, resize: tuple[int, int] | None) -> np.ndarray:
        upright = _guarded(f"{self._name}: {part}", _to_upright_rgb, image)
        if resize is not None:
            upright = upright.resize((resize[1], resize[0]), Image.Resampling.BICUBIC)
        elif upright.size != (self._size[1], self._size[0]):
            raise VideoError(
                f"{self._name}: {part} is {upright.width}x{upright.height}, expected"
                f" {self._size[1]}x{self._size[0]} as the first picture; pass resize to make them one size"
            )
        return np.asarray(upright)


def _guarded(name: str, function: Callable[..., T], *args: object) -> T:
    """Calls Pillow; whatever a damaged picture makes it raise becomes a VideoError."""
    try:
        return function(*args)
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(f"{name}: not a picture that can be read: {error}") from error


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return upright.convert("RGB")
