"""Floating-point operations of each part, a multiplication and an addition being two.

The backbones' matrix products, convolutions and attention are counted by PyTorch as they run. Compiled scans are not
seen by it, so a Mamba mixer is counted by formula, and each of its products once, also where inference in pieces
computes one again. Norms, activations and softmax are left out, as PyTorch leaves them out. Attention counts as the
full square of queries and keys, of which a causal kernel may spare half.

Shapes: ``l`` tokens, ``d`` inner channels, ``n`` state size, ``k`` taps, ``r`` rank of the time steps.
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from storm_vlm.model import MambaMixer, StormForConditionalGeneration, TemporalProjector, TokenCompression
from storm_vlm.model.token_compression import Grid

# For each channel and state of a step: delta A and its exponential, (delta u) B, two for h = a h + b, two for y += C h.
_SCAN_PER_STATE = 7
# For each channel of a step: delta u, and D u, which the sum over states begins with.
_SCAN_PER_CHANNEL = 2


def flop_counter() -> FlopCounterMode:
    """Returns a context that counts what runs in it, in this thread."""
    # PyTorch has no formula for the kernel that it uses on a CPU.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={on_cpu: _attention_flops})


def encoding_flops(
    model: StormForConditionalGeneration,
    frame_size: tuple[int, int],
    num_frames: int,
    compression: TokenCompression,
) -> dict[str, int]:
    """Counts what encoding a video takes; one blank frame is encoded for it, as all frames take the same.

    Args:
        model: The model.
        frame_size: Height and width of its frames in pixels.
        num_frames: Frames of the video.
        compression: Token compression.

    Returns:
        FLOPs of ``vision``, ``projector`` and ``compression``.
    """
    pixels = torch.zeros(1, 3, *frame_size)
    with torch.no_grad():
        with flop_counter() as vision:
            features = model.model.encode_patches(pixels)
        with flop_counter() as projection:
            tokens = model.temporal_projector.project(features.to(model.model.temporal_projector_device))
    _, rows, columns, width = tokens.shape
    grid = (num_frames, rows, columns)
    return {
        "vision": num_frames * vision.get_total_flops(),
        "projector": num_frames * projection.get_total_flops()
        + mixing_flops(model.temporal_projector, math.prod(grid)),
        "compression": compression_flops(
            grid, model.config.projector_config.output_size or width, compression
        )
        + readout_flops(model, math.prod(compression.grid(grid))),
    }


def readout_flops(model: StormForConditionalGeneration, num_tokens: int) -> int:
    """Counts the vocabulary readout of compressed tokens: their scores and the mean of the embeddings; 0 without it."""
    if not model.config.projector_config.vocabulary_readout:
        return 0
    vocabulary_size, width = model.get_input_embeddings().weight.shape
    return linear_flops(num_tokens, width, vocabulary_size) + linear_flops(num_tokens, vocabulary_size, width)


def mixing_flops(projector: TemporalProjector, num_tokens: int) -> int:
    """Counts the Mamba layers and the output projection over a sequence of tokens."""
    flops = sum(
        mixer_flops(module, num_tokens) for module in projector.modules() if isinstance(module, MambaMixer)
    )
    if isinstance(projector.output_projection, torch.nn.Linear):
        layer = projector.output_projection
        flops += linear_flops(num_tokens, layer.in_features, layer.out_features)
    return flops


def mixer_flops(mixer: MambaMixer, num_tokens: int) -> int:
    """Counts one Mamba mixer: the outer projections once, and what each direction has of its own.

    Args:
        mixer: The mixer.
        num_tokens: Length of the sequence.

    Returns:
        ``l d_model 2d + l d d_model`` multiply-adds, and for each direction ``l d k``, ``l d (r + 2n)``, ``l r d`` of
        them and the scan.

    Source:
        Gu and Dao 2023 (arXiv 2312.00752), Figure 3 and Algorithm 2.
    """
    d = mixer.d_inner
    outer = linear_flops(num_tokens, mixer.d_model, 2 * d) + linear_flops(num_tokens, d, mixer.d_model)
    direction = (
        linear_flops(num_tokens, mixer.d_conv, d)
        + linear_flops(num_tokens, d, mixer.dt_rank + 2 * mixer.d_state)
        + linear_flops(num_tokens, mixer.dt_rank, d)
        + scan_flops(num_tokens, d, mixer.d_state)
    )
    return outer + (2 if mixer.bidirectional else 1) * direction


def scan_flops(num_tokens: int, num_channels: int, state_size: int) -> int:
    """Counts the selective scan, ``7 l d n + 2 l d``; an exponential counts as one operation (ours)."""
    return num_tokens * num_channels * (_SCAN_PER_STATE * state_size + _SCAN_PER_CHANNEL)


def linear_flops(num_rows: int, input_size: int, output_size: int) -> int:
    """Counts a matrix product."""
    return 2 * num_rows * input_size * output_size


def compression_flops(grid: Grid, width: int, compression: TokenCompression) -> int:
    """Counts the additions of the means: one for each number that goes into one.

    Args:
        grid: Frames, rows and columns before compression.
        width: Channels of a token.
        compression: Token compression.

    Returns:
        FLOPs; sampling takes none.
    """
    flops = 0
    if compression.temporal_pool > 1:
        flops += math.prod(grid) * width
    if compression.spatial_pool > 1:
        flops += math.prod(TokenCompression(temporal_pool=compression.temporal_pool).grid(grid)) * width
    return flops


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)
