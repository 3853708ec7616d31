"""Loads a STORM model to where it computes, in the type that computes there."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from storm_vlm.errors import ModelError, StormError
from storm_vlm.model import StormForConditionalGeneration, StormProcessor

# What reading configs, weights and tokenizers raises when they are missing, damaged or do not fit each other.
_LOADING_ERRORS = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError,
)  # fmt: skip


def load_model(
    path: str | Path, *, device: str = "auto", dtype: str = "auto", attn_implementation: str | None = None
) -> tuple[StormForConditionalGeneration, StormProcessor]:
    """Loads a STORM model and its processor.

    Args:
        path: Folder or hub id.
        device: ``auto`` for the GPU if there is one, or a device of PyTorch.
        dtype: ``auto`` for bfloat16 where the device computes in it and float32 elsewhere, or its name.
        attn_implementation: Attention of the backbones; transformers' choice if None.

    Returns:
        The model on its device and the processor.

    Raises:
        ModelError: There is no such model, it is not a STORM model, or weights are missing.
    """
    chosen_device = choose_device(device)
    options: dict[str, Any] = {"dtype": choose_dtype(dtype, chosen_device)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        config = AutoConfig.from_pretrained(path)
        if config.model_type != "storm":
            raise ModelError(f"{path} is a {config.model_type} model, not a STORM model: see `storm compose`")
        model, loading = AutoModelForImageTextToText.from_pretrained(
            path, output_loading_info=True, **options
        )
        processor = AutoProcessor.from_pretrained(path)
    except ModelError:
        raise
    except _LOADING_ERRORS as error:
        raise ModelError(f"cannot load the model {path}: {_one_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(f"{path} lacks {len(missing)} weights of its model, such as {missing[0]}")
    return model.to(chosen_device), processor


def choose_device(name: str) -> torch.device:
    """Returns the device of a name; ``auto`` is the GPU if there is one.

    Args:
        name: ``auto`` or a device of PyTorch.

    Returns:
        The device.

    Raises:
        StormError: The device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise StormError(f"device {name!r} is not available here: {str(error).splitlines()[0]}") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the type to compute in; ``auto`` is bfloat16 on GPUs and on CPUs with instructions for it.

    Args:
        name: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: Where it computes.

    Returns:
        The type.

    Raises:
        StormError: The name is unknown.
    """
    if name == "auto":
        has_bfloat16 = device.type == "cuda" or (device.type == "cpu" and _cpu_has_bfloat16())
        return torch.bfloat16 if has_bfloat16 else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise StormError(f"dtype must be auto, {', '.join(known)}, got {name!r}")
    return known[name]


def _cpu_has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
