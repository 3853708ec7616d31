import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel

from storm_vlm.errors import ModelError
from storm_vlm.model.demo_parts import VISION_ENCODER, find_part
from storm_vlm.model.efficientnet_lite import (
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    SamePadConv2d,
    load_efficientnet_lite0,
)


def tiny_config(**changes: object) -> EfficientNetLiteConfig:
    table = {
        "embedding_size": 8,
        "hidden_sizes": [8, 12, 16, 20],
        "depths": [1, 2, 1, 2],
        "kernel_sizes": [3, 5, 3, 5],
        "strides": [1, 2, 2, 2],
        "expand_ratios": [1, 2, 2, 2],
        "feature_strides": [8, 16],
    }
    return EfficientNetLiteConfig(**(table | changes))


@pytest.fixture
def tiny() -> EfficientNetLiteModel:
    torch.manual_seed(0)
    return EfficientNetLiteModel(tiny_config()).eval()


@pytest.fixture(scope="module")
def weights() -> Path:
    path = find_part(VISION_ENCODER)
    if path is None:
        pytest.skip(f"{VISION_ENCODER.requirement} is neither cached nor installed")
    return path


def test_defaults_are_lite0() -> None:
    config = EfficientNetLiteConfig()
    assert (config.hidden_size, config.patch_size) == (432, 16)
    assert config.stage_strides == [2, 4, 8, 16, 16, 32, 32]
    assert config.feature_stages == [4, 6]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (225, 190), (33, 17), (1, 1)])
def test_any_frame_size_gives_a_map_rounded_up(tiny: EfficientNetLiteModel, height: int, width: int) -> None:
    output = tiny(torch.randn(2, 3, height, width), output_hidden_states=True)
    h, w = -(-height // 8), -(-width // 8)
    assert output.last_hidden_state.shape == (2, tiny.config.hidden_size, h, w)
    assert output.pooler_output.shape == (2, tiny.config.hidden_size)
    assert [state.shape[1] for state in output.hidden_states] == [8, 12, 16, 20]


def test_the_map_is_the_last_stage_of_each_stride_at_the_finest(tiny: EfficientNetLiteModel) -> None:
    output = tiny(torch.randn(1, 3, 64, 48), output_hidden_states=True)
    fine, coarse = output.last_hidden_state.split([16, 20], dim=1)
    assert torch.equal(fine, output.hidden_states[2])
    assert torch.equal(coarse, output.hidden_states[3].repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(("side", "first"), [(6, 1), (7, 0)], ids=["even", "odd"])
def test_stride_two_pads_as_tensorflow_does(side: int, first: int) -> None:
    convolution = SamePadConv2d(1, 1, kernel_size=3, stride=2)
    with torch.no_grad():
        convolution.weight.zero_()[0, 0, 1, 1] = 1
        convolution.bias.zero_()
    image = torch.arange(side * side, dtype=torch.float32).reshape(1, 1, side, side)
    assert torch.equal(convolution(image), image[:, :, first::2, first::2])


def test_a_frame_in_a_batch_gives_what_it_gives_alone(tiny: EfficientNetLiteModel) -> None:
    pixel_values = torch.randn(3, 3, 40, 56)
    together = tiny(pixel_values).last_hidden_state
    alone = torch.cat([tiny(frame[None]).last_hidden_state for frame in pixel_values])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_through_auto_classes_is_the_same(
    tiny: EfficientNetLiteModel, tmp_path: Path
) -> None:
    AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
    tiny.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, EfficientNetLiteModel)
    assert loaded.config.to_diff_dict() == tiny.config.to_diff_dict()
    pixel_values = torch.randn(2, 3, 50, 30)
    assert torch.equal(loaded(pixel_values).last_hidden_state, tiny(pixel_values).last_hidden_state)


def test_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = EfficientNetLiteModel(tiny_config())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model(torch.empty(1, 3, 64, 64, device="meta")).last_hidden_state.shape == (1, 36, 8, 8)


def test_bfloat16_is_near_float32(tiny: EfficientNetLiteModel) -> None:
    pixel_values = torch.randn(2, 3, 64, 64)
    want = tiny(pixel_values).last_hidden_state
    got = tiny.to(torch.bfloat16)(pixel_values.bfloat16()).last_hidden_state
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() / want.norm() < 0.03


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_the_same_gradient(tiny: EfficientNetLiteModel, checkpointing: bool) -> None:
    pixel_values = torch.randn(2, 3, 48, 40)
    tiny(pixel_values).last_hidden_state.square().mean().backward()
    want = {name: parameter.grad.clone() for name, parameter in tiny.named_parameters()}
    tiny.zero_grad()
    tiny.train()
    if checkpointing:
        tiny.gradient_checkpointing_enable()
    pixels = pixel_values.clone().requires_grad_()
    tiny(pixels).last_hidden_state.square().mean().backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(parameter.grad, want[name])
    assert pixels.grad.abs().sum() > 0


def test_initial_weights_keep_the_scale_of_the_signal() -> None:
    torch.manual_seed(0)
    output = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()(torch.randn(2, 3, 64, 64))
    assert 0.05 < output.last_hidden_state.std() < 20
    assert not any(
        isinstance(module, nn.BatchNorm2d) for module in EfficientNetLiteModel(tiny_config()).modules()
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"depths": [1, 2, 1]}, "depths"),
        ({"feature_strides": [8]}, "feature_strides"),
        ({"feature_strides": [16, 8]}, "feature_strides"),
        ({"feature_strides": [8, 16, 32]}, "feature_strides"),
        ({"feature_strides": []}, "feature_strides"),
    ],
    ids=["length", "last stage unused", "descending", "unknown stride", "none"],
)
def test_a_wrong_config_names_the_field(changes: dict[str, list[int]], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        tiny_config(**changes)


def test_return_dict_false_gives_a_tuple(tiny: EfficientNetLiteModel) -> None:
    feature_map, pooled = tiny(torch.randn(1, 3, 32, 32), return_dict=False)
    assert feature_map.shape[:2] == pooled.shape


def test_no_torchvision_is_needed() -> None:
    code = "import sys, storm_vlm.model.efficientnet_lite; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_file_is_never_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a file"):
        load_efficientnet_lite0(tmp_path / "missing.pth")
    path = tmp_path / "other.pth"
    torch.save({"_conv_stem.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="SHA-256"):
        load_efficientnet_lite0(path)


@pytest.mark.parametrize("size", [(224, 224), (225, 190)], ids=str)
def test_the_pretrained_weights_give_another_implementation_s_features_and_logits(
    weights: Path, size: tuple[int, int]
) -> None:
    # The weights come from TensorFlow: the peer with TensorFlow's padding and epsilon is theirs.
    geffnet = pytest.importorskip("geffnet")
    source = torch.load(weights, weights_only=True)
    peer = geffnet.tf_efficientnet_lite0(pretrained=False).eval()
    # Same tensors in the same order under other names.
    peer.load_state_dict(dict(zip(peer.state_dict(), source.values(), strict=True)))
    pixel_values = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden_states = peer.act1(peer.bn1(peer.conv_stem(pixel_values)))
        want = [hidden_states := stage(hidden_states) for stage in peer.blocks]
        got = load_efficientnet_lite0(weights)(pixel_values, output_hidden_states=True).hidden_states
        head = functional.conv2d(got[-1], source["_conv_head.weight"])
        statistics = [source[f"_bn1.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        head = functional.relu6(functional.batch_norm(head, *statistics, eps=1e-3)).mean(dim=(2, 3))
        logits = functional.linear(head, source["_fc.weight"], source["_fc.bias"])
        want_logits = peer(pixel_values)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    torch.testing.assert_close(logits, want_logits, rtol=1e-4, atol=1e-4)


def test_the_pretrained_model_saves_and_loads(weights: Path, tmp_path: Path) -> None:
    model = load_efficientnet_lite0(weights)
    assert not model.training
    model.save_pretrained(tmp_path)
    loaded = EfficientNetLiteModel.from_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 96, 64)
    assert torch.equal(loaded(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)
