"""Runs a recipe: model, data, Trainer, checkpoints, and what is written at the end."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from storm_vlm.data import (
    BadSampleLog,
    Mixture,
    StormCollator,
    TrainingBatches,
    TrainingDataset,
    estimate_lengths,
    read_mixture_config,
)
from storm_vlm.errors import RecipeError
from storm_vlm.model import StormConfig, StormProcessor
from storm_vlm.training.curve import plot_curve
from storm_vlm.training.export import export_trained
from storm_vlm.training.features import cache_features
from storm_vlm.training.model import make_model
from storm_vlm.training.parts import load_lora, prepare_parts, round_frozen_layers, sharded_layer_names
from storm_vlm.training.plan import TrainingPlan, make_plan
from storm_vlm.training.recipe import Recipe
from storm_vlm.training.trainer import StormTrainer, training_arguments

logger = logging.getLogger(__name__)

_SETTINGS, _CURVE, _STATE = "recipe.json", "training_curve.png", "trainer_state.json"


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        num_steps: Steps of the optimizer.
        final_loss: Last loss of the log; None if none was logged.
        num_bad_samples: Records that could not be used.
        folders: Folders of the trained model and its adapter.
        curve: Picture of the training curve; None if no loss was logged.
    """

    num_steps: int
    final_loss: float | None
    num_bad_samples: int
    folders: tuple[Path, ...]
    curve: Path | None


@dataclass(frozen=True, slots=True)
class _Parts:
    model: Any
    config: StormConfig
    processor: StormProcessor
    mixture: Mixture
    lengths: np.ndarray | None
    batches: TrainingBatches
    sharded_layers: list[str]


def plan_training(recipe: Recipe) -> TrainingPlan:
    """Returns what `train` would do, without doing it."""
    num_processes = PartialState().num_processes
    parts = _prepare(recipe, num_processes)
    lengths = parts.lengths if parts.lengths is not None else estimate_lengths(parts.mixture, parts.processor)
    return make_plan(
        recipe, parts.model, parts.config.text_config, parts.batches, lengths.tolist(), num_processes
    )


def train(recipe: Recipe, *, resume: bool = True, use_cpu: bool = False) -> TrainingResult:
    """Trains, from the last checkpoint in the output folder if there is one.

    A script that calls it keeps what it runs under ``if __name__ == "__main__":``, since workers import the script.

    Args:
        recipe: What to do.
        resume: Go on from the last checkpoint; otherwise an output folder with checkpoints is an error.
        use_cpu: Leave a GPU alone.

    Returns:
        What came of it.

    Raises:
        RecipeError: The output folder belongs to another recipe, or has checkpoints and ``resume`` is False.
    """
    arguments = training_arguments(recipe, use_cpu=use_cpu or not torch.accelerator.is_available())
    checkpoint = _last_checkpoint(recipe)
    if checkpoint is not None and not resume:
        raise RecipeError(f"output.folder: {recipe.output.folder} has checkpoints: resume or choose another")
    _check_folder(recipe, is_resumed=checkpoint is not None)
    set_seed(recipe.schedule.seed)
    parts = _prepare(recipe, arguments.world_size)
    bad_samples = BadSampleLog(
        recipe.output.folder / f"bad_samples-{arguments.process_index}.jsonl", recipe.data.max_bad_samples
    )
    dataset = TrainingDataset(
        parts.mixture,
        parts.processor,
        max_length=recipe.data.max_length,
        max_bad_samples=recipe.data.max_bad_samples,
        lengths=parts.lengths,
    )
    if recipe.data.feature_cache is not None:
        dataset.features = cache_features(
            dataset,
            parts.model,
            recipe.data.feature_cache,
            device=arguments.device,
            bf16=recipe.schedule.bf16,
            num_workers=recipe.data.num_workers,
        )
    trainer = StormTrainer(
        batches=parts.batches,
        bad_samples=bad_samples,
        learning_rates=recipe.learning_rates,
        model=parts.model,
        args=arguments,
        train_dataset=dataset,
        data_collator=StormCollator(parts.processor),
        processing_class=parts.processor,
    )
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and not fsdp.transformer_cls_names_to_wrap:
        fsdp.transformer_cls_names_to_wrap = parts.sharded_layers
    if arguments.process_index == 0:
        _write_settings(recipe)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_state()
    folders = export_trained(trainer, recipe, parts.processor, parts.config)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    curve = recipe.output.folder / _CURVE if losses else None
    if curve is not None and trainer.is_world_process_zero():
        plot_curve(recipe.output.folder / _STATE, curve)
    return TrainingResult(
        num_steps=trainer.state.global_step,
        final_loss=losses[-1] if losses else None,
        num_bad_samples=len(bad_samples),
        folders=tuple(folders),
        curve=curve,
    )


def _prepare(recipe: Recipe, num_processes: int) -> _Parts:
    schedule, data = recipe.schedule, recipe.data
    mixture = Mixture(
        read_mixture_config(data.mixture),
        seed=schedule.seed,
        conversations_per_example=data.conversations_per_example,
    )
    model, processor = make_model(recipe)
    attention = model.config.text_config._attn_implementation
    if data.conversations_per_example > 1 and attention not in ("sdpa", "eager"):
        raise RecipeError(f"data.conversations_per_example: needs sdpa or eager attention, not {attention}")
    config, sharded_layers = model.config, sharded_layer_names(model)
    needs_lengths = data.group_by_length or data.token_budget is not None
    lengths = estimate_lengths(mixture, processor) if needs_lengths else None
    batches = TrainingBatches(
        mixture,
        num_epochs=schedule.num_epochs,
        batch_size=schedule.batch_size,
        token_budget=data.token_budget,
        lengths=lengths,
        multiple=schedule.gradient_accumulation_steps * num_processes,
        max_steps=schedule.max_steps,
    )
    trained = prepare_parts(model, recipe.learning_rates, recipe.lora)
    if recipe.model.adapter_from is not None:
        load_lora(trained, recipe.model.adapter_from)
    if schedule.bf16 and recipe.lora is not None and num_processes == 1:
        round_frozen_layers(trained)
    return _Parts(trained, config, processor, mixture, lengths, batches, sharded_layers)


def _last_checkpoint(recipe: Recipe) -> Path | None:
    """Returns the newest whole checkpoint: the Trainer writes its state last, so one cut short by a crash has none."""
    folders = recipe.output.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = {int(folder.name.rpartition("-")[2]): folder for folder in folders if folder.is_dir()}
    for number in sorted(numbered, reverse=True):
        try:
            json.loads((numbered[number] / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s is not whole, and is passed over", numbered[number])
        else:
            return numbered[number]
    return None


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Returns what a resumed run must have in common; where and how often it writes may differ."""
    settings = recipe.to_dict()
    settings.pop("output")
    for name in ("num_workers", "feature_cache"):
        settings["data"].pop(name)
    return settings


def _check_folder(recipe: Recipe, *, is_resumed: bool) -> None:
    """Refuses an output folder that is none, or whose run was begun with another recipe."""
    file = recipe.output.folder / _SETTINGS
    if recipe.output.folder.exists() and not recipe.output.folder.is_dir():
        raise RecipeError(f"output.folder: expected a folder, {recipe.output.folder} is a file")
    if not is_resumed or not file.is_file():
        return
    try:
        before, now = dict(json.loads(file.read_text(encoding="utf-8"))), _settings(recipe)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{file}: is not what `storm train` wrote: choose another output.folder") from error
    changed = [
        f"{group}.{name}" if isinstance(now[group], dict) else group
        for group in now
        for name in (now[group] if isinstance(now[group], dict) else [group])
        if (before.get(group) or {}).get(name) != (now[group] or {}).get(name)
    ]
    if changed:
        raise RecipeError(
            f"output.folder: {recipe.output.folder} was begun with another {', '.join(changed)}: choose another folder"
        )


def _write_settings(recipe: Recipe) -> None:
    recipe.output.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_settings(recipe), indent=2)
    (recipe.output.folder / _SETTINGS).write_text(text + "\n", encoding="utf-8")
