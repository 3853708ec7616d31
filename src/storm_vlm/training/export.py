"""What a run leaves: the whole model, and the adapter with the trained weights alone."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from storm_vlm.model import StormConfig, StormProcessor
from storm_vlm.model.adapter import apply_adapter, save_adapter_settings, save_projector
from storm_vlm.model.compose import save_model
from storm_vlm.storage import atomic_file
from storm_vlm.training.model import make_model
from storm_vlm.training.recipe import Recipe

MODEL_FOLDER, ADAPTER_FOLDER = "model", "adapter"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PROJECTOR_PREFIX = "model.temporal_projector."


def export_trained(
    trainer: Trainer, recipe: Recipe, processor: StormProcessor, config: StormConfig
) -> list[Path]:
    """Writes the trained model and the adapter, as the recipe asks; every process must call this.

    Args:
        trainer: After training.
        recipe: Says what is written, and where.
        processor: Saved beside the model.
        config: The model's config.

    Returns:
        The folders written.
    """
    export = _export_lora if recipe.lora is not None else _export_weights
    written = export(trainer, recipe, processor, config)
    trainer.accelerator.wait_for_everyone()
    return written


def _export_lora(
    trainer: Trainer, recipe: Recipe, processor: StormProcessor, config: StormConfig
) -> list[Path]:
    """Writes the adapter, from which the merged model is made."""
    model_folder, adapter_folder = (recipe.output.folder / name for name in (MODEL_FOLDER, ADAPTER_FOLDER))
    trainer.save_model(str(adapter_folder))
    if trainer.is_world_process_zero():
        _keep_adapter_alone(adapter_folder)
        _cast_weights(adapter_folder / _ADAPTER_FILES[1], recipe.output.adapter_dtype)
        save_adapter_settings(config, processor, adapter_folder)
        if recipe.output.merged:
            base, base_processor = make_model(recipe)
            merged = apply_adapter(base, base_processor, adapter_folder)
            save_model(merged, base_processor, model_folder, overwrite=True)
    return [adapter_folder, model_folder] if recipe.output.merged else [adapter_folder]


def _export_weights(
    trainer: Trainer, recipe: Recipe, processor: StormProcessor, config: StormConfig
) -> list[Path]:
    """Writes the model and, if nothing else was trained, the projector alone."""
    model_folder, adapter_folder = (recipe.output.folder / name for name in (MODEL_FOLDER, ADAPTER_FOLDER))
    written: list[Path] = []
    if recipe.output.merged:
        trainer.save_model(str(model_folder))
        if trainer.is_world_process_zero():
            # A pickle, and nothing that a user of the model needs.
            (model_folder / "training_args.bin").unlink(missing_ok=True)
        written.append(model_folder)
    if recipe.output.adapter:
        weights = trainer.accelerator.get_state_dict(trainer.model)
        if trainer.is_world_process_zero():
            projector = {
                name.removeprefix(_PROJECTOR_PREFIX): tensor.to(getattr(torch, recipe.output.adapter_dtype))
                for name, tensor in weights.items()
                if name.startswith(_PROJECTOR_PREFIX)
            }
            save_projector(projector, adapter_folder)
            save_adapter_settings(config, processor, adapter_folder)
        written.append(adapter_folder)
    return written


def _cast_weights(file: Path, dtype: str) -> None:
    """Gives the weights of a file another type, in place."""
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(file).items()}
    with atomic_file(file) as path:
        save_file(weights, path, metadata={"format": "pt"})


def _keep_adapter_alone(folder: Path) -> None:
    """Removes what the Trainer writes beside an adapter, and where its base lay on this machine."""
    for file in folder.iterdir():
        if file.name not in _ADAPTER_FILES:
            file.unlink()
    config_file = folder / _ADAPTER_FILES[0]
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
