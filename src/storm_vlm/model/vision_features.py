"""Runs any vision encoder and returns its patch features as a grid, whatever form it gives them in.

Shapes: ``f`` frames or images, ``h`` rows, ``w`` columns of patches, ``c`` channels.
"""

import inspect

import torch
from einops import rearrange
from transformers import PreTrainedModel

from storm_vlm.errors import StormError

# Frames that go through the encoder at once, so that its activations do not grow with the video: few keep a CPU's
# caches warm, more fill a GPU.
_CHUNK_FRAMES_CPU, _CHUNK_FRAMES_GPU = 8, 32


def extract_features(
    vision_tower: PreTrainedModel,
    pixel_values: torch.Tensor,
    *,
    patch_size: int,
    feature_layer: int | None = None,
) -> torch.Tensor:
    """Encodes frames, some at a time, and lays their patch features out as a grid.

    Args:
        vision_tower: Encoder that returns patch tokens ``(f, n, c)``, with or without class and register tokens in
            front, or a feature map ``(f, c, h, w)``.
        pixel_values: Normalised pixels, ``(f, 3, height, width)``.
        patch_size: Pixels between two patches.
        feature_layer: Index into the encoder's hidden states; its last output if None.

    Returns:
        Features, ``(f, h, w, c)``.

    Raises:
        StormError: The frames are not ``(f, 3, height, width)``, or what the encoder returns is no grid of
            ``patch_size`` patches.
    """
    if pixel_values.ndim != 4:
        raise StormError(
            f"pixel values must be (frames, 3, height, width), got shape {tuple(pixel_values.shape)}"
        )
    # Weights that are offloaded have no device of their own: their hooks bring them to the pixels.
    device = pixel_values.device if vision_tower.device.type == "meta" else vision_tower.device
    chunk_frames = _CHUNK_FRAMES_CPU if device.type == "cpu" else _CHUNK_FRAMES_GPU
    pieces = pixel_values.to(dtype=vision_tower.dtype, device=device).split(chunk_frames)
    return torch.cat([_encode(vision_tower, piece, patch_size, feature_layer) for piece in pieces])


def probe_vision_tower(
    vision_tower: PreTrainedModel, image_size: tuple[int, int], feature_layer: int | None = None
) -> tuple[int, int]:
    """Measures an encoder on one blank frame.

    Args:
        vision_tower: The encoder.
        image_size: Height and width of its frames in pixels.
        feature_layer: Index into the encoder's hidden states; its last output if None.

    Returns:
        Channels of the features, and pixels between two patches.

    Raises:
        StormError: The encoder's patches are not square, or it names no patch size and returns no feature map.
    """
    pixel_values = torch.zeros(1, 3, *image_size, dtype=vision_tower.dtype, device=vision_tower.device)
    patch_size = getattr(vision_tower.config, "patch_size", None)
    if isinstance(patch_size, list | tuple):
        if len(set(patch_size)) != 1:
            raise StormError(f"patch_size {tuple(patch_size)}: patches must be square")
        patch_size = patch_size[0]
    with torch.no_grad():
        features = _run_tower(vision_tower, pixel_values, patch_size, feature_layer)
    if features.ndim == 4:
        return features.shape[1], _measured_patch_size(features, image_size)
    if patch_size is None:
        # Towers without a patch size in their config, such as timm's: a square frame gives a square grid.
        side = int(features.shape[1] ** 0.5)
        patch_size = image_size[0] // side
    _to_grid(features, image_size, patch_size, _most_prefix_tokens(vision_tower))
    return features.shape[-1], patch_size


def _measured_patch_size(feature_map: torch.Tensor, image_size: tuple[int, int]) -> int:
    patch_size = round(image_size[0] / feature_map.shape[2])
    _to_grid(feature_map, image_size, patch_size, most_prefix_tokens=0)
    return patch_size


def _encode(
    vision_tower: PreTrainedModel, pixel_values: torch.Tensor, patch_size: int, feature_layer: int | None
) -> torch.Tensor:
    features = _run_tower(vision_tower, pixel_values, patch_size, feature_layer)
    image_size = (pixel_values.shape[2], pixel_values.shape[3])
    return _to_grid(features, image_size, patch_size, _most_prefix_tokens(vision_tower))


def _run_tower(
    vision_tower: PreTrainedModel,
    pixel_values: torch.Tensor,
    patch_size: int | None,
    feature_layer: int | None,
) -> torch.Tensor:
    """Returns the encoder's patch tokens ``(f, n, c)`` or feature map ``(f, c, h, w)``."""
    parameters = inspect.signature(vision_tower.forward).parameters
    inputs = {"pixel_values": pixel_values}
    if "spatial_shapes" in parameters and patch_size is not None:
        inputs = _patchified_inputs(pixel_values, patch_size)
    options: dict[str, bool] = {}
    if "interpolate_pos_encoding" in parameters:
        native_size = getattr(vision_tower.config, "image_size", None)
        options["interpolate_pos_encoding"] = tuple(pixel_values.shape[2:]) != _as_pair(native_size)
    if feature_layer is not None:
        hidden_states = vision_tower(**inputs, **options, output_hidden_states=True).hidden_states
        if not -len(hidden_states) <= feature_layer < len(hidden_states):
            raise StormError(
                f"vision_feature_layer={feature_layer}: the vision encoder has {len(hidden_states)} hidden states"
            )
        return hidden_states[feature_layer]
    return vision_tower(**inputs, **options).last_hidden_state


def _patchified_inputs(pixel_values: torch.Tensor, patch_size: int) -> dict[str, torch.Tensor]:
    """Returns what SigLIP2's variable-resolution encoder takes: flattened patches, their mask and grid."""
    height, width = (size - size % patch_size for size in pixel_values.shape[2:])
    pixel_values = pixel_values[..., :height, :width]
    patches = rearrange(pixel_values, "f c (h a) (w b) -> f (h w) (a b c)", a=patch_size, b=patch_size)
    grid = torch.tensor([height // patch_size, width // patch_size])
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
        "spatial_shapes": grid.expand(patches.shape[0], 2).to(patches.device),
    }


def _to_grid(
    features: torch.Tensor, image_size: tuple[int, int], patch_size: int, most_prefix_tokens: int
) -> torch.Tensor:
    """Lays features out as ``(f, h, w, c)``; class and register tokens, which stand in front, are dropped."""
    height, width = image_size
    h, w = height // patch_size, width // patch_size
    if features.ndim == 4 and features.shape[2:] == (h, w):
        return rearrange(features, "f c h w -> f h w c")
    if features.ndim == 3:
        num_prefix_tokens = features.shape[1] - h * w
        if 0 <= num_prefix_tokens <= most_prefix_tokens:
            return features[:, num_prefix_tokens:].unflatten(1, (h, w))
    raise StormError(
        f"the vision encoder returned {tuple(features.shape)} for {height}x{width} pixels, which is no grid of "
        f"{h}x{w} patches of {patch_size} pixels: choose a frame size that the patch size divides"
    )


def _most_prefix_tokens(vision_tower: PreTrainedModel) -> int:
    """Returns how many class and register tokens may stand in front of an encoder's patches."""
    timm_model = getattr(vision_tower, "timm_model", None)
    if timm_model is not None:
        return getattr(timm_model, "num_prefix_tokens", 0)
    return 1 + (getattr(vision_tower.config, "num_register_tokens", None) or 0)


def _as_pair(size: int | list[int] | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])
