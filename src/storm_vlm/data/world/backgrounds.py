"""Backgrounds: procedural textures and crops of scikit-image's photos; no family or photo is in training and test."""

import importlib.util
import random
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from storm_vlm.data.world.script import Background
from storm_vlm.errors import StormError

# Many: what was trained on few families takes a pattern that it has not met for a thing.
TRAIN_FAMILIES = (
    "gradient",
    "noise",
    "speckle",
    "contours",
    "stripes",
    "bars",
    "waves",
    "zigzag",
    "spokes",
    "grid",
    "dots",
    "mosaic",
    "photo",
)
TEST_FAMILIES = ("checks", "rings", "photo")
TRAIN_PHOTOS = ("grass.png", "hubble_deep_field.jpg", "ihc.png")
TEST_PHOTOS = ("brick.png", "gravel.png", "cell.png")
_NOISE_CELLS, _SPECKLE_CELLS = 9, 48


def draw_background_spec(rng: random.Random, *, test: bool) -> Background:
    """Draws what a background shall be, from the families of training or of the tests."""
    kind = rng.choice(TEST_FAMILIES if test else TRAIN_FAMILIES)
    photo = rng.choice(TEST_PHOTOS if test else TRAIN_PHOTOS) if kind == "photo" else None
    return Background(kind=kind, seed=rng.randrange(2**31), photo=photo)


@lru_cache(maxsize=64)
def render_background(background: Background, width: int, height: int) -> np.ndarray:
    """Draws a background.

    Args:
        background: What it is.
        width: Width in pixels.
        height: Height in pixels.

    Returns:
        Picture ``(h, w, 3)`` uint8, read-only.
    """
    rng = np.random.default_rng(background.seed)
    if background.photo is not None:
        picture = _crop_photo(background.photo, width, height, rng)
    else:
        weight = _weights(background.kind, width, height, rng)[..., None]  # (h, w, 1) in 0..1
        dark, bright = rng.uniform(40, 150, 3), rng.uniform(110, 220, 3)
        picture = (dark + (bright - dark) * weight).astype(np.uint8)
    picture.setflags(write=False)
    return picture


def _weights(kind: str, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Returns how far each pixel is from the first to the second colour, ``(h, w)`` in 0..1."""
    rows, columns = np.mgrid[:height, :width] / max(width, height)
    if kind in ("noise", "speckle", "contours"):
        noise = _noise(width, height, _SPECKLE_CELLS if kind == "speckle" else _NOISE_CELLS, rng)
        return _wave(noise * rng.uniform(15, 40)) if kind == "contours" else noise
    if kind in ("rings", "spokes"):
        down, right = rows - rng.uniform(0, 1), columns - rng.uniform(0, 1)
        if kind == "rings":
            return _wave(np.hypot(down, right) * rng.uniform(25, 60))
        return _wave(np.arctan2(down, right) * rng.integers(6, 16))
    if kind == "checks":
        cells = int(rng.integers(4, 10))
        return ((rows * cells).astype(int) + (columns * cells).astype(int)) % 2 * 1.0
    if kind == "mosaic":
        return _mosaic(rows, columns, rng)
    angle = rng.uniform(0, 2 * np.pi)
    along = rows * np.sin(angle) + columns * np.cos(angle)
    across = rows * np.cos(angle) - columns * np.sin(angle)
    return _pattern(kind, along, across, rng)


def _pattern(kind: str, along: np.ndarray, across: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the weights of families that run in a direction."""
    frequency = rng.uniform(30, 70)
    if kind == "gradient":
        return (along - along.min()) / np.ptp(along)
    if kind == "stripes":
        return _wave(along * frequency)
    if kind == "bars":
        return np.round(_wave(along * frequency))
    if kind == "waves":
        return _wave(along * frequency + rng.uniform(1, 3) * np.sin(across * rng.uniform(10, 30)))
    if kind == "zigzag":
        return np.round(_wave(along * frequency + 2 * np.abs((across * rng.uniform(3, 10)) % 2 - 1)))
    if kind == "grid":
        return np.maximum(_wave(along * frequency), _wave(across * frequency)) ** 8
    if kind == "dots":
        return (_wave(along * frequency) * _wave(across * frequency) > rng.uniform(0.4, 0.7)) * 1.0
    raise StormError(f"background family {kind!r} is unknown")


def _wave(phase: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(phase)


def _noise(width: int, height: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 255


def _mosaic(rows: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gives every pixel the weight of the closest of a few points."""
    points = rng.uniform(0, 1, (int(rng.integers(12, 50)), 2))
    distances = [np.hypot(rows - row, columns - column) for row, column in points]
    return rng.uniform(0, 1, len(points))[np.argmin(distances, axis=0)]


def _crop_photo(name: str, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts a part of a photo and lowers its contrast, so that things stand out."""
    photo = _load_photo(name)
    smallest = max(width / photo.width, height / photo.height)
    scale = rng.uniform(smallest, max(smallest, 1.0))
    crop_width, crop_height = min(photo.width, round(width / scale)), min(photo.height, round(height / scale))
    left = int(rng.integers(0, photo.width - crop_width + 1))
    top = int(rng.integers(0, photo.height - crop_height + 1))
    crop = photo.crop((left, top, left + crop_width, top + crop_height))
    pixels = np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    tint = rng.uniform(70, 190, 3)
    return (0.65 * pixels + 0.35 * tint).astype(np.uint8)


@cache
def _load_photo(name: str) -> Image.Image:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise StormError("photo backgrounds need scikit-image: pip install 'storm-vlm[world]'")
    return Image.open(Path(spec.origin).parent / "data" / name).convert("RGB")
