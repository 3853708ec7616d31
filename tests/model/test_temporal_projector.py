"""The temporal projector: its parts against plain PyTorch, and that videos do not see each other."""

import pytest
import torch
from torch.nn import functional

from storm_vlm.model import TemporalProjector, TemporalProjectorConfig
from storm_vlm.model.temporal_projector import pixel_shuffle
from tests.numerics import assert_matches


def make_projector(**options) -> TemporalProjector:
    return TemporalProjector(TemporalProjectorConfig(input_size=6, output_size=16, **options)).eval()


def test_pixel_shuffle_collects_neighbouring_patches_row_by_row():
    features = torch.arange(16.0).view(1, 4, 4, 1)
    assert pixel_shuffle(features, 2)[0, 0, 0].tolist() == [0, 1, 4, 5]
    assert pixel_shuffle(features, 2)[0, 1, 0].tolist() == [8, 9, 12, 13]


def test_pixel_shuffle_equals_torch():
    features = torch.randn(3, 4, 6, 5)
    theirs = functional.pixel_unshuffle(features.permute(0, 3, 1, 2), 2)  # (t, c * a * b, h, w)
    theirs = theirs.unflatten(1, (5, 4)).permute(0, 3, 4, 2, 1).flatten(3)
    assert torch.equal(pixel_shuffle(features, 2), theirs)


def test_grid_that_is_not_divided_is_padded_with_zeros():
    features = torch.arange(1.0, 10.0).view(1, 3, 3, 1)
    shuffled = pixel_shuffle(features, 2)
    assert shuffled.shape == (1, 2, 2, 4)
    assert shuffled[0, 0, 1].tolist() == [3, 0, 6, 0]
    assert shuffled[0, 1, 1].tolist() == [9, 0, 0, 0]


def test_baseline_is_layer_norm_linear_gelu_linear():
    projector = make_projector(projector_type="mlp", num_mamba_layers=0)
    features = torch.randn(2, 4, 4, 6)
    norm, first, _, second = projector.input_projection
    x = pixel_shuffle(features, 2)
    x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + norm.eps)
    x = x * norm.weight + norm.bias
    x = x @ first.weight.T + first.bias
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    assert_matches("baseline", projector([features])[0], x @ second.weight.T + second.bias)


def test_baseline_frames_do_not_see_each_other():
    projector = make_projector(projector_type="mlp", num_mamba_layers=0)
    features = torch.randn(5, 4, 4, 6)
    whole = projector([features])[0]
    assert_matches("frame 3", projector([features[3:4]])[0], whole[3:4])


def test_mamba_layers_carry_the_past_and_the_future():
    projector = make_projector()
    features = torch.randn(5, 4, 4, 6)
    changed = features.clone()
    changed[2] += 1
    difference = (projector([changed])[0] - projector([features])[0]).abs().amax(dim=(1, 2, 3))
    assert (difference > 0).all()


@pytest.mark.parametrize("projector_type", ["linear", "mlp"])
def test_zero_init_begins_as_if_there_were_no_layers(projector_type):
    projector = make_projector(projector_type=projector_type, num_mamba_layers=2, zero_init_residual=True)
    features = torch.randn(3, 4, 4, 6)
    assert torch.equal(projector([features])[0], projector.project(features))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_videos_of_different_lengths_give_what_they_give_alone(bidirectional):
    projector = make_projector(num_mamba_layers=2, bidirectional=bidirectional)
    videos = [torch.randn(t, h, w, 6) for t, h, w in [(5, 4, 4), (2, 4, 4), (5, 4, 4), (1, 2, 6), (3, 3, 5)]]
    together = projector(videos)
    for video, tokens in zip(videos, together, strict=True):
        assert_matches("video", tokens, projector([video])[0])


@pytest.mark.parametrize("pieces", [[1] * 6, [2, 4], [5, 1]], ids=str)
def test_streaming_equals_the_whole_video(pieces):
    projector = make_projector(num_mamba_layers=2, bidirectional=False)
    features = torch.randn(6, 4, 4, 6)
    states, tokens = None, []
    for piece in features.split(pieces):
        enriched, states = projector.step(piece, states)
        tokens.append(enriched)
    assert_matches("streamed", torch.cat(tokens), projector([features])[0])


def test_inner_width_may_differ_from_the_language_models():
    projector = make_projector(hidden_size=8)
    assert projector([torch.randn(2, 4, 4, 6)])[0].shape == (2, 2, 2, 16)
    assert projector.layers[0].norm.weight.shape == (8,)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"downsample": 3}, "downsample"),
        ({"num_mamba_layers": -1}, "num_mamba_layers"),
        ({"projector_type": "conv"}, "projector_type"),
    ],
)
def test_bad_values_name_their_field(options, field):
    with pytest.raises(Exception, match=field):
        make_projector(**options)
