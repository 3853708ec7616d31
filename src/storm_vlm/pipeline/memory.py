"""How much memory a request takes, before it is begun: one clear error in place of an out-of-memory crash."""

from dataclasses import dataclass

import psutil
import torch

from storm_vlm.errors import BudgetError
from storm_vlm.model import StormForConditionalGeneration, TokenCompression, visual_grid

# Tokens that go through a Mamba layer at once; its buffers do not grow with the video.
MIX_CHUNK_TOKENS = 4096
# Frames that are in memory as pixels at once.
CHUNK_FRAMES = 8
# Activations of a vision encoder as a multiple of its input: 24 for EfficientNet-Lite0, 30 for SigLIP so400m at 448.
_VISION_ACTIVATIONS = 32
# Live buffers of a Mamba layer, each as wide as its inner channels.
_MIXER_BUFFERS = 10
# Projected tokens, enriched tokens and the layer norm's output.
_TOKEN_BUFFERS = 3
# Live buffers of a decoder layer in prefill, each as wide as the hidden or the intermediate size.
_PREFILL_HIDDEN, _PREFILL_INTERMEDIATE = 8, 3
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Estimated memory of one request beside the weights, in bytes.

    Attributes:
        vision_bytes: One piece of frames in the vision encoder.
        tokens_bytes: All visual tokens before compression, and a Mamba layer's buffers.
        kv_cache_bytes: Keys and values of the prompt and the answer.
        prefill_bytes: Activations of the language model while it reads the prompt.
    """

    vision_bytes: int
    tokens_bytes: int
    kv_cache_bytes: int
    prefill_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The larger of encoding and answering."""
        return max(self.vision_bytes + self.tokens_bytes, self.kv_cache_bytes + self.prefill_bytes)


def estimate_memory(
    model: StormForConditionalGeneration,
    frame_size: tuple[int, int],
    num_frames: int,
    compression: TokenCompression,
    *,
    num_text_tokens: int = 256,
) -> MemoryEstimate:
    """Estimates the memory of encoding a video and asking one question about it.

    Args:
        model: The model.
        frame_size: Height and width of its frames in pixels.
        num_frames: Frames of the video.
        compression: Token compression.
        num_text_tokens: Tokens of question and answer.

    Returns:
        The estimate, without the weights.
    """
    config, text = model.config, model.config.text_config.get_text_config()
    itemsize = model.dtype.itemsize
    patch_grid = (
        num_frames,
        frame_size[0] // config.vision_patch_size,
        frame_size[1] // config.vision_patch_size,
    )
    downsample = config.projector_config.downsample
    frames, rows, columns = visual_grid(patch_grid, downsample, TokenCompression())
    groups, kept_rows, kept_columns = visual_grid(patch_grid, downsample, compression)
    num_prompt_tokens = groups * kept_rows * kept_columns + num_text_tokens
    width = config.projector_config.hidden_size
    num_kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    mixer = MIX_CHUNK_TOKENS * config.projector_config.expand * width * 4 * _MIXER_BUFFERS
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return MemoryEstimate(
        vision_bytes=min(num_frames, CHUNK_FRAMES)
        * 3
        * frame_size[0]
        * frame_size[1]
        * 4
        * _VISION_ACTIVATIONS,
        tokens_bytes=frames * rows * columns * width * itemsize * _TOKEN_BUFFERS + mixer,
        kv_cache_bytes=num_prompt_tokens * text.num_hidden_layers * 2 * num_kv_heads * head_size * itemsize,
        prefill_bytes=num_prompt_tokens
        * (_PREFILL_HIDDEN * text.hidden_size + _PREFILL_INTERMEDIATE * intermediate)
        * itemsize,
    )


def check_memory(
    model: StormForConditionalGeneration,
    frame_size: tuple[int, int],
    num_frames: int,
    compression: TokenCompression,
    max_memory_bytes: int | None,
) -> None:
    """Refuses a request that does not fit the memory, before any work is done.

    Args:
        model: The model.
        frame_size: Height and width of its frames in pixels.
        num_frames: Frames of the video.
        compression: Token compression.
        max_memory_bytes: Most memory for weights and request together; what the device has free if None.

    Raises:
        BudgetError: It does not fit; the message says how many frames would.
    """
    free_bytes = _free_bytes(model, max_memory_bytes)

    def fits(frames: int) -> bool:
        return estimate_memory(model, frame_size, frames, compression).peak_bytes <= free_bytes

    if fits(num_frames):
        return
    low, high = 0, num_frames
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    needed = estimate_memory(model, frame_size, num_frames, compression).peak_bytes
    advice = f"{low} frames would fit" if low else "not even one frame would fit"
    raise BudgetError(
        f"{num_frames} frames need about {needed / _GIB:.2f} GiB beside the weights and {free_bytes / _GIB:.2f} GiB "
        f"are free: {advice} with temporal_pool={compression.temporal_pool}, "
        f"spatial_pool={compression.spatial_pool}, temporal_sample={compression.temporal_sample}"
    )


def _free_bytes(model: StormForConditionalGeneration, max_memory_bytes: int | None) -> int:
    if max_memory_bytes is not None:
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        return max(0, max_memory_bytes - weights)
    if model.device.type == "cuda":
        return torch.cuda.mem_get_info(model.device)[0]
    return psutil.virtual_memory().available
