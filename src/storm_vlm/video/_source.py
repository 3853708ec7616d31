"""What a user may name as a video: a path, a folder, bytes, a file object or, when allowed, a URL."""

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from storm_vlm.errors import VideoError

VideoInput: TypeAlias = "str | Path | bytes | bytearray | memoryview | BinaryIO"

URL_SCHEMES = ("http", "https", "rtsp", "rtsps")
PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", ".avif")
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """One place that a video comes from: exactly one of ``path``, ``file`` and ``url`` is set."""

    name: str
    path: Path | None = None
    file: BinaryIO | None = None
    url: str | None = None

    def head(self, num_bytes: int) -> bytes:
        """Returns the first bytes; a file object is left at its beginning."""
        if self.path is not None:
            with self.path.open("rb") as stream:
                return stream.read(num_bytes)
        if self.file is None:
            return b""
        self.file.seek(0)
        data = self.file.read(num_bytes)
        self.file.seek(0)
        return data


def resolve_source(source: VideoInput, allow_urls: bool) -> Source:
    """Finds out what kind of source was given and that it is there.

    Args:
        source: Path, ``file://`` URL, bytes, binary file object, or network URL.
        allow_urls: Accept network URLs.

    Returns:
        The source with a name for messages.

    Raises:
        VideoError: It is not there, of no kind known, or a URL that is not allowed.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        if not data:
            raise VideoError("<0 bytes>: the video is empty, expected the content of a video file")
        return Source(f"<{len(data)} bytes>", file=io.BytesIO(data))
    if hasattr(source, "read"):
        return _resolve_file_object(cast(BinaryIO, source))
    if not isinstance(source, str | Path):
        raise VideoError(
            f"{type(source).__name__} is no video, expected a path, URL, bytes or binary file object"
        )
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", str(source)) if isinstance(source, str) else None
    if scheme is None:
        return _resolve_path(Path(source), str(source))
    if scheme[1].lower() == "file":
        return _resolve_path(Path(url2pathname(urlsplit(str(source)).path)), str(source))
    return _resolve_url(str(source), scheme[1].lower(), allow_urls)


def content_hash(source: VideoInput) -> str:
    """Computes the SHA-256 of a video's content, as a key for caches.

    Args:
        source: Path, ``file://`` URL, bytes or file object. For a folder of pictures, names and contents count.

    Returns:
        64 hexadecimal digits.

    Raises:
        VideoError: The source cannot be read, or is a network URL, whose content is not at hand.
    """
    if isinstance(source, str) and source.partition("://")[0].lower() in URL_SCHEMES:
        raise VideoError(f"{display_url(source)}: a URL has no content hash, download it first")
    resolved = resolve_source(source, allow_urls=False)
    digest = hashlib.sha256()
    if resolved.path is not None and resolved.path.is_dir():
        for picture in list_pictures(resolved):
            digest.update(f"{len(picture.name)}:{picture.name}:{picture.stat().st_size}:".encode())
            with picture.open("rb") as stream:
                _update(digest, stream)
    else:
        with open_binary(resolved) as stream:
            _update(digest, stream)
    return digest.hexdigest()


@contextmanager
def open_binary(source: Source) -> Iterator[BinaryIO]:
    """Yields the bytes of a file from their beginning; a user's file object keeps its position and stays open."""
    if source.path is not None:
        with source.path.open("rb") as stream:
            yield stream
        return
    file = cast(BinaryIO, source.file)
    position = file.tell()
    file.seek(0)
    try:
        yield file
    finally:
        file.seek(position)


def list_pictures(source: Source) -> list[Path]:
    """Returns the pictures of a folder, ``frame2`` before ``frame10``.

    Args:
        source: A folder.

    Returns:
        At least one path.

    Raises:
        VideoError: The folder has no pictures.
    """
    folder = cast(Path, source.path)
    pictures = [
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in PICTURE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    ]
    if not pictures:
        raise VideoError(
            f"{source.name}: the folder has no pictures, expected some of {' '.join(PICTURE_SUFFIXES)}"
        )
    return sorted(pictures, key=_natural_key)


def display_url(url: str) -> str:
    """Returns a URL without user, password and query, which may be secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _resolve_path(path: Path, name: str) -> Source:
    if path.is_dir():
        return Source(name, path=path)
    if not path.exists():
        raise VideoError(f"{name}: no such file or folder")
    if not path.is_file():
        raise VideoError(f"{name}: not a regular file, expected a video file or a folder of pictures")
    if path.stat().st_size == 0:
        raise VideoError(f"{name}: the file is empty, expected a video")
    return Source(name, path=path)


def _resolve_file_object(file: BinaryIO) -> Source:
    name = getattr(file, "name", None)
    shown = name if isinstance(name, str) else f"<{type(file).__name__}>"
    if not (hasattr(file, "seekable") and file.seekable()):
        raise VideoError(f"{shown}: the file object cannot seek, pass the bytes or a path instead")
    if isinstance(file, io.TextIOBase):
        raise VideoError(f"{shown}: the file object gives text, open it in binary mode")
    position = file.tell()
    if file.seek(0, io.SEEK_END) == 0:
        raise VideoError(f"{shown}: the file is empty, expected a video")
    file.seek(position)
    return Source(shown, file=file)


def _resolve_url(url: str, scheme: str, allow_urls: bool) -> Source:
    name = display_url(url)
    if scheme not in URL_SCHEMES:
        raise VideoError(
            f"{name}: the protocol {scheme} is not read, expected a path or {' '.join(URL_SCHEMES)}"
        )
    if not allow_urls:
        raise VideoError(
            f"{name}: URLs are not opened unless allowed, pass allow_urls=True (--allow-urls) or download the file"
        )
    return Source(name, url=url)


def _natural_key(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.split(r"(\d+)", path.name.lower())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts], path.name


def _update(digest: "hashlib._Hash", stream: BinaryIO) -> None:
    while block := stream.read(HASH_BLOCK_BYTES):
        digest.update(block)
