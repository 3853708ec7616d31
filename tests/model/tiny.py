"""Tiny models of many families, built from configs, with a byte tokenizer: what the model tests share.

Every encoder sees frames of 32 pixels in patches of 8 unless its family cannot: 4x4 patches, 2x2 visual tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from storm_vlm.model import (
    ComposeOptions,
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    StormForConditionalGeneration,
    StormProcessor,
    VisionTower,
    compose_model,
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<{{ message.role }}>"
    "{%- if message.role == 'assistant' -%}{%- generation -%}{{ message.content + eos_token }}{%- endgeneration -%}"
    "{%- else -%}{{ message.content }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)

_VIT = {"initializer_range": 0.3, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8}  # fmt: skip
# Weights larger than usual, so that what a test changes in a picture changes the answer.
_LLM = {"initializer_range": 0.3, "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # fmt: skip

# family -> class of the config, whose name gives that of the model, and its options.
VISION_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": ("SiglipVisionConfig", {**_VIT, "vision_use_head": False}),
    "siglip2": ("Siglip2VisionConfig", {**_VIT, "num_patches": 16, "vision_use_head": False}),
    "clip": ("CLIPVisionConfig", _VIT),
    "dinov2": ("Dinov2Config", _VIT),
    "dinov2_registers": ("Dinov2WithRegistersConfig", {**_VIT, "num_register_tokens": 4}),
    "dinov3": ("DINOv3ViTConfig", {**_VIT, "hidden_size": 32, "num_register_tokens": 4}),
    "convnext": ("ConvNextConfig", {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "image_size": 64}),
    "efficientnet": ("EfficientNetConfig", {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320,
                                             "image_size": 64, "initializer_range": 0.3}),
}  # fmt: skip

LLM_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {**_LLM, "head_dim": 8, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _LLM),
    "llama": ("LlamaConfig", _LLM),
    # The shape of SmolLM2-135M: three query heads for each of its key-value heads, tied embeddings.
    "smollm2": ("LlamaConfig", {**_LLM, "hidden_size": 36, "intermediate_size": 96, "num_attention_heads": 9,
                          "num_key_value_heads": 3, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {**_LLM, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "cohere": ("CohereConfig", _LLM),
    "granite": ("GraniteConfig", {**_LLM, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
                            "attention_multiplier": 0.125, "residual_multiplier": 0.22}),
    "gpt2": ("GPT2Config", {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 2048,
                      "bos_token_id": 1, "eos_token_id": 2}),
    "phi": ("PhiConfig", {**_LLM, "num_key_value_heads": 4}),
}  # fmt: skip


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token for each byte, so that every text has a known length; no padding token."""
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    )


def vision_tower(family: str = "siglip") -> VisionTower:
    """Returns a random encoder of a family, with its preprocessing."""
    if family == "efficientnet_lite":
        config = EfficientNetLiteConfig(
            embedding_size=8, hidden_sizes=[8, 12, 16], depths=[1, 2, 1], kernel_sizes=[3, 3, 5],
            strides=[2, 2, 1], expand_ratios=[1, 2, 2], feature_strides=[8],
        )  # fmt: skip
        model: PreTrainedModel = EfficientNetLiteModel(config)
    else:
        name, options = VISION_FAMILIES[family]
        config = getattr(transformers, name)(**options)
        model = getattr(transformers, name.replace("Config", "Model"))(config)
    side = getattr(config, "image_size", 32)
    return VisionTower(model.eval(), (side, side), (0.5,) * 3, (0.5,) * 3)


def causal_lm(family: str = "qwen3", **options: Any) -> PreTrainedModel:
    """Returns a random language model of a family."""
    name, defaults = LLM_FAMILIES[family]
    config = getattr(transformers, name)(**defaults | options)
    return AutoModelForCausalLM.from_config(config).eval()


def make_model(
    vision: str = "siglip", llm: str = "qwen3", **options: Any
) -> tuple[StormForConditionalGeneration, StormProcessor]:
    """Composes a tiny model, the same each time; ``options`` are those of `ComposeOptions`."""
    options["projector"] = {"initializer_range": 0.2, **options.get("projector", {})}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower, language_model = vision_tower(vision), causal_lm(llm)
        return compose_model(tower, language_model, byte_tokenizer(), ComposeOptions(**options))


def make_video(num_frames: int, seed: int = 0, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Returns random frames, ``(t, h, w, 3)``, uint8."""
    return np.random.default_rng(seed).integers(0, 256, (num_frames, *size, 3), dtype=np.uint8)


def make_image(seed: int = 0, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Returns a random picture, ``(h, w, 3)``, uint8."""
    return make_video(1, seed, size)[0]


def ask(*items: Any, answer: str | None = None) -> list[dict[str, Any]]:
    """Returns one user's message: strings are text, arrays of 3 dimensions images, everything else videos."""
    content = []
    for item in items:
        if isinstance(item, str):
            content.append({"type": "text", "text": item})
        elif isinstance(item, np.ndarray) and item.ndim == 3:
            content.append({"type": "image", "image": item})
        else:
            content.append({"type": "video", "video": item})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    return [*messages, {"role": "assistant", "content": answer}] if answer is not None else messages


def encode(processor: StormProcessor, conversations: Sequence[Any], **options: Any) -> dict[str, Any]:
    """Runs the chat template over a batch of conversations; ``options`` go to the processor."""
    padding_side = options.pop("padding_side", "left")
    inputs = processor.apply_chat_template(
        list(conversations),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=conversations[0][-1]["role"] == "user",
        processor_kwargs={"padding": True, "padding_side": padding_side, **options},
    )
    return dict(inputs)
