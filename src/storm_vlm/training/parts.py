"""The parts of a model in training: which are frozen, which get LoRA, and their groups in the optimizer."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from storm_vlm.errors import RecipeError
from storm_vlm.model import StormForConditionalGeneration
from storm_vlm.training.recipe import PART_NAMES, LearningRates, LoraRecipe


def part_of(parameter_name: str) -> str:
    """Returns the part that a parameter belongs to; the head belongs to the language model."""
    names = parameter_name.split(".")
    return next((part for part in PART_NAMES if part in names), "language_model")


def base_model(model: nn.Module) -> StormForConditionalGeneration:
    """Returns the STORM model, which may be within peft's."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def prepare_parts(
    model: StormForConditionalGeneration, rates: LearningRates, lora: LoraRecipe | None
) -> StormForConditionalGeneration | PeftModel:
    """Freezes the parts without a learning rate and gives the language model its LoRA weights.

    Args:
        model: The model, changed in place.
        rates: Learning rate of each part, None if it is frozen.
        lora: Adapters of the language model's linear layers; None for none.

    Returns:
        The model, within peft's if there is LoRA: the other trained parts are saved beside the adapters.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(rates, part_of(name)) is not None)
    if lora is None:
        return model
    leaves = {
        name.rsplit(".", 1)[-1]
        for name, module in model.language_model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    whole = [part for part in PART_NAMES[:2] if getattr(rates, part) is not None]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # it is divided by the rank; a fraction is fine
        lora_dropout=lora.dropout,
        target_modules=rf".*\.language_model\..*\.({'|'.join(sorted(leaves))})",
        modules_to_save=whole or None,
    )
    return get_peft_model(model, config)


def load_lora(model: StormForConditionalGeneration | PeftModel, folder: Path) -> None:
    """Loads an adapter's LoRA weights, if it has some; what a higher rank or more layers add to them begins anew.

    Args:
        model: The model after `prepare_parts`.
        folder: Folder of the adapter.

    Raises:
        RecipeError: The adapter cannot be read, the model has no LoRA, or LoRA of another scale, a lower rank or other layers.
    """
    if not (folder / "adapter_config.json").is_file():
        return
    if not isinstance(model, PeftModel):
        raise RecipeError(f"model.adapter_from: {folder} has LoRA weights: the recipe needs lora")
    try:
        old, saved = LoraConfig.from_pretrained(str(folder)), load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise RecipeError(f"model.adapter_from: {folder} cannot be read: {error}") from error
    new = model.peft_config["default"]
    if old.lora_alpha / old.r != new.lora_alpha / new.r:
        raise RecipeError(f"lora.alpha: expected {old.lora_alpha / old.r:g} times the rank, as in {folder}")
    weights = get_peft_model_state_dict(model)
    for name, tensor in saved.items():
        if "lora_" not in name:
            continue
        place = weights.get(name)
        rank_dim = 0 if "lora_A" in name else 1
        fits = place is not None and place.shape[1 - rank_dim] == tensor.shape[1 - rank_dim]
        if not fits or place.shape[rank_dim] < tensor.shape[rank_dim]:
            raise RecipeError(f"model.adapter_from: {name} of {folder} does not fit the model")
        # New ranks add nothing: their lora_B is zero.
        weights[name] = place.clone()
        weights[name].narrow(rank_dim, 0, tensor.shape[rank_dim]).copy_(tensor)
    set_peft_model_state_dict(model, weights)


def round_frozen_layers(model: PeftModel) -> None:
    """Stores the frozen linear layers that LoRA adapts in bfloat16, in place.

    Autocast computes with them in bfloat16 anyway, and otherwise rounds them anew in every step. The merged model is made
    from the original weights.

    Args:
        model: The model after `prepare_parts`, with LoRA.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            weight.data = weight.data.bfloat16()


def parameter_groups(
    model: nn.Module, rates: LearningRates, weight_decay: float, decayed: Collection[str]
) -> list[dict[str, Any]]:
    """Returns the trained parameters by part, those with and without weight decay apart.

    Args:
        model: The model after `prepare_parts`.
        rates: Learning rate of each part.
        weight_decay: Of the parameters in ``decayed``.
        decayed: Names of parameters with weight decay.

    Returns:
        Groups for a torch optimizer, in a fixed order.
    """
    groups: dict[tuple[str, bool], list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), name in decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": getattr(rates, part),
            "weight_decay": weight_decay if has_decay else 0.0,
            "part": part,
        }
        for (part, has_decay), parameters in sorted(groups.items(), key=lambda entry: entry[0])
    ]


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns all and trained parameters of each part, adapters with it; shared weights count once."""
    counts = dict.fromkeys(PART_NAMES, (0, 0))
    for name, parameter in model.named_parameters():
        if ".original_module." in f".{name}":
            continue  # peft's untouched copy of a part that is trained
        total, trained = counts[part_of(name)]
        size = parameter.numel()
        counts[part_of(name)] = (total + size, trained + size * parameter.requires_grad)
    return counts


def sharded_layer_names(model: StormForConditionalGeneration) -> list[str]:
    """Returns the classes of layers that FSDP may shard one by one: the language model's.

    Processes meet at each sharded layer. How often the encoder and the projector run depends on the pictures of a batch,
    so they must be gathered once a step, with what is left of the model.
    """
    return sorted(model.language_model._no_split_modules or [])
