"""An encoded video: its compressed tokens, when they were seen and where they come from; and the cache of them on disk.

Shapes: ``t`` frame groups, ``h`` rows, ``w`` columns of tokens, ``d`` the language model's width.
"""

import hashlib
import json
import logging
import math
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from storm_vlm.errors import StormError
from storm_vlm.model import TokenCompression
from storm_vlm.model.token_compression import Grid
from storm_vlm.storage import atomic_file

logger = logging.getLogger(__name__)

_METADATA_KEY = "storm_video_tokens"
_FORMAT_VERSION = 1
CACHE_SIZE_VARIABLE = "STORM_CACHE_MAX_BYTES"
_DEFAULT_CACHE_BYTES = 2 * 2**30
# A file that is being written is no older than this; what is older was left by a process that was killed.
_WRITING_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where encoded tokens come from.

    Attributes:
        source: Name of the video, for people.
        content_sha256: Hash of the video's bytes; None for a stream.
        duration_seconds: Length of the video.
        model_fingerprint: Hash of the weights that encoded it.
        dtype: Type that they were computed in.
        version: Version of this package.
    """

    source: str
    content_sha256: str | None
    duration_seconds: float
    model_fingerprint: str
    dtype: str
    version: str


@dataclass(frozen=True, slots=True)
class VideoTokens:
    """A video as the language model sees it.

    Attributes:
        tokens: Compressed visual tokens, ``(t, h, w, d)``.
        timestamps_seconds: Time of each frame that was read.
        patch_grid: Frames read, rows and columns of patches of each.
        num_uncompressed_tokens: Visual tokens without compression.
        compression: Token compression in use.
        provenance: Where they come from.
        seconds: Time spent for each part of the encoding.
        is_from_cache: Whether they were read from the cache.
    """

    tokens: torch.Tensor
    timestamps_seconds: tuple[float, ...]
    patch_grid: Grid
    num_uncompressed_tokens: int
    compression: TokenCompression
    provenance: Provenance
    seconds: dict[str, float] = field(default_factory=dict)
    is_from_cache: bool = False

    @property
    def num_frames(self) -> int:
        """Frames that were read."""
        return self.patch_grid[0]

    @property
    def num_visual_tokens(self) -> int:
        """Tokens that the language model gets."""
        return math.prod(self.tokens.shape[:3])

    @property
    def fraction(self) -> float:
        """Visual tokens as a fraction of those without compression."""
        return self.num_visual_tokens / self.num_uncompressed_tokens

    def line(self) -> str:
        """Returns what was encoded in one line."""
        times = " ".join(f"{part} {seconds:.2f}s" for part, seconds in self.seconds.items())
        tokens = f"{self.num_visual_tokens} visual tokens ({100 * self.fraction:.3g}% of uncompressed)"
        return f"{self.num_frames} frames | {tokens} | {'from cache' if self.is_from_cache else times}"

    def save(self, path: str | Path) -> None:
        """Writes the tokens as safetensors with their history in the header; a crash leaves no half a file."""
        header = {
            "format": _FORMAT_VERSION,
            "tokens_sha256": _sha256(self.tokens),
            "timestamps_seconds": self.timestamps_seconds,
            "patch_grid": self.patch_grid,
            "compression": asdict(self.compression),
            "provenance": asdict(self.provenance),
            "seconds": self.seconds,
        }
        with atomic_file(Path(path)) as temporary:
            save_file({"tokens": self.tokens.contiguous()}, temporary, {_METADATA_KEY: json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "VideoTokens":
        """Reads what `save` wrote.

        Args:
            path: The file.
            device: Where to put the tokens.

        Returns:
            The encoded video.

        Raises:
            StormError: The file is missing, damaged or holds something else.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                header = json.loads((file.metadata() or {})[_METADATA_KEY])
                tokens = file.get_tensor("tokens")
            return cls._from_header(tokens, header)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StormError(f"{path} holds no encoded video: {error}") from error

    @classmethod
    def _from_header(cls, tokens: torch.Tensor, header: dict[str, Any]) -> "VideoTokens":
        if header["format"] != _FORMAT_VERSION:
            raise ValueError(f"format {header['format']}, expected {_FORMAT_VERSION}")
        if header["tokens_sha256"] != _sha256(tokens):
            raise ValueError("the tokens are not those that were written")
        frames, rows, columns = header["patch_grid"]
        compression = TokenCompression(**header["compression"])
        t, h, w, _ = tokens.shape
        block = compression.spatial_block
        if not torch.isfinite(tokens).all():
            raise ValueError("the tokens are not finite")
        if compression.grid((frames, h * block, w * block)) != (t, h, w):
            raise ValueError(f"{t} groups of tokens are not what {compression} leaves of {frames} frames")
        if len(header["timestamps_seconds"]) != frames:
            raise ValueError(f"{len(header['timestamps_seconds'])} timestamps for {frames} frames")
        return cls(
            tokens=tokens,
            timestamps_seconds=tuple(header["timestamps_seconds"]),
            patch_grid=(frames, rows, columns),
            num_uncompressed_tokens=frames * h * w * compression.spatial_pool,
            compression=compression,
            provenance=Provenance(**header["provenance"]),
            seconds=header["seconds"],
        )


class VideoTokensCache:
    """Encoded videos on disk, the least recently used dropped beyond a total size.

    Args:
        folder: Where the files lie.
        max_bytes: Total size; ``$STORM_CACHE_MAX_BYTES`` or 2 GiB if None.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        self.folder = folder
        self.max_bytes = _cache_bytes() if max_bytes is None else max_bytes

    def get(self, key: str, device: torch.device) -> VideoTokens | None:
        """Returns the entry, or None; a damaged entry is logged and forgotten."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            tokens = VideoTokens.load(path, device)
        except StormError as error:
            logger.warning("encoded again, because the cache is damaged: %s", error)
            with suppress(OSError):
                path.unlink()
            return None
        # The folder may be read-only, or another process has just dropped the entry.
        with suppress(OSError):
            os.utime(path)
        return replace(tokens, is_from_cache=True)

    def put(self, key: str, tokens: VideoTokens) -> None:
        """Stores an entry and makes room for it; a full disk is logged, the tokens are good all the same."""
        num_bytes = tokens.tokens.numel() * tokens.tokens.element_size()
        if num_bytes > self.max_bytes:
            logger.info(
                "not cached: %d bytes of tokens, %s=%d", num_bytes, CACHE_SIZE_VARIABLE, self.max_bytes
            )
            return
        try:
            tokens.save(self._path(key))
            self._trim()
        except (OSError, SafetensorError) as error:
            logger.warning("the encoded video was not cached: %s", error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _trim(self) -> None:
        """Drops what was used longest ago until the rest fits, and what killed processes left."""
        entries = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError):  # another process may have dropped it
                stat = path.stat()
                is_unfinished = path.name.startswith(".")
                if is_unfinished and time.time() - stat.st_mtime > _WRITING_SECONDS:
                    path.unlink()
                elif not is_unfinished:
                    entries.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                break
            with suppress(OSError):
                path.unlink()
            total -= size


def _cache_bytes() -> int:
    given = os.environ.get(CACHE_SIZE_VARIABLE)
    if given is None:
        return _DEFAULT_CACHE_BYTES
    if not given.isdecimal():
        raise StormError(f"{CACHE_SIZE_VARIABLE} must be a number of bytes, got {given!r}")
    return int(given)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a tensor of any dtype, as they lie in memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()
