"""Configuration of a STORM model: vision encoder, temporal projector, token compression and language model."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from storm_vlm.model.token_compression import TokenCompression

# The paper's main model: PaliGemma's SigLIP at 448 pixels and Qwen2-7B.
_DEFAULT_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "vision_use_head": False,
}
_DEFAULT_TEXT: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


@strict
class TemporalProjectorConfig(PreTrainedConfig):
    """Configuration of `TemporalProjector`.

    Attributes:
        input_size: Channels of the vision encoder's features; `StormConfig` fills it in.
        output_size: Width of the language model; `StormConfig` fills it in.
        hidden_size: Width of the Mamba layers; ``output_size`` if None.
        projector_type: ``linear`` (STORM) or ``mlp`` (the paper's VILA baseline).
        downsample: Patches merged into one token by pixel shuffle, a perfect square.
        num_mamba_layers: Residual Mamba layers; 0 for none.
        bidirectional: Scan both ways; False for streaming.
        vocabulary_readout: Each compressed token chooses from the language model's input embeddings; see
            `vocabulary_readout`.
        zero_init_residual: Begin as if there were no Mamba layers.
        d_state: State size of each channel.
        d_conv: Width of the causal convolution.
        expand: Inner width as a multiple of ``hidden_size``.
        dt_rank: Rank of the time-step projection; ``ceil(hidden_size / 16)`` if None.
        norm_eps: Epsilon of the layer norms.
        initializer_range: Standard deviation of new linear weights.
        is_trained: Whether the projector has been trained; a report warns when it has not.
    """

    model_type = "storm_temporal_projector"
    base_config_key = "projector_config"

    input_size: int | None = None
    output_size: int | None = None
    hidden_size: int | None = None
    projector_type: Literal["linear", "mlp"] = "linear"
    downsample: int = 4
    num_mamba_layers: int = 1
    bidirectional: bool = True
    vocabulary_readout: bool = False
    zero_init_residual: bool = False
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    is_trained: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fills in what follows from other fields and checks the ranges."""
        if self.hidden_size is None:
            self.hidden_size = self.output_size
        for name, lowest in (
            ("downsample", 1),
            ("num_mamba_layers", 0),
            ("d_state", 1),
            ("d_conv", 2),
            ("expand", 1),
        ):
            if getattr(self, name) < lowest:
                raise ValueError(
                    f"projector_config.{name} must be at least {lowest}, got {getattr(self, name)}"
                )
        if math.isqrt(self.downsample) ** 2 != self.downsample:
            raise ValueError(
                f"projector_config.downsample must be a perfect square (1, 4, 9, ...), got {self.downsample}"
            )
        super().__post_init__(**kwargs)

    def sizes(self) -> tuple[int, int, int]:
        """Returns the sizes that the projector is built with.

        Returns:
            Input, hidden and output size.

        Raises:
            ValueError: One of them is not set.
        """
        if self.input_size is None or self.hidden_size is None or self.output_size is None:
            raise ValueError(
                "projector_config: input_size and output_size must be set to build the projector"
            )
        return self.input_size, self.hidden_size, self.output_size


@strict
class StormConfig(PreTrainedConfig):
    """Configuration of `StormForConditionalGeneration`.

    Attributes:
        vision_config: Config of any vision encoder that returns patch tokens or a feature map.
        text_config: Config of any causal language model.
        projector_config: Config of the temporal projector.
        vision_feature_layer: Hidden state of the encoder to use, such as -2; its last output if None.
        vision_hidden_size: Channels of the encoder's features; ``vision_config.hidden_size`` if None.
        vision_patch_size: Pixels between two patches; ``vision_config.patch_size`` if None.
        temporal_pool: Default token compression; see `TokenCompression`.
        spatial_pool: Default token compression; see `TokenCompression`.
        temporal_sample: Default token compression; see `TokenCompression`.
        image_token_id: Token that stands for a visual token of an image.
        video_token_id: Token that stands for a visual token of a video.
        tie_word_embeddings: Whether the language model's head is its input embedding; taken from it if None.
        lm_head_bias: Whether the language model's head has a bias.
    """

    model_type = "storm"
    sub_configs = {
        "vision_config": AutoConfig,
        "text_config": AutoConfig,
        "projector_config": TemporalProjectorConfig,
    }

    # A dict, a config object or None; config objects after initialisation.
    vision_config: Any = None
    text_config: Any = None
    projector_config: Any = None
    vision_feature_layer: int | None = None
    vision_hidden_size: int | None = None
    vision_patch_size: int | None = None
    temporal_pool: int = 1
    spatial_pool: int = 1
    temporal_sample: int = 1
    image_token_id: int = 0
    video_token_id: int = 1
    tie_word_embeddings: bool | None = None
    lm_head_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Builds the nested configs, joins their sizes and checks the token compression."""
        self.vision_config = _nested_config(self.vision_config, _DEFAULT_VISION)
        self.text_config = _nested_config(self.text_config, _DEFAULT_TEXT)
        if self.vision_hidden_size is None:
            self.vision_hidden_size = _required(self.vision_config, "hidden_size", "vision_hidden_size")
        if self.vision_patch_size is None:
            self.vision_patch_size = _required(self.vision_config, "patch_size", "vision_patch_size")
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.projector_config = self._joined_projector_config()
        _ = self.compression  # a bad value is an error here and not at the first video
        super().__post_init__(**kwargs)

    @property
    def compression(self) -> TokenCompression:
        """The default token compression."""
        return TokenCompression(self.temporal_pool, self.spatial_pool, self.temporal_sample)

    def _joined_projector_config(self) -> TemporalProjectorConfig:
        """Returns the projector's config with the sizes of its neighbours filled in."""
        given = self.projector_config
        values = given.to_dict() if isinstance(given, PreTrainedConfig) else dict(given or {})
        values["input_size"] = self.vision_hidden_size
        values["output_size"] = self.text_config.hidden_size
        if values.get("hidden_size") is None:
            values["hidden_size"] = self.text_config.hidden_size
        return TemporalProjectorConfig(**values)


def _nested_config(
    given: dict[str, Any] | PreTrainedConfig | None, default: dict[str, Any]
) -> PreTrainedConfig:
    """Returns ``given`` as a config object; a dict names its class with ``model_type``."""
    if isinstance(given, PreTrainedConfig):
        return given
    values = dict(default if given is None else given)
    model_type = values.pop("model_type", default["model_type"])
    return CONFIG_MAPPING[model_type](**values)


def _required(vision_config: PreTrainedConfig, attribute: str, field: str) -> int:
    value = getattr(vision_config, attribute, None)
    if not isinstance(value, int):
        raise ValueError(
            f"{type(vision_config).__name__} has no integer {attribute}: set {field} in StormConfig "
            f"(storm_vlm.compose measures it)"
        )
    return value
