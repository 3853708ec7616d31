"""FLOPs against figures worked out by hand, and against a scan that counts its own operations."""

import itertools

import pytest
import torch

from storm_vlm.model import MambaMixer, TokenCompression
from storm_vlm.profiling.flops import (
    compression_flops,
    encoding_flops,
    flop_counter,
    linear_flops,
    mixer_flops,
    scan_flops,
)


def test_a_linear_layer():
    layer = torch.nn.Linear(3, 5)
    with torch.inference_mode(), flop_counter() as counter:
        layer(torch.zeros(2, 7, 3))
    assert counter.get_total_flops() == linear_flops(14, 3, 5) == 2 * 2 * 7 * 3 * 5


@pytest.mark.parametrize("num_heads_of_keys", [4, 2])
def test_attention_is_counted_on_the_cpu(num_heads_of_keys):
    query = torch.randn(1, 4, 10, 8)
    key = torch.randn(1, num_heads_of_keys, 10, 8)
    with torch.inference_mode(), flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    # Scores and mixing: 4 heads, 10 queries, 10 keys, 8 channels, twice, a multiplication and an addition each.
    assert counter.get_total_flops() == 2 * 2 * 4 * 10 * 10 * 8


class Counted(float):
    """A number that counts the operations it takes part in."""

    count = itertools.count()

    def __add__(self, other):
        next(Counted.count)
        return Counted(float(self) + float(other))

    def __mul__(self, other):
        next(Counted.count)
        return Counted(float(self) * float(other))

    def exp(self):
        next(Counted.count)
        return Counted(2.0 ** float(self))


def test_the_scan_is_counted_operation_by_operation():
    """Runs Algorithm 2 of the Mamba paper on counting numbers."""
    length, d, n = 5, 3, 4
    one = Counted(1.0)
    Counted.count = itertools.count()
    for _ in range(d):
        state = [one] * n
        for _ in range(length):
            delta, u, D = one, one, one
            delta_u = delta * u
            y = D * u
            for i in range(n):
                A, B, C = one, one, one
                state[i] = (delta * A).exp() * state[i] + delta_u * B
                y = y + C * state[i]
    assert scan_flops(length, d, n) == next(Counted.count) == 5 * 3 * (7 * 4 + 2)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_mixer(bidirectional):
    mixer = MambaMixer(8, d_state=4, d_conv=3, expand=2, dt_rank=2, bidirectional=bidirectional)
    length, d = 10, 16
    outer = 2 * length * 8 * 2 * d + 2 * length * d * 8
    direction = (
        2 * length * d * 3 + 2 * length * d * (2 + 2 * 4) + 2 * length * 2 * d + length * d * (7 * 4 + 2)
    )
    assert mixer_flops(mixer, length) == outer + (1 + bidirectional) * direction


def test_encoding_a_video(video_qa):
    """SigLIP: width 24, 2 layers, 16 patches of 8x8 pixels; projector: width 32, inner 64, rank 2, 4 tokens a frame."""
    flops = encoding_flops(video_qa.model, (32, 32), 6, TokenCompression(temporal_pool=4))
    patches = 2 * 16 * (3 * 8 * 8) * 24
    attention = 4 * 2 * 16 * 24 * 24 + 2 * 2 * 16 * 16 * 24
    mlp = 2 * 2 * 16 * 24 * 48
    assert flops["vision"] == 6 * (patches + 2 * (attention + mlp))
    length, d = 6 * 4, 64
    direction = (
        2 * length * d * 4 + 2 * length * d * (2 + 2 * 16) + 2 * length * 2 * d + length * d * (7 * 16 + 2)
    )
    mixer = 2 * length * 32 * 2 * d + 2 * length * d * 32 + 2 * direction
    assert flops["projector"] == 2 * length * (4 * 24) * 32 + mixer
    assert flops["compression"] == length * 32


def test_compression():
    grid, width = (10, 4, 6), 8
    assert compression_flops(grid, width, TokenCompression(temporal_sample=2)) == 0
    assert compression_flops(grid, width, TokenCompression(temporal_pool=4)) == 10 * 24 * 8
    # Of the 10 frames 3 groups are left when space is pooled.
    both = TokenCompression(temporal_pool=4, spatial_pool=4, temporal_sample=2)
    assert compression_flops(grid, width, both) == 10 * 24 * 8 + 3 * 24 * 8
