"""Models of the paper's shape with random weights: the time of a model does not depend on what it has learned."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from storm_vlm.errors import BudgetError, StormError
from storm_vlm.model import (
    ComposeOptions,
    StormConfig,
    StormForConditionalGeneration,
    StormProcessor,
    VisionTower,
    compose_model,
)
from storm_vlm.pipeline.loading import choose_device, choose_dtype
from storm_vlm.pipeline.memory import free_bytes_on

WIDTHS = {"1": 1, "1/2": 2, "1/4": 4, "1/8": 8}
# Qwen2-7B's vocabulary, which the library's default is not.
_VOCABULARY = 152064
# Room for 512 frames without compression, which the paper measures: longer than the released model's context.
_CONTEXT_TOKENS = 2**18
_SIGLIP_MEAN = _SIGLIP_STD = (0.5, 0.5, 0.5)
_GIB = 2**30


def paper_shape(
    width: str, *, device: str = "auto", dtype: str = "auto"
) -> tuple[StormForConditionalGeneration, StormProcessor]:
    """Makes a model of SigLIP so400m at 448 pixels and Qwen2-7B, or of narrower ones, with random weights.

    Layers, patches and tokens stay as they are; hidden and intermediate sizes and the number of heads are scaled, so that
    products of matrices shrink with the square of the width, attention and scan with the width. Text is one token for each byte, and nothing stands between frames.

    Args:
        width: ``1``, ``1/2``, ``1/4`` or ``1/8`` of the paper's widths.
        device: As for `load_model`.
        dtype: As for `load_model`.

    Returns:
        The model on its device and its processor; weights that do not fit the memory are a BudgetError.

    Raises:
        StormError: The width is unknown.
    """
    if width not in WIDTHS:
        raise StormError(f"paper shape {width!r} is unknown: choose a width of {', '.join(WIDTHS)}")
    vision_config, text_config = _configs(WIDTHS[width])
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    _check_weights(vision_config, text_config, chosen_device, chosen_dtype)
    tower, language_model = _make_parts(vision_config, text_config, chosen_device, chosen_dtype)
    side = vision_config.image_size
    model, processor = compose_model(
        VisionTower(tower, (side, side), _SIGLIP_MEAN, _SIGLIP_STD),
        language_model,
        _byte_tokenizer(),
        ComposeOptions(frame_separator="none"),
    )
    return model.to(chosen_device), processor


def _configs(divisor: int) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Returns the configs of the two backbones, which are StormConfig's defaults, with their widths divided."""
    paper = StormConfig()
    text: dict[str, Any] = {"vocab_size": _VOCABULARY, "max_position_embeddings": _CONTEXT_TOKENS}
    text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    vision_config, text_config = (
        type(config)(**config.to_diff_dict() | _narrower(config, divisor) | changes)
        for config, changes in ((paper.vision_config, {}), (paper.text_config, text))
    )
    return vision_config, text_config


def _narrower(config: PreTrainedConfig, divisor: int) -> dict[str, int]:
    """Returns the sizes that shrink with the width; heads become fewer, not smaller, so that attention shrinks too."""
    exact = {name: getattr(config, name) // divisor for name in ("hidden_size", "intermediate_size")}
    heads = {
        name: -(-getattr(config, name) // divisor)
        for name in ("num_attention_heads", "num_key_value_heads")
        if hasattr(config, name)
    }
    return exact | heads


def _make_parts(
    vision_config: PreTrainedConfig, text_config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Makes the backbones where they compute, as their weights would take minutes to draw and copy."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        tower = AutoModel.from_config(vision_config, dtype=dtype)
        language_model = AutoModelForCausalLM.from_config(text_config, dtype=dtype)
    return tower.eval(), language_model.eval()


def _check_weights(
    vision_config: PreTrainedConfig, text_config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> None:
    parts = _make_parts(vision_config, text_config, torch.device("meta"), dtype)
    num_bytes = sum(parameter.numel() for part in parts for parameter in part.parameters()) * dtype.itemsize
    if num_bytes > (free := free_bytes_on(device)):
        raise BudgetError(
            f"the weights of this shape take {num_bytes / _GIB:.1f} GiB and {free / _GIB:.1f} GiB are free: choose a "
            f"smaller --paper-shape"
        )


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer that needs no files: one token for each byte."""
    alphabet = ["<unk>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
