"""How much memory a request takes, before it is begun: one clear error in place of an out-of-memory crash."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from storm_vlm.errors import BudgetError
from storm_vlm.model import StormForConditionalGeneration, TokenCompression, visual_grid
from storm_vlm.model.vocabulary_readout import READOUT_CHUNK_TOKENS

# Tokens that go through a Mamba layer at once; its buffers, but for one, do not grow with the video.
MIX_CHUNK_TOKENS = 4096
# Frames that are in memory as pixels at once.
CHUNK_FRAMES = 8
# Activations of a vision encoder as a multiple of its input: 24 for EfficientNet-Lite0, 30 for SigLIP so400m at 448.
_VISION_ACTIVATIONS = 32
# Live buffers of a Mamba layer, each as wide as its inner channels.
_MIXER_BUFFERS = 10
# Beside the projected tokens: the sequence made of them, the layer norm's output and the mixer's.
_TOKEN_BUFFERS = 3
# Scores of the vocabulary, and the softmax of them.
_READOUT_BUFFERS = 2
# Live buffers of a decoder layer in prefill, each as wide as the hidden or the intermediate size.
_PREFILL_HIDDEN, _PREFILL_INTERMEDIATE = 8, 3
# What the libraries' kernels take on first use, measured on a CPU.
_WORKSPACE_BYTES = 128 * 2**20
_TEXT_TOKENS = 256
_GIB = 2**30
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Estimated memory of one request beside the weights, in bytes.

    Attributes:
        vision_bytes: One piece of frames in the vision encoder.
        tokens_bytes: All projected tokens, before compression.
        mixing_bytes: Copies of them and buffers while the Mamba layers run.
        readout_bytes: Scores of the vocabulary, of as many compressed tokens as are read out at once.
        kv_cache_bytes: Keys and values of the prompt and the answer.
        prefill_bytes: Activations of the language model while it reads the prompt.
        workspace_bytes: What libraries take on first use.
    """

    vision_bytes: int
    tokens_bytes: int
    mixing_bytes: int
    readout_bytes: int
    kv_cache_bytes: int
    prefill_bytes: int
    workspace_bytes: int = _WORKSPACE_BYTES

    @property
    def encode_bytes(self) -> int:
        """Peak while the video is encoded."""
        largest = max(self.vision_bytes, self.mixing_bytes, self.readout_bytes)
        return self.tokens_bytes + largest + self.workspace_bytes

    @property
    def answer_bytes(self) -> int:
        """Peak while the question is answered."""
        return self.kv_cache_bytes + self.prefill_bytes + self.workspace_bytes

    @property
    def peak_bytes(self) -> int:
        """The larger of encoding and answering."""
        return max(self.encode_bytes, self.answer_bytes)


def estimate_memory(
    model: StormForConditionalGeneration,
    frame_size: tuple[int, int],
    num_frames: int,
    compression: TokenCompression,
    *,
    num_text_tokens: int = _TEXT_TOKENS,
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
    config = model.config
    patch_grid = (
        num_frames,
        frame_size[0] // config.vision_patch_size,
        frame_size[1] // config.vision_patch_size,
    )
    downsample = config.projector_config.downsample
    frames, rows, columns = visual_grid(patch_grid, downsample, TokenCompression())
    groups, kept_rows, kept_columns = visual_grid(patch_grid, downsample, compression)
    width = config.projector_config.hidden_size
    num_pixels = min(num_frames, CHUNK_FRAMES) * 3 * frame_size[0] * frame_size[1]
    mixer_bytes = MIX_CHUNK_TOKENS * config.projector_config.expand * width * 4 * _MIXER_BUFFERS
    num_kept = groups * kept_rows * kept_columns
    kv_cache_bytes, prefill_bytes = _answer_bytes(model, num_kept + num_text_tokens, 0)
    tokens_bytes = frames * rows * columns * width * model.dtype.itemsize
    # The first direction's output, as wide as the inner channels, until the second one is added to it.
    kept_bytes = tokens_bytes * config.projector_config.expand * config.projector_config.bidirectional
    return MemoryEstimate(
        vision_bytes=num_pixels * 4 * _VISION_ACTIVATIONS,
        tokens_bytes=tokens_bytes,
        mixing_bytes=tokens_bytes * _TOKEN_BUFFERS + kept_bytes + mixer_bytes,
        readout_bytes=_readout_bytes(model, num_kept),
        kv_cache_bytes=kv_cache_bytes,
        prefill_bytes=prefill_bytes,
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
        BudgetError: It does not fit; the message says how many frames, or which compression, would.
    """
    free_bytes = available_bytes(model, max_memory_bytes)

    def fits(frames: int, sample: int) -> bool:
        sampled = replace(compression, temporal_sample=sample)
        return estimate_memory(model, frame_size, frames, sampled).peak_bytes <= free_bytes

    sample = compression.temporal_sample
    if fits(num_frames, sample):
        return
    most = _largest(num_frames, lambda frames: fits(frames, sample))
    advice = f"{most} frames would fit" if most else "not even one frame would fit"
    advice += (
        f" with temporal_pool={compression.temporal_pool}, spatial_pool={compression.spatial_pool}, "
        f"temporal_sample={sample}"
    )
    sparser = 1 + _largest(num_frames + 1, lambda sample: not fits(num_frames, sample))
    if sparser <= num_frames:
        advice += f", and all {num_frames} with temporal_sample={sparser}"
    needed = estimate_memory(model, frame_size, num_frames, compression).peak_bytes
    raise BudgetError(
        f"{num_frames} frames need about {needed / _GIB:.2f} GiB beside the weights and {free_bytes / _GIB:.2f} GiB "
        f"are free: {advice}"
    )


def check_prompt_memory(
    model: StormForConditionalGeneration,
    num_prompt_tokens: int,
    num_new_tokens: int,
    free_bytes: int,
) -> None:
    """Refuses a prompt whose keys, values and activations do not fit the memory, before any work is done.

    Args:
        model: The model.
        num_prompt_tokens: Tokens of the prompt.
        num_new_tokens: Most tokens of the answer.
        free_bytes: Memory for them.

    Raises:
        BudgetError: It does not fit; the message says how many tokens would.
    """

    def needed_bytes(num_tokens: int) -> int:
        return sum(_answer_bytes(model, num_tokens, num_new_tokens)) + _WORKSPACE_BYTES

    needed = needed_bytes(num_prompt_tokens)
    if needed <= free_bytes:
        return
    most = _largest(num_prompt_tokens, lambda tokens: needed_bytes(tokens) <= free_bytes)
    raise BudgetError(
        f"a prompt of {num_prompt_tokens} tokens and an answer of {num_new_tokens} need about {needed / _GIB:.2f} GiB "
        f"beside the weights and {free_bytes / _GIB:.2f} GiB are free: a prompt of {most} tokens would fit; take fewer "
        f"frames, more compression or a smaller token_budget"
    )


def available_bytes(model: StormForConditionalGeneration, max_memory_bytes: int | None) -> int:
    """Returns the memory that a request may take beside the weights.

    Args:
        model: The model.
        max_memory_bytes: Most memory for weights and request together; None for no limit but the device's.

    Returns:
        What is free on the device and below the limit.
    """
    free_bytes = free_bytes_on(model.device)
    if max_memory_bytes is None:
        return free_bytes
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return max(0, min(free_bytes, max_memory_bytes - weights))


def _readout_bytes(model: StormForConditionalGeneration, num_tokens: int) -> int:
    """Returns the memory of the vocabulary's scores while compressed tokens are read out, 0 without a readout."""
    if not model.config.projector_config.vocabulary_readout:
        return 0
    vocabulary_size = model.get_input_embeddings().num_embeddings
    scores = min(num_tokens, READOUT_CHUNK_TOKENS) * vocabulary_size
    return scores * model.dtype.itemsize * _READOUT_BUFFERS


def _answer_bytes(
    model: StormForConditionalGeneration, num_prompt_tokens: int, num_new_tokens: int
) -> tuple[int, int]:
    """Returns the memory of keys and values, and of the activations while the prompt is read."""
    text, itemsize = model.config.text_config.get_text_config(), model.dtype.itemsize
    num_kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    kv_bytes_per_token = text.num_hidden_layers * 2 * num_kv_heads * head_size * itemsize
    prefill_bytes_per_token = (
        _PREFILL_HIDDEN * text.hidden_size + _PREFILL_INTERMEDIATE * intermediate
    ) * itemsize
    return (
        (num_prompt_tokens + num_new_tokens) * kv_bytes_per_token,
        num_prompt_tokens * prefill_bytes_per_token,
    )


def _largest(upper: int, fits: Callable[[int], bool]) -> int:
    """Returns the largest number from 1 to below ``upper`` that fits, 0 if none does; all smaller ones must fit too."""
    low, high = 0, upper
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def free_bytes_on(device: torch.device) -> int:
    """Returns the memory of a device that can still be had; of a CPU, that of the machine and its container."""
    if device.type == "cuda":
        # What PyTorch holds without using it can be had again.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    available = psutil.virtual_memory().available
    in_cgroup = _free_bytes_in_cgroup()
    return available if in_cgroup is None else min(available, in_cgroup)


def _free_bytes_in_cgroup() -> int | None:
    """Returns what a container's memory limit leaves (cgroup v2), which the machine's free memory does not show."""
    try:
        line = next(line for line in _OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    own = _CGROUPS / line.removeprefix("0::").lstrip("/")
    groups = [own, *own.parents]
    left = [_left_in(group) for group in groups[: groups.index(_CGROUPS) + 1]]
    return min((free for free in left if free is not None), default=None)


def _left_in(group: Path) -> int | None:
    """Returns the limit of one group less what it uses; files that can be dropped from memory are no use."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))
