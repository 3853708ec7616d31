"""Clips shared by the tests of the room: each is made once per run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.video.clips import write_clip

Clip = tuple[Path, tuple[float, ...]]


@pytest.fixture(scope="session")
def make_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Clip]:
    """Returns a function that writes a clip with given settings once and gives its path and true times."""
    folder = tmp_path_factory.mktemp("clips")
    made: dict[tuple[object, ...], Clip] = {}

    def make(name: str = "clip.mp4", **settings: object) -> Clip:
        key = (name, repr(sorted(settings.items())))
        if key not in made:
            path = folder / f"{len(made)}_{name}"
            made[key] = (path, write_clip(path, **settings))
        return made[key]

    return make


@pytest.fixture
def clip(make_clip: Callable[..., Clip]) -> Path:
    """Fifty numbered frames at 25 per second."""
    return make_clip()[0]
