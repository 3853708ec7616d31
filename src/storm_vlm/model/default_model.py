"""The default model, storm-smol: composed from parts that package indexes carry, without a model hub."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from storm_vlm.errors import ModelError
from storm_vlm.model.adapter import adapter_hash, adapter_options, apply_adapter
from storm_vlm.model.compose import ComposeOptions, VisionTower, compose_model, save_model
from storm_vlm.model.demo_parts import LANGUAGE_MODEL, VISION_ENCODER, DemoPart, fetch_part, find_part
from storm_vlm.model.efficientnet_lite import load_efficientnet_lite0
from storm_vlm.model.gguf import load_gguf_language_model
from storm_vlm.model.modeling_storm import StormForConditionalGeneration
from storm_vlm.model.processing_storm import StormProcessor
from storm_vlm.storage import cache_directory

DEFAULT_MODEL_NAME = "storm-smol"
# 192 pixels are 12x12 patches and 6x6 tokens, which a spatial_pool of 4 makes 3x3.
_IMAGE_SIZE = (192, 192)
# The encoder was trained on pixels (x - 127) / 128.
_IMAGE_MEAN, _IMAGE_STD = (127 / 255,) * 3, (128 / 255,) * 3
# What training made of it, if this package ships it: see `adapter`.
_ADAPTER = Path(__file__).parent / DEFAULT_MODEL_NAME
_OPTIONS = ComposeOptions(temporal_pool=2, spatial_pool=4, num_frames=32, frame_separator="timestamp")


def default_model_path() -> Path:
    """Returns the folder of the default model, composing it on first use if its parts are on this machine.

    Returns:
        A folder in the cache that `VideoQA.from_pretrained` loads; a missing part is a ModelError that says how to
        get it.
    """
    folder = _folder()
    if (folder / "config.json").is_file():
        return folder
    return _compose(folder, _found_parts())


def setup_default_model(progress: Callable[[str], None] | None = None) -> Path:
    """Fetches the parts of the default model and composes it.

    Args:
        progress: Called with one line for each step.

    Returns:
        A folder in the cache that `VideoQA.from_pretrained` loads.
    """
    parts = {part: fetch_part(part, progress) for part in (LANGUAGE_MODEL, VISION_ENCODER)}
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
    if _ADAPTER.is_dir():
        recipe += adapter_hash(_ADAPTER)
    fingerprint = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    return cache_directory() / "models" / f"{DEFAULT_MODEL_NAME}-{fingerprint}"


def compose_default_parts(
    options: ComposeOptions = _OPTIONS,
) -> tuple[StormForConditionalGeneration, StormProcessor]:
    """Composes a model from the parts of the default model, with other choices than its own.

    Args:
        options: Choices for the projector, the compression and the frames.

    Returns:
        The model in evaluation mode and its processor; a missing part is a ModelError that says how to get it.
    """
    return _compose_parts(_found_parts(), options)


def load_default_vision_tower(image_size: tuple[int, int] = _IMAGE_SIZE) -> VisionTower:
    """Loads the default model's vision encoder, to compose it with other language models.

    Args:
        image_size: Height and width of its frames in pixels.

    Returns:
        The encoder; a missing part is a ModelError that says how to get it.
    """
    return _vision_tower(_found_parts(), image_size)


def _vision_tower(parts: dict[DemoPart, Path], image_size: tuple[int, int]) -> VisionTower:
    encoder = load_efficientnet_lite0(parts[VISION_ENCODER]).eval()
    return VisionTower(encoder, image_size, _IMAGE_MEAN, _IMAGE_STD)


def _found_parts() -> dict[DemoPart, Path]:
    found = {part: find_part(part) for part in (LANGUAGE_MODEL, VISION_ENCODER)}
    missing = [part.name for part, path in found.items() if path is None]
    if missing:
        raise ModelError(
            f"the default model needs its parts ({', '.join(missing)}): run `storm setup-demo` once, or give --model"
        )
    return {part: path for part, path in found.items() if path is not None}


def _compose_parts(
    parts: dict[DemoPart, Path], options: ComposeOptions
) -> tuple[StormForConditionalGeneration, StormProcessor]:
    language_model, tokenizer = load_gguf_language_model(parts[LANGUAGE_MODEL])
    return compose_model(_vision_tower(parts, _IMAGE_SIZE), language_model, tokenizer, options)


def _compose(folder: Path, parts: dict[DemoPart, Path]) -> Path:
    if _ADAPTER.is_dir():
        model, processor = _compose_parts(parts, adapter_options(_ADAPTER, _OPTIONS))
        model = apply_adapter(model, processor, _ADAPTER)
    else:
        model, processor = _compose_parts(parts, _OPTIONS)
    # Overwriting means: whoever comes second, after a crash or beside another process, leaves a whole model too.
    save_model(model, processor, folder, overwrite=True)
    return folder
