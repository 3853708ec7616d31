"""Token compression against hand-worked cases and plain loops, and the planner against exhaustive search."""

import itertools
import math

import pytest
import torch

from storm_vlm.errors import BudgetError
from storm_vlm.model import TokenCompression, plan_frames, visual_grid
from storm_vlm.model.token_compression import temporal_pool

# The paper's frame: 32x32 patches of 14 pixels, four of which become one token: 256 tokens.
PAPER_PATCHES = (32, 32)


def loop_compress(tokens: torch.Tensor, compression: TokenCompression) -> torch.Tensor:
    """Equations 6-8 as loops over single tokens."""
    t, h, w, _ = tokens.shape
    k, s, block = compression.temporal_pool, compression.temporal_sample, math.isqrt(compression.spatial_pool)
    groups = [tokens[start : min(start + k, t)] for start in range(0, t, k)]
    frames = []
    for group in groups[::s]:
        frame = sum(group) / len(group)
        rows = []
        for i in range(0, h, block):
            row = []
            for j in range(0, w, block):
                cells = [frame[a, b] for a in range(i, i + block) for b in range(j, j + block)]
                row.append(sum(cells) / len(cells))
            rows.append(torch.stack(row))
        frames.append(torch.stack(rows))
    return torch.stack(frames)


@pytest.mark.parametrize("num_frames", [1, 2, 7, 8, 9])
@pytest.mark.parametrize(("k", "p", "s"), itertools.product([1, 2, 4], [1, 4], [1, 2, 3]))
def test_equals_the_loop(num_frames, k, p, s):
    tokens = torch.randn(num_frames, 4, 6, 3, dtype=torch.float64)
    compression = TokenCompression(k, p, s)
    compressed = compression(tokens)
    torch.testing.assert_close(compressed, loop_compress(tokens, compression))
    assert compressed.shape[:3] == compression.grid((num_frames, 4, 6))


def test_tail_group_is_the_mean_of_what_it_has():
    tokens = torch.arange(7.0).view(7, 1, 1, 1)
    assert temporal_pool(tokens, 4).flatten().tolist() == [1.5, 5.0]


def test_image_passes_temporal_steps_unchanged():
    tokens = torch.randn(1, 2, 2, 5)
    assert torch.equal(TokenCompression(temporal_pool=4, temporal_sample=2)(tokens), tokens)


@pytest.mark.parametrize(
    ("compression", "expected"),
    [
        (TokenCompression(), {1: 256, 7: 1792, 8: 2048, 32: 8192, 33: 8448, 128: 32768}),
        (TokenCompression(temporal_pool=4), {1: 256, 7: 512, 8: 512, 32: 2048, 33: 2304, 128: 8192}),
        (TokenCompression(spatial_pool=4), {1: 64, 7: 448, 8: 512, 32: 2048, 33: 2112, 128: 8192}),
        (TokenCompression(temporal_sample=2), {1: 256, 7: 1024, 8: 1024, 32: 4096, 33: 4352, 128: 16384}),
        (TokenCompression(4, 1, 2), {1: 256, 7: 256, 8: 256, 32: 1024, 33: 1280, 128: 4096}),
        (TokenCompression(1, 4, 2), {1: 64, 7: 256, 8: 256, 32: 1024, 33: 1088, 128: 4096}),
        (TokenCompression(4, 4, 2), {1: 64, 7: 64, 8: 64, 32: 256, 33: 320, 128: 1024}),
    ],
    ids=["none", "T.pool", "S.pool", "T.sample", "T.pool+T.sample", "S.pool+T.sample", "T+S.pool+T.sample"],
)
def test_counts_of_the_paper(compression, expected):
    counts = {t: math.prod(visual_grid((t, *PAPER_PATCHES), 4, compression)) for t in expected}
    assert counts == expected


def test_grid_that_the_downsampling_does_not_divide_is_padded():
    assert visual_grid((3, 7, 5), 4, TokenCompression()) == (3, 4, 3)


def test_spatial_pool_must_divide_the_grid():
    with pytest.raises(
        ValueError, match="spatial_pool=4 averages 2x2 blocks, which do not divide the 7x7 token grid"
    ):
        TokenCompression(spatial_pool=4)(torch.zeros(2, 7, 7, 3))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ((0, 1, 1), "temporal_pool"),
        ((1, 3, 1), "spatial_pool"),
        ((1, 1, -2), "temporal_sample"),
        ((1.5, 1, 1), "temporal_pool"),
    ],
)
def test_bad_values_name_their_field(values, field):
    with pytest.raises(ValueError, match=field):
        TokenCompression(*values)


@pytest.mark.parametrize(
    "compression", [TokenCompression(), TokenCompression(4, 1, 1), TokenCompression(4, 4, 2)]
)
@pytest.mark.parametrize("budget", [64, 300, 1024, 8192])
def test_budget_alone_takes_the_most_frames_that_fit(compression, budget):
    def count(num_frames: int) -> int:
        return math.prod(visual_grid((num_frames, *PAPER_PATCHES), 4, compression))

    if count(1) > budget:
        with pytest.raises(BudgetError, match=f"token_budget={budget}"):
            plan_frames(
                PAPER_PATCHES, 4, compression, available_frames=100, num_frames=None, token_budget=budget
            )
        return
    plan = plan_frames(
        PAPER_PATCHES, 4, compression, available_frames=100, num_frames=None, token_budget=budget
    )
    assert plan.num_frames == max(n for n in range(1, 101) if count(n) <= budget)
    assert plan.num_visual_tokens == count(plan.num_frames)
    assert plan.compression == compression


@pytest.mark.parametrize("num_frames", [1, 7, 32, 33, 100])
def test_budget_and_frames_choose_the_least_sampling(num_frames):
    pooled = TokenCompression(temporal_pool=4)
    plan = plan_frames(
        PAPER_PATCHES, 4, pooled, available_frames=200, num_frames=num_frames, token_budget=1024
    )
    assert plan.num_frames == num_frames
    fitting = [
        s
        for s in range(1, 101)
        if math.prod(visual_grid((num_frames, *PAPER_PATCHES), 4, TokenCompression(4, 1, s))) <= 1024
    ]
    assert plan.compression.temporal_sample == min(fitting)
    assert plan.num_visual_tokens <= 1024


def test_frames_asked_are_limited_to_those_there_are():
    plan = plan_frames(PAPER_PATCHES, 4, TokenCompression(), available_frames=5, num_frames=32)
    assert (plan.num_frames, plan.num_visual_tokens, plan.num_uncompressed_tokens) == (5, 1280, 1280)
