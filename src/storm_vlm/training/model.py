"""The model that a recipe trains: loaded or composed, with the recipe's view of videos."""

from storm_vlm.errors import RecipeError, StormError
from storm_vlm.model import (
    ComposeOptions,
    StormForConditionalGeneration,
    StormProcessor,
    compose_model,
    visual_grid,
)
from storm_vlm.model.adapter import apply_video_settings, keep_first_layers, load_projector
from storm_vlm.model.compose import load_language_model, load_vision_tower
from storm_vlm.model.default_model import compose_default_parts
from storm_vlm.pipeline.loading import load_model
from storm_vlm.training.recipe import ModelRecipe, Recipe


def make_model(recipe: Recipe) -> tuple[StormForConditionalGeneration, StormProcessor]:
    """Loads or composes the model of a recipe, in float32 on the CPU.

    Args:
        recipe: The recipe; its video settings go into the model's and the processor's config.

    Returns:
        The model and its processor.

    Raises:
        RecipeError: The video settings do not fit the model; parts that cannot be loaded are a ModelError.
    """
    model, processor = _source(recipe.model)
    if (folder := recipe.model.projector_from or recipe.model.adapter_from) is not None:
        load_projector(model, folder)
    if (attention := recipe.model.attn_implementation) is not None:
        model.set_attn_implementation({"text_config": attention, "vision_config": attention})
    video = recipe.video
    try:
        if recipe.model.num_llm_layers is not None:
            keep_first_layers(model, recipe.model.num_llm_layers)
    except StormError as error:
        raise RecipeError(f"model.num_llm_layers: {error}") from error
    try:
        apply_video_settings(
            model,
            processor,
            num_frames=video.num_frames,
            temporal_pool=video.temporal_pool,
            spatial_pool=video.spatial_pool,
            temporal_sample=video.temporal_sample,
        )
        pictures = processor.image_processor
        visual_grid(pictures.patch_grid(), pictures.downsample, model.config.compression)
    except StormError as error:
        raise RecipeError(f"video: {error}") from error
    if video.frame_separator is not None:
        processor.frame_separator = video.frame_separator
    # Saved with every checkpoint, and by then it is true.
    model.config.projector_config.is_trained |= recipe.learning_rates.temporal_projector is not None
    return model.float(), processor


def _source(recipe: ModelRecipe) -> tuple[StormForConditionalGeneration, StormProcessor]:
    if recipe.path is not None:
        return load_model(recipe.path, device="cpu", dtype="float32")
    options = ComposeOptions(projector=recipe.projector, seed=recipe.projector_seed)
    if recipe.vision is None or recipe.llm is None:
        return compose_default_parts(options)
    size = None if recipe.image_size is None else (recipe.image_size, recipe.image_size)
    tower = load_vision_tower(recipe.vision, image_size=size)
    model, tokenizer = load_language_model(recipe.llm)
    return compose_model(tower, model, tokenizer, options)
