"""Reads a checkpoint in VILA's layout: what its config means for video, and its three parts.

The layout is a root ``config.json`` beside the folders ``llm`` (a causal language model and its tokenizer),
``vision_tower`` (a SigLIP encoder and its image processor) and ``mm_projector`` (a config and six tensors).

Shapes: ``c`` channels of the vision encoder, ``d`` width of the language model, ``s`` scales.

Source:
    github.com/NVlabs/VILA: ``llava/model/llava_arch.py``, ``llava/model/configuration_llava.py``,
    ``llava/model/encoders/video/basic.py`` and ``tsp.py``, ``llava/model/multimodal_encoder/vision_encoder.py``,
    ``llava/model/multimodal_projector/base_projector.py``, ``llava/model/language_model/builder.py``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from storm_vlm.errors import ModelError
from storm_vlm.model.compose import VisionTower
from storm_vlm.model.processing_storm import FrameSeparator

_PARTS = ("llm", "vision_tower", "mm_projector")
_MODEL_TYPES = ("llava_llama", "vila")
# Both join 2x2 patches row by row; what follows is the same.
_PROJECTOR_TYPES = ("mlp_downsample", "mlp_downsample_2x2_fix")
# Fields that every NVILA checkpoint has some of and none of VILA 1.5 has. VILA 1.5 was trained with a projector of
# the same name that hands on the tokens of a frame column by column.
_NVILA_FIELDS = ("dynamic_s2", "num_time_tokens", "time_token_format", "image_encoder", "video_encoder")
_BICUBIC = 3
# The template that config.json's chat_template="qwen2" stands for, which differs from the tokenizer's own.
_QWEN2_CHAT = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages if message.content is not none %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class VilaSource:
    """A checkpoint in VILA's layout and how it reads videos.

    Attributes:
        folder: The root folder.
        feature_layer: Hidden state of the vision encoder that goes into the projector.
        num_frames: Frames that it samples from a video.
        num_scales: Times that the channels of each patch are repeated before the projector (dynamic S2); 1 for once.
        temporal_pool: Consecutive frames that it averages.
        spatial_pool: Tokens of a frame that it averages.
        frame_separator: What follows the tokens of each frame.
        after_image: What follows the tokens of an image.
        reads_image_tiles: Whether a single image is cut into tiles, which STORM does not do.
        chat_template: Jinja template in place of the tokenizer's own; None for that.
    """

    folder: Path
    feature_layer: int
    num_frames: int
    num_scales: int
    temporal_pool: int
    spatial_pool: int
    frame_separator: FrameSeparator
    after_image: str
    reads_image_tiles: bool
    chat_template: str | None


def open_source(source: str | Path) -> VilaSource:
    """Finds a checkpoint, downloading it if it is a hub id, and reads its config.

    It is a `ModelError` if there is none, it is not in VILA's layout, or it reads videos in a way that STORM does not.

    Args:
        source: Folder or hub id.

    Returns:
        The checkpoint; its weights are not read yet.
    """
    folder = _local_folder(source)
    config = _read_json(folder / "config.json")
    for part in _PARTS:
        _check_part(folder / part)
    _check_kind(folder / "config.json", config)
    return _parse(folder, config)


def load_vision_tower(source: VilaSource) -> VisionTower:
    """Loads the SigLIP encoder and its preprocessing.

    It is a `ModelError` if it is another encoder, weights are missing, or pictures are not resized bicubically.

    Args:
        source: The checkpoint.

    Returns:
        The encoder in evaluation mode, for frames of its own size.
    """
    folder = source.folder / "vision_tower"
    config = _read_json(folder / "config.json")
    _expect(folder / "config.json", config, "model_type", ("siglip_vision_model",))
    pictures = _read_json(folder / "preprocessor_config.json")
    _expect(folder / "preprocessor_config.json", {"resample": _BICUBIC} | pictures, "resample", (_BICUBIC,))
    model = _load(AutoModel, folder)
    size = model.config.image_size
    half = (0.5, 0.5, 0.5)
    mean, std = (tuple(pictures.get(name, half)) for name in ("image_mean", "image_std"))
    return VisionTower(model, (size, size), mean, std)


def load_language_model(source: VilaSource) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the language model and its tokenizer, with the chat template that the checkpoint uses.

    Args:
        source: The checkpoint.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        ModelError: They cannot be loaded, weights are missing, or there is no chat template.
    """
    folder = source.folder / "llm"
    model = _load(AutoModelForCausalLM, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {_first_line(error)}") from error
    if source.chat_template is not None:
        tokenizer.chat_template = source.chat_template
    if not isinstance(tokenizer.chat_template, str):
        raise ModelError(
            f"{folder}: the tokenizer has no chat template and config.json names none (chat_template): put the "
            f"checkpoint's template into {folder / 'tokenizer_config.json'}"
        )
    return model, tokenizer


def load_projector(source: VilaSource, vision_size: int, text_size: int) -> dict[str, torch.Tensor]:
    """Loads the projector for patches that are given once, however many scales the checkpoint repeats them for.

    Args:
        source: The checkpoint.
        vision_size: Channels of the vision encoder, ``c``.
        text_size: Width of the language model, ``d``.

    Returns:
        State of the sequence LayerNorm, Linear, GELU, Linear on ``4 c`` channels.

    Raises:
        ModelError: The projector is of another type, or a tensor is missing or of another shape.
    """
    folder = source.folder / "mm_projector"
    _expect(folder / "config.json", _read_json(folder / "config.json"), "mm_projector_type", _PROJECTOR_TYPES)
    merged_size = 4 * source.num_scales * vision_size
    expected = {
        "layers.1.weight": (merged_size,),
        "layers.1.bias": (merged_size,),
        "layers.2.weight": (text_size, merged_size),
        "layers.2.bias": (text_size,),
        "layers.4.weight": (text_size, text_size),
        "layers.4.bias": (text_size,),
    }
    tensors = _read_tensors(folder)
    for name in sorted(expected.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else "no such tensor"
        if found != expected.get(name):
            raise ModelError(
                f"{folder}: tensor {name}: found {found}, expected {expected.get(name, 'no such tensor')} (vision "
                f"encoder {vision_size} channels, {source.num_scales} scales, language model {text_size})"
            )
    # The first layer of the source, which has no weights, joins the patches.
    state = {
        name.replace(f"layers.{theirs}.", f"{ours}."): tensors[name]
        for theirs, ours in ((1, 0), (2, 1), (4, 3))
        for name in expected
        if name.startswith(f"layers.{theirs}.")
    }
    return state if source.num_scales == 1 else _fold_scales(state, source.num_scales)


def _fold_scales(state: dict[str, torch.Tensor], num_scales: int) -> dict[str, torch.Tensor]:
    """Rewrites a projector of patches repeated for each scale as one of patches given once.

    With all scales alike, the layer norm's mean and variance are those of one scale, ``n``, so that
    ``sum_s W_s (g_s n + b_s) = (sum_s W_s g_s) n + sum_s W_s b_s``: the norm's weights move into the linear layer.
    """
    weight = state["1.weight"].double().unflatten(1, (4, num_scales, -1))  # (d, 4, s, c)
    gain = state["0.weight"].double().unflatten(0, (4, num_scales, -1))  # (4, s, c)
    shift = state["0.bias"].double()
    folded = {
        "0.weight": torch.ones_like(state["0.weight"][: state["0.weight"].shape[0] // num_scales]),
        "0.bias": torch.zeros_like(state["0.bias"][: state["0.bias"].shape[0] // num_scales]),
        "1.weight": (weight * gain).sum(dim=2).flatten(1),
        "1.bias": state["1.bias"].double() + weight.flatten(1) @ shift,
    }
    return state | {name: tensor.to(state[name].dtype) for name, tensor in folded.items()}


def _local_folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{source} is a file: give the folder of a checkpoint in VILA's layout")
    try:
        # Pickled weights can run code when they are read: they are not even downloaded.
        return Path(snapshot_download(str(source), ignore_patterns=["*.bin", "*.pt", "*.pth", "*.msgpack"]))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source}: no such folder, and not available as a hub id: {_first_line(error)}"
        ) from error


def _check_part(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is missing: a checkpoint in VILA's layout has the folders {', '.join(_PARTS)}"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} has its weights as a pickle only ({pickles[0]}): convert them to safetensors"
        )
    raise ModelError(f"{folder} has no weights: expected *.safetensors")


def _check_kind(file: Path, config: dict[str, Any]) -> None:
    """Refuses what VILA's code computes and STORM does not."""
    _expect(file, config, "model_type", _MODEL_TYPES)
    if not config.keys() & set(_NVILA_FIELDS):
        raise ModelError(
            f"{file} has none of the fields {', '.join(_NVILA_FIELDS)}: VILA 1.5 and older order the tokens of a frame "
            f"by columns; only NVILA checkpoints can be converted"
        )
    _expect(file, config, "mm_vision_select_feature", ("cls_patch",))
    for field, meaning in (
        ("s2", "frames at several scales"),
        ("ps3", "selected high-resolution patches"),
    ):
        if config.get(field):
            raise ModelError(
                f"{file}: {field} is {config[field]}: {meaning} are not supported, expected false"
            )
    tiles = config.get("video_max_tiles") or 1
    if tiles != 1:
        raise ModelError(
            f"{file}: video_max_tiles is {tiles}: frames cut into tiles are not supported, expected 1"
        )
    if config.get("image_aspect_ratio") == "pad":
        raise ModelError(
            f"{file}: image_aspect_ratio is 'pad': padded frames are not supported, expected 'resize'"
        )


def _parse(folder: Path, config: dict[str, Any]) -> VilaSource:
    file = folder / "config.json"
    temporal_pool, spatial_pool, separator = _read_video_encoder(file, config)
    _, image_tokens = _read_encoder(file, config, "image_encoder", ("BasicImageEncoder",))
    template = config.get("chat_template")
    if template not in (None, "qwen2"):
        raise ModelError(f"{file}: chat_template is {template!r}, expected null or 'qwen2'")
    return VilaSource(
        folder=folder,
        feature_layer=_required(file, config, "mm_vision_select_layer", (int,)),
        num_frames=_required(file, config, "num_video_frames", (int,)),
        num_scales=_num_scales(file, config),
        temporal_pool=temporal_pool,
        spatial_pool=spatial_pool,
        frame_separator=separator,
        after_image=image_tokens,
        reads_image_tiles=config.get("image_aspect_ratio") in ("dynamic", "dynamic_s2"),
        chat_template=_QWEN2_CHAT if template == "qwen2" else None,
    )


def _read_video_encoder(file: Path, config: dict[str, Any]) -> tuple[int, int, FrameSeparator]:
    """Returns the frames and the tokens of a frame that are averaged, and what follows each frame."""
    classes = ("BasicVideoEncoder", "TSPVideoEncoder")
    encoder, end_tokens = _read_encoder(file, config, "video_encoder", classes)
    separator: FrameSeparator = "newline" if end_tokens else "none"
    pool_sizes, sep_tokens = encoder.get("pool_sizes", [[1, 1, 1]]), encoder.get("sep_tokens")
    match pool_sizes:
        case [[int(frames), int(side), int(other_side)]] if side == other_side and not sep_tokens:
            return frames, side**2, separator
    raise ModelError(
        f"{file}: video_encoder has pool_sizes {pool_sizes} and sep_tokens {sep_tokens!r}, expected one entry [frames, "
        f"side, side] and no sep_tokens"
    )


def _read_encoder(
    file: Path, config: dict[str, Any], field: str, classes: tuple[str, ...]
) -> tuple[dict[str, Any], str]:
    """Returns the settings of a media encoder and the text after each frame or image: a newline or nothing."""
    encoder = config.get(field) or {"_target_": classes[0]}
    if isinstance(encoder, str):
        try:
            encoder = json.loads(encoder)
        except ValueError as error:
            raise ModelError(f"{file}: {field} is {encoder!r}, expected JSON") from error
    name = str(encoder.get("_target_")).rpartition(".")[2]
    if name not in classes:
        raise ModelError(f"{file}: {field} is a {name}, expected {' or '.join(classes)}")
    end_tokens = encoder.get("end_tokens", "\n") or ""
    if encoder.get("start_tokens") or end_tokens not in ("", "\n"):
        raise ModelError(
            f"{file}: {field} has start_tokens {encoder.get('start_tokens')!r} and end_tokens {end_tokens!r}, expected "
            f"no start_tokens and a newline or no end_tokens"
        )
    return encoder, end_tokens


def _num_scales(file: Path, config: dict[str, Any]) -> int:
    """Returns how often dynamic S2 repeats the channels of a frame, which it sees at one scale."""
    if not config.get("dynamic_s2"):
        return 1
    scales = _required(file, config, "s2_scales", (str, list))
    return len(scales.split(",") if isinstance(scales, str) else scales)


def _load(auto_class: Any, folder: Path) -> PreTrainedModel:
    """Loads a model whose every weight is in the folder."""
    try:
        model, info = auto_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: {_first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(f"{folder}: missing tensors: {', '.join(missing[:3])} ({len(missing)} in all)")
    return model.eval()


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read: {_first_line(error)}") from error
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is no JSON file: {_first_line(error)}") from error


def _required(file: Path, config: dict[str, Any], field: str, kinds: tuple[type, ...]) -> Any:
    value = config.get(field)
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ModelError(f"{file}: {field} is {value!r}, expected {expected}")
    return value


def _expect(file: Path, config: dict[str, Any], field: str, values: tuple[Any, ...]) -> None:
    if config.get(field) not in values:
        expected = " or ".join(repr(value) for value in values)
        raise ModelError(f"{file}: {field} is {config.get(field)!r}, expected {expected}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
