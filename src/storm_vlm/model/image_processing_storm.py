"""Image processor: pictures to normalised pixels, and how their tokens are to be compressed."""

from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from storm_vlm.errors import StormError
from storm_vlm.model.token_compression import Grid, TokenCompression


class StormImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict
    """Options of `StormImageProcessor` beside those of every image processor.

    Attributes:
        patch_size: Pixels between two patches of the vision encoder.
        downsample: Patches that the projector merges into one token.
        spatial_pool: Tokens of a picture that are averaged into one.
    """

    patch_size: int | None
    downsample: int | None
    spatial_pool: int | None


class StormImageProcessor(PilBackend):
    """Resizes and normalises pictures with Pillow; needs no torchvision."""

    valid_kwargs = StormImagesKwargs
    model_input_names = ["pixel_values", "image_compression"]

    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    size = {"height": 448, "width": 448}
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    patch_size = 14
    downsample = 4
    spatial_pool = 1

    def __init__(self, **kwargs: Unpack[StormImagesKwargs]) -> None:
        super().__init__(**kwargs)
        check_size(self.size, self.patch_size)

    def patch_grid(self, size: SizeDict | None = None) -> Grid:
        """Returns the vision encoder's grid for one picture: one frame, rows and columns."""
        return (1, *check_size(size or self.size, self.patch_size))

    def _preprocess(
        self, images: list[np.ndarray], return_tensors: str | None, spatial_pool: int, **kwargs: Any
    ) -> BatchFeature:
        if not all(np.isfinite(image).all() for image in images):
            raise StormError("an image has NaN or infinite pixels")
        features = super()._preprocess(images, return_tensors=None, **kwargs)
        patch_size = kwargs.get("patch_size") or self.patch_size
        for pixels in features["pixel_values"]:
            check_size({"height": pixels.shape[-2], "width": pixels.shape[-1]}, patch_size)
        compression = TokenCompression(spatial_pool=spatial_pool)
        row = [compression.temporal_pool, compression.spatial_pool, compression.temporal_sample]
        features["image_compression"] = torch.tensor([row] * len(images), dtype=torch.long)
        return BatchFeature(dict(features), tensor_type=return_tensors)


def check_size(size: SizeDict | dict[str, int], patch_size: int) -> tuple[int, int]:
    """Returns the rows and columns of patches of frames of this size.

    Args:
        size: ``height`` and ``width`` of the frames in pixels.
        patch_size: Pixels between two patches.

    Returns:
        Rows and columns of whole patches; pixels beyond them are not seen, as in SigLIP's 27 patches of 14 in 384.

    Raises:
        StormError: Height or width is missing or smaller than a patch.
    """
    height, width = size["height"], size["width"]
    if not height or not width:
        raise StormError(f"size must give height and width, got {dict(size)}")
    if height < patch_size or width < patch_size:
        raise StormError(f"size {height}x{width} is below the vision encoder's patch size {patch_size}")
    return height // patch_size, width // patch_size
