"""Where files are cached, and writes that leave either the whole result or nothing."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from storm_vlm.errors import StormError

CACHE_VARIABLE = "STORM_CACHE"


def cache_directory() -> Path:
    """Returns the folder for everything that can be made again: ``$STORM_CACHE`` or the user's cache folder."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("storm-vlm"))


@contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder that becomes ``target`` when the block ends without an error.

    Args:
        target: The final folder; its parents are created.
        overwrite: Replace a folder that exists; otherwise that is an error.

    Yields:
        A temporary sibling of ``target``, removed if the block raises.

    Raises:
        StormError: ``target`` exists and ``overwrite`` is False.
        OSError: The folder cannot be put in its place.
    """
    if target.exists() and not overwrite:
        raise StormError(f"{target} already exists: choose another output folder or allow overwriting")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            _swap_out(target)
        try:
            temporary.rename(target)
        except OSError:
            # Another process finished the same target first: its result is as good as ours.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yields a path to write to, which replaces ``target`` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _swap_out(target: Path) -> None:
    """Moves ``target`` aside in one rename and then deletes it, so that no half-deleted folder keeps its name."""
    doomed = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(doomed / target.name)
    shutil.rmtree(doomed, ignore_errors=True)
