"""Converts a released video language model in VILA's layout to STORM: same outputs at the start."""

import logging
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from storm_vlm.errors import ModelError
from storm_vlm.model._vila_source import (
    VilaSource,
    load_language_model,
    load_projector,
    load_vision_tower,
    open_source,
)
from storm_vlm.model.chat_template import multimodal_chat_template
from storm_vlm.model.compose import IMAGE_TOKEN, VIDEO_TOKEN, ComposeOptions, compose_model, save_model

logger = logging.getLogger(__name__)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    num_mamba_layers: int = 0,
    bidirectional: bool = True,
    temporal_pool: int | None = None,
    spatial_pool: int | None = None,
    temporal_sample: int = 1,
    overwrite: bool = False,
) -> Path:
    """Converts an NVILA checkpoint: all its weights, and on request Mamba layers that begin as the identity.

    Given the same frames, the converted model computes what the source computes, up to rounding; token compression
    and training start from there. Images are read at one scale, also where the source cuts a single image into tiles.

    Args:
        source: Hub id or folder in VILA's layout: ``config.json``, ``llm``, ``vision_tower``, ``mm_projector``.
        out: Folder to write; it appears only when it is complete.
        num_mamba_layers: Mamba layers to add to the projector; the model is unchanged until they are trained.
        bidirectional: Whether the Mamba layers scan both ways; False for streaming.
        temporal_pool: Default token compression; what the source itself pools if None.
        spatial_pool: Default token compression; what the source itself pools if None.
        temporal_sample: Default token compression.
        overwrite: Replace ``out`` if it exists.

    Returns:
        The folder, which `AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained` load.

    Raises:
        ModelError: The source is missing, incomplete or of a kind that cannot be converted, or ``out`` exists.

    Source:
        NVILA (arXiv 2412.04468); STORM (arXiv 2503.04130), Figure 6, for the place of the Mamba layers.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise ModelError(f"{out} already exists: choose another output folder or allow overwriting")
    vila = open_source(source)
    tower = load_vision_tower(vila)
    language_model, tokenizer = load_language_model(vila)
    text_size = language_model.config.get_text_config().hidden_size
    projector_state = load_projector(vila, tower.model.config.hidden_size, text_size)
    options = ComposeOptions(
        projector={
            "projector_type": "mlp",
            "downsample": 4,
            "num_mamba_layers": num_mamba_layers,
            "bidirectional": bidirectional,
            "zero_init_residual": True,
            "is_trained": True,
        },
        temporal_pool=vila.temporal_pool if temporal_pool is None else temporal_pool,
        spatial_pool=vila.spatial_pool if spatial_pool is None else spatial_pool,
        temporal_sample=temporal_sample,
        num_frames=vila.num_frames,
        frame_separator=vila.frame_separator,
        vision_feature_layer=vila.feature_layer,
    )
    try:
        model, processor = compose_model(tower, language_model, tokenizer, options)
    except ValueError as error:
        raise ModelError(f"{source}: {error}") from error
    model.temporal_projector.input_projection.load_state_dict(projector_state)
    _check_newlines(vila, tokenizer)
    # In the source, text follows the newline of the last frame or of an image at once.
    after_image = vila.after_image.replace("\n", "\\n")
    processor.chat_template = multimodal_chat_template(
        tokenizer, image_token=IMAGE_TOKEN + after_image, video_token=VIDEO_TOKEN, after_visual=""
    )
    if vila.reads_image_tiles:
        logger.warning("%s cuts a single image into tiles; the converted model reads it at one scale", source)
    save_model(model, processor, out, overwrite=overwrite)
    return out


def _check_newlines(vila: VilaSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a newline between frames is written as the source writes it, which tokenizes it alone."""
    if vila.frame_separator != "newline":
        return
    placeholder, newline = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN), tokenizer("\n").input_ids
    written = tokenizer(f"{VIDEO_TOKEN}\n{VIDEO_TOKEN}\n", add_special_tokens=False).input_ids
    if written != [placeholder, *newline] * 2:
        raise ModelError(
            f"{vila.folder / 'llm'}: the tokenizer writes a newline as {newline} alone but two frames with newlines as "
            f"{written}: tokenizers that add a token to every text cannot be converted"
        )
