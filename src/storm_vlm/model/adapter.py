"""Adapters: what training changed, without the parts that it did not; put onto a freshly composed model.

A folder holds ``storm_adapter.json`` (how the model is composed and used) and either peft's files (LoRA and, beside it,
the projector) or ``temporal_projector.safetensors`` (the projector alone).
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from storm_vlm.errors import ModelError
from storm_vlm.model.compose import ComposeOptions
from storm_vlm.model.configuration_storm import StormConfig
from storm_vlm.model.modeling_storm import StormForConditionalGeneration
from storm_vlm.model.processing_storm import StormProcessor

_SETTINGS, _PROJECTOR, _LORA = "storm_adapter.json", "temporal_projector.safetensors", "adapter_config.json"
_LORA_WEIGHTS, _PROJECTOR_PREFIX = "adapter_model.safetensors", ".temporal_projector."
_COMPRESSION = ("temporal_pool", "spatial_pool", "temporal_sample")
_PROJECTOR_FIELDS = (
    "hidden_size", "projector_type", "downsample", "num_mamba_layers", "bidirectional", "vocabulary_readout",
    "d_state", "d_conv", "expand", "dt_rank", "norm_eps",
)  # fmt: skip


def save_adapter_settings(config: StormConfig, processor: StormProcessor, folder: Path) -> None:
    """Writes how a model is composed and used: its projector's shape, compression and frames."""
    settings = {
        "projector": {name: getattr(config.projector_config, name) for name in _PROJECTOR_FIELDS},
        **{name: getattr(config, name) for name in _COMPRESSION},
        "vision_feature_layer": config.vision_feature_layer,
        "num_llm_layers": config.text_config.num_hidden_layers,
        "num_frames": processor.video_processor.num_frames,
        "frame_separator": processor.frame_separator,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save_projector(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes the weights of a temporal projector, named as in its state dict."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, folder / _PROJECTOR)


def adapter_options(folder: Path, options: ComposeOptions) -> ComposeOptions:
    """Returns the choices that a model must be composed with to take an adapter.

    Args:
        folder: Folder of the adapter.
        options: Choices that the adapter says nothing about.

    Returns:
        ``options`` with what the adapter says; a folder without an adapter is a ModelError.
    """
    settings = _settings(folder)
    settings.pop("num_llm_layers", None)  # not a choice of composing: `apply_adapter` cuts
    return replace(options, **settings)


def apply_adapter(
    model: StormForConditionalGeneration, processor: StormProcessor, folder: Path
) -> StormForConditionalGeneration:
    """Puts an adapter onto a composed model; LoRA is merged into the language model.

    Args:
        model: Composed from the parts that the adapter was trained with, with `adapter_options` or a projector of the
            same shape. Layers of the language model that the adapter was trained without are left out.
        processor: Its processor; both get the adapter's compression, frames and separators.
        folder: Folder of the adapter.

    Returns:
        The model with the adapter's weights, in evaluation mode.

    Raises:
        ModelError: There is no adapter, or it does not fit the model.
    """
    settings = _settings(folder)
    if (num_layers := settings.pop("num_llm_layers", None)) is not None:
        keep_first_layers(model, num_layers)
    try:
        if (folder / _LORA).is_file():
            from peft import PeftModel  # noqa: PLC0415 (an optional dependency)

            with warnings.catch_warnings():
                # peft asks for a property by its old name.
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        else:
            model.temporal_projector.load_state_dict(load_file(folder / _PROJECTOR))
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"adapter {folder} does not fit the model: {str(error).splitlines()[0]}") from error
    model.config.projector_config.is_trained = True
    apply_video_settings(model, processor, **{name: settings[name] for name in (*_COMPRESSION, "num_frames")})
    processor.frame_separator = settings["frame_separator"]
    return model.eval()


def keep_first_layers(model: StormForConditionalGeneration, num_layers: int) -> None:
    """Leaves out all but the first layers of a model's language model; its last norm and its head stay.

    Args:
        model: The model, changed in place.
        num_layers: How many layers stay.

    Raises:
        ModelError: The language model has fewer, or no list of layers.
    """
    if model.config.text_config.num_hidden_layers == num_layers:
        return
    layers = getattr(model.language_model, "layers", None)
    if layers is None or len(layers) < num_layers:
        found = "no list of layers" if layers is None else f"{len(layers)} layers"
        raise ModelError(f"{num_layers} layers asked for, the language model has {found}")
    model.language_model.layers = layers[:num_layers]
    for config in (model.config.text_config, model.language_model.config):
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:num_layers]


def load_projector(model: StormForConditionalGeneration, folder: Path) -> None:
    """Loads an adapter's temporal projector into a model, and nothing else of it.

    Args:
        model: A model with a projector of the same shape.
        folder: Folder of the adapter.

    Raises:
        ModelError: There is no adapter, or its projector does not fit the model.
    """
    is_lora = (folder / _LORA).is_file()
    try:
        weights = load_file(folder / (_LORA_WEIGHTS if is_lora else _PROJECTOR))
        if is_lora:
            named = ((name.rpartition(_PROJECTOR_PREFIX), tensor) for name, tensor in weights.items())
            weights = {name: tensor for (_, prefix, name), tensor in named if prefix}
        model.temporal_projector.load_state_dict(weights)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the projector of {folder} does not fit the model: {str(error).splitlines()[0]}"
        ) from error


def apply_video_settings(
    model: StormForConditionalGeneration,
    processor: StormProcessor,
    *,
    num_frames: int,
    temporal_pool: int,
    spatial_pool: int,
    temporal_sample: int,
) -> None:
    """Makes a model and its processor agree on how videos are seen; both save it."""
    model.config.temporal_pool = temporal_pool
    model.config.spatial_pool = spatial_pool
    model.config.temporal_sample = temporal_sample
    video = processor.video_processor
    video.num_frames, video.temporal_pool = num_frames, temporal_pool
    video.spatial_pool, video.temporal_sample = spatial_pool, temporal_sample
    processor.image_processor.spatial_pool = spatial_pool
    _ = video.compression, model.config.compression  # a bad value is an error here and not at the first video


def adapter_hash(folder: Path) -> str:
    """Returns a hash of an adapter's files, its card aside: another text about a model makes no other model."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix != ".md"):
        digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()


def _settings(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no adapter: {_SETTINGS} cannot be read") from error
