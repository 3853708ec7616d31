"""Encoders of timm, through transformers' wrapper; runs where timm and torchvision are installed."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from transformers import TimmWrapperConfig, TimmWrapperModel

from storm_vlm.model import ComposeOptions, VisionTower, compose, compose_model
from tests.model.tiny import ask, byte_tokenizer, causal_lm, encode, make_image, make_video
from tests.numerics import assert_matches

# architecture, options, side of the frames, grid of the patches
ENCODERS = {
    "efficientnet": ("efficientnet_lite0", {}, 64, 2),
    "resnet": ("resnet10t", {}, 64, 2),
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1}, 64, 4),
    "vit with registers": ("vit_small_patch16_dinov3", {"img_size": 64, "depth": 1}, 64, 4),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 4}, 64, 4),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}, 64, 2),
}  # fmt: skip


def timm_tower(name: str) -> VisionTower:
    architecture, options, side, _ = ENCODERS[name]
    config = TimmWrapperConfig(architecture=architecture, model_args=options, num_labels=0, do_pooling=False)
    return VisionTower(TimmWrapperModel(config).eval(), (side, side), (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_timm(name, tmp_path):
    tower = timm_tower(name)
    model, processor = compose_model(
        tower, causal_lm("llama"), byte_tokenizer(), ComposeOptions(temporal_pool=2)
    )
    conversations = [ask(make_video(3), make_image(1), "what?"), ask("text"), ask(make_video(1), "why?")]
    inputs = encode(processor, conversations)
    side = ENCODERS[name][3]
    assert inputs["video_grid_thw"].tolist() == [[3, side, side], [1, side, side]]
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    model.eval()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in tower.model.parameters())
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[0] == 3
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = encode(AutoProcessor.from_pretrained(tmp_path), conversations)
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert_matches("logits", loaded(**inputs).logits[kept], model(**inputs).logits[kept])


def test_composed_from_a_folder(tmp_path):
    """As timm's models lie on the hub: what to do with the pixels stands in the model's config."""
    pretrained = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "input_size": [3, 64, 64]}
    config = TimmWrapperConfig(architecture="resnet10t", pretrained_cfg=pretrained)
    TimmWrapperModel(config).save_pretrained(tmp_path / "vision")
    causal_lm("llama").save_pretrained(tmp_path / "llm")
    byte_tokenizer().save_pretrained(tmp_path / "llm")
    out = compose(tmp_path / "vision", tmp_path / "llm", tmp_path / "out")
    model, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert list(processor.video_processor.image_mean) == [0.4, 0.5, 0.6]
    assert processor.video_processor.frame_size == (64, 64)
    assert model.generate(**encode(processor, [ask(make_video(2), "what?")]), max_new_tokens=2).shape[0] == 1
