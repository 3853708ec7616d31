"""The default model, storm-smol: composed from parts that package indexes carry, without a model hub."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from storm_vlm.errors import ModelError
from storm_vlm.model.compose import ComposeOptions, VisionTower, compose_model, save_model
from storm_vlm.model.demo_parts import LANGUAGE_MODEL, VISION_ENCODER, DemoPart, fetch_part, find_part
from storm_vlm.model.efficientnet_lite import load_efficientnet_lite0
from storm_vlm.model.gguf import load_gguf_language_model
from storm_vlm.storage import cache_directory

DEFAULT_MODEL_NAME = "storm-smol"
# 256 pixels are 16x16 patches and 8x8 tokens, which a spatial_pool of 4 and of 16 divides.
_IMAGE_SIZE = (256, 256)
# The encoder was trained on pixels (x - 127) / 128.
_IMAGE_MEAN, _IMAGE_STD = (127 / 255,) * 3, (128 / 255,) * 3
_OPTIONS = ComposeOptions(temporal_pool=4, num_frames=32, frame_separator="timestamp")


def default_model_path() -> Path:
    """Returns the folder of the default model, composing it on first use if its parts are on this machine.

    Returns:
        A folder in the cache that `VideoQA.from_pretrained` loads.

    Raises:
        ModelError: A part is missing; the message says how to get it.
    """
    folder = _folder()
    if (folder / "config.json").is_file():
        return folder
    parts = {part: find_part(part) for part in (LANGUAGE_MODEL, VISION_ENCODER)}
    missing = [part.name for part, path in parts.items() if path is None]
    if missing:
        raise ModelError(
            f"the default model needs its parts ({', '.join(missing)}): run `storm setup-demo` once, or give --model"
        )
    return _compose(folder, parts)


def setup_default_model(progress: Callable[[str], None] | None = None) -> Path:
    """Fetches the parts of the default model and composes it.

    Args:
        progress: Called with one line for each step.

    Returns:
        A folder in the cache that `VideoQA.from_pretrained` loads.
    """
    parts: dict[DemoPart, Path | None] = {
        part: fetch_part(part, progress) for part in (LANGUAGE_MODEL, VISION_ENCODER)
    }
    folder = _folder()
    if not (folder / "config.json").is_file():
        if progress is not None:
            progress(f"composing {DEFAULT_MODEL_NAME}")
        _compose(folder, parts)
    return folder


def _folder() -> Path:
    """Returns the folder of this recipe: another recipe or other parts get another folder."""
    recipe = repr(
        (_OPTIONS, _IMAGE_SIZE, _IMAGE_MEAN, _IMAGE_STD, LANGUAGE_MODEL.sha256, VISION_ENCODER.sha256)
    )
    fingerprint = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    return cache_directory() / "models" / f"{DEFAULT_MODEL_NAME}-{fingerprint}"


def _compose(folder: Path, parts: dict[DemoPart, Path | None]) -> Path:
    language_model_path, vision_path = parts[LANGUAGE_MODEL], parts[VISION_ENCODER]
    if language_model_path is None or vision_path is None:
        raise ModelError("the parts of the default model are missing")
    tower = VisionTower(load_efficientnet_lite0(vision_path).eval(), _IMAGE_SIZE, _IMAGE_MEAN, _IMAGE_STD)
    language_model, tokenizer = load_gguf_language_model(language_model_path)
    model, processor = compose_model(tower, language_model, tokenizer, _OPTIONS)
    # Overwriting means: whoever comes second, after a crash or beside another process, leaves a whole model too.
    save_model(model, processor, folder, overwrite=True)
    return folder
