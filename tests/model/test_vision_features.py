"""Any encoder's output as a grid: in the right place, and never garbled when sizes do not fit."""

import pytest
import torch
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from storm_vlm.errors import StormError
from storm_vlm.model.vision_features import extract_features, probe_vision_tower


def siglip(image_size: int) -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=image_size, patch_size=8, vision_use_head=False,
    )  # fmt: skip
    return SiglipVisionModel(config).eval()


@pytest.mark.parametrize("image_size", [32, 38])
def test_patches_lie_where_their_pixels_are(image_size):
    """38 pixels are 4 whole patches of 8, as 384 pixels are SigLIP's 27 patches of 14."""
    tower = siglip(image_size)
    frames = torch.randn(3, 3, image_size, image_size)
    with torch.no_grad():
        features = extract_features(tower, frames, patch_size=8)
        changed = frames.clone()
        changed[1, :, 8:16, 24:32] += 1
        embeddings = [tower.vision_model.embeddings if hasattr(tower, "vision_model") else tower.embeddings]
        difference = (embeddings[0](changed) - embeddings[0](frames)).abs().sum(-1).view(3, 4, 4)
    assert features.shape == (3, 4, 4, 16)
    assert difference.nonzero().tolist() == [[1, 1, 3]]
    assert torch.allclose(features.flatten(1, 2), tower(frames).last_hidden_state, atol=1e-6)


def test_class_and_register_tokens_are_dropped():
    config = Dinov2WithRegistersConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_register_tokens=4,
    )
    tower = Dinov2WithRegistersModel(config).eval()
    frames = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = extract_features(tower, frames, patch_size=8)
        tokens = tower(frames).last_hidden_state
    assert tokens.shape[1] == 1 + 4 + 16
    assert torch.allclose(features.flatten(1, 2), tokens[:, 5:], atol=1e-6)


def test_many_frames_go_through_in_pieces_with_one_result():
    tower, frames = siglip(32), torch.randn(70, 3, 32, 32)
    with torch.no_grad():
        whole = tower(frames).last_hidden_state
        assert torch.allclose(extract_features(tower, frames, patch_size=8).flatten(1, 2), whole, atol=1e-5)


def test_frames_that_are_not_square():
    features = extract_features(siglip(32), torch.randn(2, 3, 48, 24), patch_size=8)
    assert features.shape == (2, 6, 3, 16)


def test_a_grid_that_cannot_be_is_an_error_and_not_a_guess():
    with pytest.raises(StormError, match="which is no grid of 2x2 patches of 16 pixels"):
        extract_features(siglip(32), torch.randn(2, 3, 32, 32), patch_size=16)


def test_frames_of_another_form_are_an_error():
    with pytest.raises(StormError, match=r"\(frames, 3, height, width\), got shape \(1, 2, 3, 32, 32\)"):
        extract_features(siglip(32), torch.randn(1, 2, 3, 32, 32), patch_size=8)


def test_probe_measures_channels_and_patch_size():
    assert probe_vision_tower(siglip(32), (32, 32)) == (16, 8)
