"""Examples on disk with the features of a frozen vision encoder in place of pixels.

An example is two kinds of files: its texts, and the patch features of each of its pictures and videos, which other
records about the same file share. Both are found by a hash of all that they depend on.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from storm_vlm.data.record import ItemType, Record
from storm_vlm.storage import atomic_file

_FEATURES = "features"
_MEDIA: tuple[ItemType, ...] = ("image", "video")
PIXEL_NAMES: dict[ItemType, str] = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True, slots=True)
class FeatureCache:
    """A folder of encoded examples.

    Attributes:
        folder: Where they lie; made when something is written.
        media_context: What features depend on beside the files: encoder, precision, frames and their size.
        text_context: What texts depend on beside the records: all settings of the processor.
    """

    folder: Path
    media_context: str
    text_context: str

    def load(self, record: Record) -> dict[str, torch.Tensor] | None:
        """Returns an example, or None if it was not saved or a file of it has changed since.

        Args:
            record: The record.

        Returns:
            What `encode_record` returns, with ``image_patch_features`` ``(num_images, h, w, c)`` and
            ``video_patch_features`` ``(f, h, w, c)`` in place of pixels.
        """
        try:
            example = load_file(self._example_file(record))
            for kind in _MEDIA:
                if paths := record.paths(kind):
                    features = [load_file(self._media_file(path))[_FEATURES] for path in paths]
                    example[f"{kind}_patch_features"] = torch.cat(features)
        except (OSError, SafetensorError, KeyError):
            return None
        return example

    def holds(self, record: Record) -> bool:
        """Returns whether an example was saved and no file of it has changed since; a missing file is an OSError."""
        has_features = all(self.holds_features(record, kind) for kind in _MEDIA)
        return has_features and self._example_file(record).is_file()

    def holds_features(self, record: Record, kind: ItemType) -> bool:
        """Returns whether the features of all pictures, or all videos, of a record were saved, for it or another."""
        return all(self._media_file(path).is_file() for path in record.paths(kind))

    def save(
        self, record: Record, example: Mapping[str, torch.Tensor], features: Mapping[ItemType, torch.Tensor]
    ) -> None:
        """Writes an example.

        Args:
            record: The record.
            example: What `encode_record` made of it.
            features: Patch features of all images, and of the frames of all videos, ``(f, h, w, c)``.
        """
        num_frames = {"image": [1] * len(record.paths("image"))}
        if "video_grid_thw" in example:
            num_frames["video"] = example["video_grid_thw"][:, 0].tolist()
        for kind, frames in features.items():
            for path, piece in zip(record.paths(kind), frames.split(num_frames[kind]), strict=True):
                if not (file := self._media_file(path)).is_file():
                    _save({_FEATURES: piece}, file)
        texts = {name: tensor for name, tensor in example.items() if name not in PIXEL_NAMES.values()}
        # Last: an example whose file is there is whole.
        _save(texts, self._example_file(record))

    def _example_file(self, record: Record) -> Path:
        files = [_identity(path) for kind in _MEDIA for path in record.paths(kind)]
        return self._file("examples", [self.text_context, self.media_context, asdict(record), files])

    def _media_file(self, path: Path) -> Path:
        return self._file(_FEATURES, [self.media_context, _identity(path)])

    def _file(self, part: str, content: object) -> Path:
        name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return self.folder / part / name[:2] / f"{name}.safetensors"


def _identity(path: Path) -> list[str | int]:
    """Returns what tells a file's content from another without reading it."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    with atomic_file(file) as path:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
