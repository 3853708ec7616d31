"""The STORM model; importing this room registers it with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

# The names that transformers exports are stand-ins without torchvision; the classes themselves need none.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from storm_vlm.model.compose import ComposeOptions, VisionTower, compose, compose_model
from storm_vlm.model.configuration_storm import StormConfig, TemporalProjectorConfig
from storm_vlm.model.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
from storm_vlm.model.image_processing_storm import StormImageProcessor
from storm_vlm.model.mamba_mixer import MambaMixer, MambaState
from storm_vlm.model.modeling_storm import StormForConditionalGeneration, StormModel, StormPreTrainedModel
from storm_vlm.model.processing_storm import StormProcessor
from storm_vlm.model.temporal_projector import TemporalProjector
from storm_vlm.model.token_compression import FramePlan, TokenCompression, plan_frames, visual_grid
from storm_vlm.model.video_processing_storm import StormVideoProcessor

__all__ = [
    "ComposeOptions",
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "FramePlan",
    "MambaMixer",
    "MambaState",
    "StormConfig",
    "StormForConditionalGeneration",
    "StormImageProcessor",
    "StormModel",
    "StormPreTrainedModel",
    "StormProcessor",
    "StormVideoProcessor",
    "TemporalProjector",
    "TemporalProjectorConfig",
    "TokenCompression",
    "VisionTower",
    "compose",
    "compose_model",
    "plan_frames",
    "visual_grid",
]


def _register() -> None:
    """Makes the Auto classes know STORM and the demo's vision encoder."""
    AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
    AutoConfig.register("storm", StormConfig, exist_ok=True)
    AutoModel.register(StormConfig, StormModel, exist_ok=True)
    AutoModelForImageTextToText.register(StormConfig, StormForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(StormConfig, StormForConditionalGeneration, exist_ok=True)
    # Neither processor needs torchvision: the same class serves with and without it.
    image_processors = {"pil": StormImageProcessor, "torchvision": StormImageProcessor}
    AutoImageProcessor.register(StormConfig, image_processor_classes=image_processors, exist_ok=True)
    AutoVideoProcessor.register(StormConfig, StormVideoProcessor, exist_ok=True)
    AutoProcessor.register(StormConfig, StormProcessor, exist_ok=True)


_register()
