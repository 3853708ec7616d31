"""Token compression: fewer visual tokens for the language model, and the one place that counts them.

Shapes: ``t`` frames, ``h`` rows, ``w`` columns, ``d`` channels; a grid is ``(t, h, w)``.
"""

import math
from dataclasses import dataclass, replace

import torch

from storm_vlm.errors import BudgetError, StormError

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class TokenCompression:
    """How many visual tokens are merged or dropped between the temporal projector and the language model.

    Attributes:
        temporal_pool: Mean of this many consecutive frames; a tail group is the mean of the frames it has.
        spatial_pool: Mean over square blocks of this many tokens within a frame; a perfect square.
        temporal_sample: Keep every n-th frame, beginning with the first; used in evaluation only.

    Raises:
        StormError: A value is not a positive integer, or ``spatial_pool`` is not a perfect square.

    Source:
        STORM (arXiv 2503.04130), Eq. 6-8.
    """

    temporal_pool: int = 1
    spatial_pool: int = 1
    temporal_sample: int = 1

    def __post_init__(self) -> None:
        for name in ("temporal_pool", "spatial_pool", "temporal_sample"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise StormError(f"{name} must be a positive integer, got {value!r}")
        if math.isqrt(self.spatial_pool) ** 2 != self.spatial_pool:
            raise StormError(f"spatial_pool must be a perfect square (1, 4, 9, ...), got {self.spatial_pool}")

    @property
    def spatial_block(self) -> int:
        """Side of the pooled block: 2 for ``spatial_pool=4``."""
        return math.isqrt(self.spatial_pool)

    @property
    def frames_per_group(self) -> int:
        """Input frames between the starts of two output frames."""
        return self.temporal_pool * self.temporal_sample

    def without_sampling(self) -> "TokenCompression":
        """Returns the same pooling with ``temporal_sample=1``: what training uses."""
        return replace(self, temporal_sample=1)

    def grid(self, grid: Grid) -> Grid:
        """Returns the grid that is left of ``grid`` after compression.

        Args:
            grid: Frames, rows and columns of the temporal projector's output.

        Returns:
            Frames, rows and columns that reach the language model.

        Raises:
            StormError: ``spatial_pool`` does not divide the rows or columns.
        """
        t, h, w = grid
        block = self.spatial_block
        if h % block or w % block:
            raise StormError(
                f"spatial_pool={self.spatial_pool} averages {block}x{block} blocks, which do not divide the "
                f"{h}x{w} token grid of a frame: choose a spatial_pool whose root divides both"
            )
        num_groups = math.ceil(math.ceil(t / self.temporal_pool) / self.temporal_sample)
        return num_groups, h // block, w // block

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compresses the tokens of one video: temporal pooling, spatial pooling, then temporal sampling.

        Args:
            tokens: Visual tokens, ``(t, h, w, d)``.

        Returns:
            Compressed tokens, with the shape that ``grid`` announces.
        """
        return temporal_sample(
            spatial_pool(temporal_pool(tokens, self.temporal_pool), self.spatial_pool), self.temporal_sample
        )


def temporal_pool(tokens: torch.Tensor, k: int) -> torch.Tensor:
    """Averages each ``k`` consecutive frames; the last group is the mean of the frames that it has.

    Args:
        tokens: Visual tokens, ``(t, h, w, d)``.
        k: Frames in a group.

    Returns:
        Pooled tokens, ``(ceil(t / k), h, w, d)``.

    Source:
        STORM (arXiv 2503.04130), Eq. 6; the treatment of the tail is ours.
    """
    if k == 1:
        return tokens
    num_whole = tokens.shape[0] // k
    whole, tail = tokens[: num_whole * k], tokens[num_whole * k :]
    pooled = whole.unflatten(0, (num_whole, k)).mean(dim=1) if num_whole else whole
    if tail.shape[0]:
        pooled = torch.cat([pooled, tail.mean(dim=0, keepdim=True)])
    return pooled


def spatial_pool(tokens: torch.Tensor, p: int) -> torch.Tensor:
    """Averages square blocks of ``p`` tokens within each frame.

    Args:
        tokens: Visual tokens, ``(t, h, w, d)``.
        p: Tokens in a block, a perfect square whose root divides ``h`` and ``w``.

    Returns:
        Pooled tokens, ``(t, h / sqrt(p), w / sqrt(p), d)``.

    Source:
        STORM (arXiv 2503.04130), Eq. 7.
    """
    if p == 1:
        return tokens
    t, h, w, d = tokens.shape
    _, rows, columns = TokenCompression(spatial_pool=p).grid((t, h, w))
    return tokens.view(t, rows, h // rows, columns, w // columns, d).mean(dim=(2, 4))


def temporal_sample(tokens: torch.Tensor, s: int) -> torch.Tensor:
    """Keeps the frames 0, s, 2s, ... of ``(t, h, w, d)`` tokens (STORM, Eq. 8)."""
    return tokens if s == 1 else tokens[::s]


def visual_grid(patch_grid: Grid, downsample: int, compression: TokenCompression) -> Grid:
    """Returns the grid of visual tokens that the language model sees for one video or image.

    This is the only place where visual tokens are counted: the processor makes as many placeholders and the
    model as many features.

    Args:
        patch_grid: Frames, rows and columns of the vision encoder's output.
        downsample: Patches merged into one token by the projector's pixel shuffle, a perfect square.
        compression: Token compression in use.

    Returns:
        Frames (groups), rows and columns of visual tokens.
    """
    side = math.isqrt(downsample)
    t, h, w = patch_grid
    return compression.grid((t, -(-h // side), -(-w // side)))


@dataclass(frozen=True, slots=True)
class FramePlan:
    """Which frames and which compression a request comes to.

    Attributes:
        num_frames: Frames to sample from the video.
        compression: Token compression, with the temporal_sample that was chosen.
        num_visual_tokens: Tokens that reach the language model.
        num_uncompressed_tokens: Tokens that the same frames give without compression.
    """

    num_frames: int
    compression: TokenCompression
    num_visual_tokens: int
    num_uncompressed_tokens: int


def plan_frames(
    patch_grid_hw: tuple[int, int],
    downsample: int,
    compression: TokenCompression,
    *,
    available_frames: int,
    num_frames: int | None,
    token_budget: int | None = None,
) -> FramePlan:
    """Chooses the frames, or the temporal sampling, that fit a budget of visual tokens.

    With a budget alone, the largest number of frames that fits and that the video has; with a budget and a number
    of frames, the smallest ``temporal_sample`` that fits; without a budget, the frames asked, as far as the video
    has them.

    Args:
        patch_grid_hw: Rows and columns of the vision encoder's output for one frame.
        downsample: Patches merged into one token by the projector.
        compression: The compression asked for.
        available_frames: Frames that the video has.
        num_frames: Frames asked for; None to take what the budget allows.
        token_budget: Most visual tokens allowed for the video; None for no limit.

    Returns:
        The plan, whose ``num_visual_tokens`` is exact.

    Raises:
        StormError: Neither ``num_frames`` nor ``token_budget`` is given, or a number is below 1.
        BudgetError: Not even one frame fits the budget.
    """
    for name, value in (("num_frames", num_frames), ("token_budget", token_budget)):
        if value is not None and value < 1:
            raise StormError(f"{name} must be at least 1, got {value}")
    tokens_per_group = math.prod(visual_grid((1, *patch_grid_hw), downsample, compression))
    if token_budget is not None and tokens_per_group > token_budget:
        raise BudgetError(
            f"token_budget={token_budget} is below the {tokens_per_group} tokens of a single frame: raise it, or "
            f"use a larger spatial_pool"
        )
    if num_frames is None:
        if token_budget is None:
            raise StormError("num_frames or token_budget must be given")
        num_frames = (token_budget // tokens_per_group) * compression.frames_per_group
    num_frames = min(num_frames, available_frames)
    if token_budget is not None:
        num_groups = -(-num_frames // compression.temporal_pool)
        smallest_sample = -(-num_groups // (token_budget // tokens_per_group))
        compression = replace(compression, temporal_sample=max(compression.temporal_sample, smallest_sample))
    patch_grid = (num_frames, *patch_grid_hw)
    return FramePlan(
        num_frames=num_frames,
        compression=compression,
        num_visual_tokens=math.prod(visual_grid(patch_grid, downsample, compression)),
        num_uncompressed_tokens=math.prod(visual_grid(patch_grid, downsample, TokenCompression())),
    )
