"""A tiny model that answers, and a short clip to ask about."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from storm_vlm.model import ComposeOptions, VisionTower, compose_model
from storm_vlm.model.compose import save_model
from storm_vlm.pipeline import VideoQA
from tests.video.clips import write_clip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that every text has a known length."""
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def make_parts(seed: int = 0):
    """Returns a tiny model and its processor: 32 pixels are 4x4 patches and 2x2 tokens."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    language_model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer) + 2, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=600,
            eos_token_id=None, bos_token_id=None, pad_token_id=None,
        )
    ).eval()  # fmt: skip
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            image_size=32, patch_size=8, vision_use_head=False,
        )
    ).eval()  # fmt: skip
    vision = VisionTower(tower, (32, 32), (0.5,) * 3, (0.5,) * 3)
    return compose_model(vision, language_model, tokenizer, ComposeOptions(temporal_pool=2, num_frames=8))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.random.fork_rng():
        save_model(*make_parts(), folder)
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(path, num_frames=50, fps=10, size=(48, 64))
    return path


@pytest.fixture
def video_qa(model_folder, tmp_path) -> VideoQA:
    """A fresh pipeline in float32 with an empty cache."""
    loaded = VideoQA.from_pretrained(model_folder, dtype="float32", use_cache=False)
    return VideoQA(loaded.model, loaded.processor, cache_folder=tmp_path / "cache")
