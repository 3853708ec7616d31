"""Composes a STORM model from any vision encoder and any causal language model."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# The name that transformers exports is a stand-in without torchvision; the class itself needs none.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from storm_vlm.errors import ModelError
from storm_vlm.model.chat_template import multimodal_chat_template
from storm_vlm.model.configuration_storm import StormConfig, TemporalProjectorConfig
from storm_vlm.model.gguf import load_gguf_language_model
from storm_vlm.model.image_processing_storm import StormImageProcessor
from storm_vlm.model.modeling_storm import StormForConditionalGeneration
from storm_vlm.model.processing_storm import FrameSeparator, StormProcessor
from storm_vlm.model.temporal_projector import TemporalProjector
from storm_vlm.model.token_compression import visual_grid
from storm_vlm.model.video_processing_storm import StormVideoProcessor
from storm_vlm.model.vision_features import probe_vision_tower
from storm_vlm.storage import atomic_directory

logger = logging.getLogger(__name__)

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
# Length and tolerance of the check that the composed model computes what its language model computes.
_PROBE_TOKENS = 16
_PROBE_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class VisionTower:
    """A vision encoder and how its pictures are prepared.

    Attributes:
        model: Encoder that returns patch tokens or a feature map.
        image_size: Height and width of its frames in pixels.
        image_mean: Mean of each colour channel after rescaling to 0..1.
        image_std: Standard deviation of each colour channel after rescaling.
    """

    model: PreTrainedModel
    image_size: tuple[int, int]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ComposeOptions:
    """What can be chosen when a model is composed.

    Attributes:
        projector: Fields of `TemporalProjectorConfig` that differ from its defaults.
        temporal_pool: Default token compression; see `TokenCompression`.
        spatial_pool: Default token compression.
        temporal_sample: Default token compression.
        num_frames: Frames sampled from a video unless a call says otherwise.
        frame_separator: What tells frame groups apart in the text.
        vision_feature_layer: Hidden state of the encoder to use; its last output if None.
        seed: Seed of the projector's random weights.
    """

    projector: dict[str, Any] = field(default_factory=dict)
    temporal_pool: int = 1
    spatial_pool: int = 1
    temporal_sample: int = 1
    num_frames: int = 32
    frame_separator: FrameSeparator = "timestamp"
    vision_feature_layer: int | None = None
    seed: int = 0


def compose(
    vision: str | Path,
    llm: str | Path,
    out: str | Path,
    *,
    options: ComposeOptions | None = None,
    image_size: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Composes a model from a vision encoder and a language model, and saves it.

    Args:
        vision: Hub id or folder of a vision encoder, or of a model that contains one (CLIP, SigLIP).
        llm: Hub id or folder of a causal language model, or a GGUF file.
        out: Folder to write; it appears only when it is complete.
        options: Choices for the projector, the compression and the frames.
        image_size: Height and width of the frames in pixels; the encoder's own if None.
        overwrite: Replace ``out`` if it exists.

    Returns:
        The folder, which `AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained` load.

    Raises:
        ModelError: A part cannot be loaded or does not fit, or ``out`` exists.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise ModelError(f"{out} already exists: choose another output folder or allow overwriting")
    tower = load_vision_tower(vision, image_size=image_size)
    language_model, tokenizer = load_language_model(llm)
    try:
        model, processor = compose_model(tower, language_model, tokenizer, options or ComposeOptions())
    except ValueError as error:
        raise ModelError(f"{vision} and {llm}: {_first_line(error)}") from error
    save_model(model, processor, out, overwrite=overwrite)
    return out


def compose_model(
    tower: VisionTower,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: ComposeOptions,
) -> tuple[StormForConditionalGeneration, StormProcessor]:
    """Joins loaded parts by a new temporal projector; the parts are used, not copied.

    Args:
        tower: Vision encoder.
        language_model: Causal language model with its head.
        tokenizer: Its tokenizer; the placeholders are added to it.
        options: Choices for the projector, the compression and the frames.

    Returns:
        The model in evaluation mode and its processor.

    Raises:
        ModelError: The language model does more after its last layer than STORM's head does, or an option of the
            projector is unknown.
    """
    unknown = options.projector.keys() - TemporalProjectorConfig.__annotations__.keys()
    if unknown:
        raise ModelError(f"unknown options of the projector: {', '.join(sorted(unknown))}")
    _add_placeholders(language_model, tokenizer)
    probe_ids, probe_logits = _probe(language_model, tokenizer)
    channels, patch_size = probe_vision_tower(tower.model, tower.image_size, options.vision_feature_layer)
    config = _model_config(tower, language_model, tokenizer, options, channels, patch_size)
    rows, columns = (size // patch_size for size in tower.image_size)
    # A spatial_pool that does not fit is an error here and not at the first video.
    visual_grid((1, rows, columns), config.projector_config.downsample, config.compression)
    model = _assemble(config, tower.model, language_model, options.seed)
    processor = _processor(tower, tokenizer, config, options)
    with torch.no_grad():
        difference = (model(input_ids=probe_ids).logits.float() - probe_logits.float()).abs().max().item()
    if not difference <= _PROBE_TOLERANCE * probe_logits.float().abs().max().item():
        raise ModelError(
            f"{type(language_model).__name__} cannot be composed: its head is not a plain linear layer (text scores "
            f"differ by {difference:.3g})"
        )
    return model, processor


def save_model(
    model: StormForConditionalGeneration, processor: StormProcessor, out: Path, *, overwrite: bool = False
) -> None:
    """Saves model and processor as safetensors and JSON; the folder appears only when it is complete."""
    with atomic_directory(out, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def load_vision_tower(source: str | Path, *, image_size: tuple[int, int] | None = None) -> VisionTower:
    """Loads a vision encoder; of a model with text and vision parts, the vision part.

    Args:
        source: Hub id or folder.
        image_size: Height and width of the frames in pixels; the encoder's own if None.

    Returns:
        The encoder in evaluation mode and its preprocessing.

    Raises:
        ModelError: There is no such model, or its preprocessing is unknown.
    """
    try:
        config = AutoConfig.from_pretrained(source)
        # CLIP and SigLIP checkpoints hold an encoder for text too; composite configs nest the one for pictures.
        vision_config = getattr(config, "vision_config", None) or config
        model = AutoModel.from_pretrained(source, config=vision_config)
        preprocessing = _preprocessing(source, vision_config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"vision encoder {source}: {_first_line(error)}") from error
    size = image_size or _native_size(vision_config, preprocessing)
    if size is None:
        raise ModelError(f"vision encoder {source}: its frame size is not known; give image_size")
    return VisionTower(
        model.eval(), size, tuple(preprocessing["image_mean"]), tuple(preprocessing["image_std"])
    )


def load_language_model(source: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model and its tokenizer.

    Args:
        source: Hub id, folder or GGUF file.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        ModelError: There is no such model.
    """
    if str(source).endswith(".gguf"):
        return load_gguf_language_model(Path(source))
    try:
        model = AutoModelForCausalLM.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"language model {source}: {_first_line(error)}") from error
    return model.eval(), tokenizer


def _add_placeholders(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds the placeholders to the vocabulary, and embedding rows where there are none to spare."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]}, False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > language_model.get_input_embeddings().weight.shape[0]:
        # The same rows each time: an adapter trained on one composition is put onto another.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def _model_config(
    tower: VisionTower,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: ComposeOptions,
    channels: int,
    patch_size: int,
) -> StormConfig:
    head = language_model.get_output_embeddings()
    text_config = language_model.config.get_text_config()
    return StormConfig(
        vision_config=tower.model.config,
        text_config=text_config,
        projector_config=options.projector,
        vision_feature_layer=options.vision_feature_layer,
        vision_hidden_size=channels,
        vision_patch_size=patch_size,
        temporal_pool=options.temporal_pool,
        spatial_pool=options.spatial_pool,
        temporal_sample=options.temporal_sample,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        lm_head_bias=head.bias is not None,
        dtype=language_model.dtype,
    )


def _assemble(
    config: StormConfig, vision_tower: PreTrainedModel, language_model: PreTrainedModel, seed: int
) -> StormForConditionalGeneration:
    """Puts loaded parts into an empty model, so that no weights are made only to be replaced."""
    dtype = language_model.dtype
    with torch.device("meta"):
        model = StormForConditionalGeneration(config)
    model.model.vision_tower = vision_tower.to(dtype)
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.model.temporal_projector = new_temporal_projector(config.projector_config, model, seed).to(dtype)
    model.tie_weights()
    model.generation_config = language_model.generation_config
    # Placeholders are read and never written.
    suppressed = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = [*suppressed, config.image_token_id, config.video_token_id]
    return model.eval()


def new_temporal_projector(
    config: TemporalProjectorConfig, model: StormForConditionalGeneration, seed: int
) -> TemporalProjector:
    """Returns a projector with random weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        projector = TemporalProjector(config)

        def initialise(module: nn.Module) -> None:
            model._init_weights(module)

        projector.apply(initialise)
    return projector


def _processor(
    tower: VisionTower, tokenizer: PreTrainedTokenizerBase, config: StormConfig, options: ComposeOptions
) -> StormProcessor:
    pictures: dict[str, Any] = {
        "size": {"height": tower.image_size[0], "width": tower.image_size[1]},
        "image_mean": list(tower.image_mean),
        "image_std": list(tower.image_std),
        "patch_size": config.vision_patch_size,
        "downsample": config.projector_config.downsample,
        "spatial_pool": options.spatial_pool,
    }
    return StormProcessor(
        image_processor=StormImageProcessor(**pictures),
        tokenizer=tokenizer,
        video_processor=StormVideoProcessor(
            **pictures,
            num_frames=options.num_frames,
            temporal_pool=options.temporal_pool,
            temporal_sample=options.temporal_sample,
        ),
        chat_template=multimodal_chat_template(tokenizer),
        image_token=IMAGE_TOKEN,
        video_token=VIDEO_TOKEN,
        frame_separator=options.frame_separator,
    )


def _probe(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids of some tokens, none of them a placeholder, and the language model's own scores for them."""
    text_ids = torch.arange(language_model.get_input_embeddings().weight.shape[0])
    for token in (IMAGE_TOKEN, VIDEO_TOKEN):
        text_ids = text_ids[text_ids != tokenizer.convert_tokens_to_ids(token)]
    chosen = torch.randint(len(text_ids), (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    ids = text_ids[chosen].to(language_model.device)
    with torch.no_grad():
        return ids, language_model(input_ids=ids).logits


def _preprocessing(source: str | Path, vision_config: PreTrainedConfig) -> dict[str, Any]:
    """Returns mean, standard deviation and size from the encoder's image processor, or timm's data config."""
    if pretrained := getattr(vision_config, "pretrained_cfg", None):
        return {
            "image_mean": pretrained["mean"],
            "image_std": pretrained["std"],
            "size": {"height": pretrained["input_size"][1], "width": pretrained["input_size"][2]},
        }
    processor = AutoImageProcessor.from_pretrained(source)
    size = getattr(processor, "crop_size", None) or processor.size
    return {"image_mean": processor.image_mean, "image_std": processor.image_std, "size": dict(size)}


def _native_size(vision_config: PreTrainedConfig, preprocessing: dict[str, Any]) -> tuple[int, int] | None:
    size = preprocessing["size"]
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    native = getattr(vision_config, "image_size", None)
    if isinstance(native, int):
        return native, native
    return tuple(native) if native else None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
