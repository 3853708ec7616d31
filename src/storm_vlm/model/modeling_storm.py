"""The STORM model: vision encoder, temporal projector, token compression and language model as one.

Shapes: ``b`` samples, ``l`` text and placeholder tokens, ``f`` frames of all videos together, ``d`` the language
model's width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils.generic import can_return_tuple

from storm_vlm.model.cache_name import CACHE_NAME, accepts_both_cache_names
from storm_vlm.model.configuration_storm import StormConfig
from storm_vlm.model.mamba_mixer import MambaMixer
from storm_vlm.model.temporal_projector import TemporalProjector
from storm_vlm.model.token_compression import TokenCompression
from storm_vlm.model.vision_features import extract_features
from storm_vlm.model.vocabulary_readout import vocabulary_readout

# Inputs that describe pictures: they matter while the prompt is read and never again.
_VISUAL_INPUTS = (
    "pixel_values",
    "image_compression",
    "pixel_values_videos",
    "video_grid_thw",
    "video_compression",
    "image_patch_features",
    "video_patch_features",
    "image_features",
    "video_features",
)
# Label of a token that no loss is taken of, as PyTorch's cross entropy has it.
IGNORED_LABEL = -100
# Visual tokens that go through a Mamba layer at once in inference: memory does not grow with the video.
MIXER_CHUNK_TOKENS = 16384
_PADDING_MASK_DIMS = 2


@dataclass
class StormModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `StormModel`: that of the language model and the visual tokens it was given.

    Attributes:
        image_hidden_states: Compressed tokens of all images, ``(num_tokens, d)``; None without images.
        video_hidden_states: Compressed tokens of all videos, ``(num_tokens, d)``; None without videos.
    """

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


@dataclass
class StormCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `StormForConditionalGeneration`: that of any language model and the visual tokens it was given.

    Attributes:
        image_hidden_states: Compressed tokens of all images, ``(num_tokens, d)``; None without images.
        video_hidden_states: Compressed tokens of all videos, ``(num_tokens, d)``; None without videos.
    """

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


class StormPreTrainedModel(PreTrainedModel):
    """What the STORM models share: config class, weight initialisation and what they support."""

    config_class = StormConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["TemporalLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=self.config.projector_config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            # PyTorch's own, which Mamba keeps; weights that a checkpoint lacks come without.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, MambaMixer):
            module.reset_parameters()
            # Here and not at the projector: transformers passes over modules that own no parameters.
            if self.config.projector_config.zero_init_residual:
                init.zeros_(module.out_proj.weight)


class StormModel(StormPreTrainedModel):
    """Vision encoder, temporal projector and language model without its head.

    Args:
        config: The model's configuration.

    Source:
        STORM (arXiv 2503.04130), Figure 2.
    """

    def __init__(self, config: StormConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.temporal_projector = TemporalProjector(config.projector_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Returns the language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_compression: torch.Tensor | None = None,
        *,
        image_patch_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encodes images: each is a video of one frame.

        Args:
            pixel_values: Normalised pixels, ``(num_images, 3, height, width)``.
            image_compression: Compression of each image, ``(num_images, 3)``; the config's if None.
            image_patch_features: What `encode_patches` made of the pixels, in their place, ``(num_images, h, w, c)``.
            **kwargs: Ignored.

        Returns:
            Output whose ``pooler_output`` holds the visual tokens of each image, ``(num_tokens, d)``. Both pixels and
            patch features, or neither, are a ValueError.
        """
        features = self._patch_features(
            "pixel_values", pixel_values, "image_patch_features", image_patch_features
        )
        return self._project(features, [1] * features.shape[0], image_compression)

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor | None,
        video_grid_thw: torch.Tensor,
        video_compression: torch.Tensor | None = None,
        *,
        video_patch_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encodes videos and compresses their tokens.

        Args:
            pixel_values_videos: Normalised frames of all videos, one video after the other, ``(f, 3, height, width)``.
            video_grid_thw: Frames, rows and columns of patches of each video, ``(num_videos, 3)``.
            video_compression: ``temporal_pool, spatial_pool, temporal_sample`` of each video, ``(num_videos, 3)``;
                the config's if None.
            video_patch_features: What `encode_patches` made of the pixels, in their place, ``(f, h, w, c)``.
            **kwargs: Ignored.

        Returns:
            Output whose ``pooler_output`` holds the visual tokens of each video, ``(num_tokens, d)``.

        Raises:
            ValueError: The grids announce another number of frames than there is, or not exactly one of pixels and
                patch features is given.
        """
        num_frames = video_grid_thw[:, 0].tolist()
        given = pixel_values_videos if video_patch_features is None else video_patch_features
        if given is not None and sum(num_frames) != given.shape[0]:
            name = "pixel_values_videos" if video_patch_features is None else "video_patch_features"
            raise ValueError(
                f"video_grid_thw announces {sum(num_frames)} frames, {name} holds {given.shape[0]}"
            )
        features = self._patch_features(
            "pixel_values_videos", pixel_values_videos, "video_patch_features", video_patch_features
        )
        return self._project(features, num_frames, video_compression)

    def encode_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Runs the vision encoder alone: what training caches where the encoder is frozen.

        Args:
            pixel_values: Normalised pixels of images or frames, ``(f, 3, height, width)``.

        Returns:
            Patch features, ``(f, h, w, c)``.
        """
        return extract_features(
            self.vision_tower,
            pixel_values,
            patch_size=self.config.vision_patch_size,
            feature_layer=self.config.vision_feature_layer,
        )

    def compress(self, tokens: torch.Tensor, compression: TokenCompression) -> torch.Tensor:
        """Compresses the tokens of one video; temporal sampling is left out in training.

        With ``projector_config.vocabulary_readout`` what is left is read out: see `vocabulary_readout`.

        Args:
            tokens: Enriched tokens, ``(t, h, w, d)``.
            compression: Token compression to apply.

        Returns:
            Compressed tokens, ``(t', h', w', d)``.
        """
        compressed = (compression.without_sampling() if self.training else compression)(tokens)
        if self.config.projector_config.vocabulary_readout:
            return vocabulary_readout(compressed, self.get_input_embeddings().weight)
        return compressed

    @can_return_tuple
    @accepts_both_cache_names
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        image_compression: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        video_compression: torch.Tensor | None = None,
        image_patch_features: torch.Tensor | None = None,
        video_patch_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> StormModelOutputWithPast:
        """Puts the visual tokens where their placeholders are and runs the language model.

        Args:
            input_ids: Token ids with one placeholder for each visual token, ``(b, l)``.
            pixel_values: See `get_image_features`.
            pixel_values_videos: See `get_video_features`.
            attention_mask: 1 for tokens to attend to, ``(b, l)``; padding may be left or right. Or bool
                ``(b, 1, l, l)``: which tokens attend to which, in every layer, with ``position_ids``.
            position_ids: Positions of the tokens, ``(b, l)``.
            cache: Keys and values of the tokens before; ``past_key_values`` is the same.
            inputs_embeds: Embeddings in place of ``input_ids``, ``(b, l, d)``.
            use_cache: Return the cache.
            image_compression: See `get_image_features`.
            video_grid_thw: See `get_video_features`.
            video_compression: See `get_video_features`.
            image_patch_features: See `get_image_features`.
            video_patch_features: See `get_video_features`.
            image_features: Visual tokens in place of ``pixel_values``, ``(num_tokens, d)``.
            video_features: Visual tokens in place of ``pixel_values_videos``, ``(num_tokens, d)``.
            **kwargs: Passed on to the language model.

        Returns:
            The language model's output and the visual tokens.

        Raises:
            ValueError: Not exactly one of ``input_ids`` and ``inputs_embeds`` is given, or the placeholders and the
                visual tokens differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        image_features, video_features = self._visual_tokens(
            pixel_values, image_compression, image_patch_features, image_features,
            pixel_values_videos, video_grid_thw, video_compression, video_patch_features, video_features,
        )  # fmt: skip
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if image_features is None and video_features is None and self._trains_on_pictures():
            inputs_embeds = inputs_embeds + 0 * self._blank_tokens().sum()
        is_prompt = _is_prompt(input_ids, cache)
        for modality, features in (("image", image_features), ("video", video_features)):
            if features is not None or is_prompt:
                inputs_embeds = self._fill_placeholders(modality, input_ids, inputs_embeds, features)
        outputs = self.language_model(
            attention_mask=self._attention_mask(attention_mask, inputs_embeds),
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        return StormModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            video_hidden_states=video_features,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _visual_tokens(
        self,
        pixel_values: torch.Tensor | None,
        image_compression: torch.Tensor | None,
        image_patch_features: torch.Tensor | None,
        image_features: torch.Tensor | None,
        pixel_values_videos: torch.Tensor | None,
        video_grid_thw: torch.Tensor | None,
        video_compression: torch.Tensor | None,
        video_patch_features: torch.Tensor | None,
        video_features: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns the visual tokens of images and videos, encoding what was not given as features."""
        if pixel_values is not None or image_patch_features is not None:
            if image_features is not None:
                raise ValueError("image_features and pixel_values or patch features must not both be given")
            output = self.get_image_features(
                pixel_values, image_compression, image_patch_features=image_patch_features
            )
            image_features = torch.cat(output.pooler_output)
        if pixel_values_videos is not None or video_patch_features is not None:
            if video_features is not None:
                raise ValueError(
                    "video_features and pixel_values_videos or patch features must not both be given"
                )
            if video_grid_thw is None:
                raise ValueError("a video needs video_grid_thw, the frames and patches of each video")
            output = self.get_video_features(
                pixel_values_videos,
                video_grid_thw,
                video_compression,
                video_patch_features=video_patch_features,
            )
            video_features = torch.cat(output.pooler_output)
        return image_features, video_features

    def _trains_on_pictures(self) -> bool:
        if not (self.training and torch.is_grad_enabled()):
            return False
        parts = (self.temporal_projector, self.vision_tower)
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

    def _blank_tokens(self) -> torch.Tensor:
        """Encodes a blank picture: in training a text alone takes part in every layer too.

        Otherwise a batch of texts has nothing to learn where the language model is frozen, and processes that share the
        layers of the model wait for each other.
        """
        native = getattr(self.config.vision_config, "image_size", None) or 8 * self.config.vision_patch_size
        size = (native, native) if isinstance(native, int) else tuple(native)
        return self.get_image_features(torch.zeros(1, 3, *size)).pooler_output[0]

    def _patch_features(
        self, pixels_name: str, pixels: torch.Tensor | None, features_name: str, features: torch.Tensor | None
    ) -> torch.Tensor:
        if pixels is not None and features is None:
            return self.encode_patches(pixels)
        if features is not None and pixels is None:
            return features
        raise ValueError(f"exactly one of {pixels_name} and {features_name} must be given")

    def _project(
        self, features: torch.Tensor, num_frames: list[int], compressions: torch.Tensor | None
    ) -> BaseModelOutputWithPooling:
        device = self.temporal_projector_device
        # Weights that are offloaded have no device of their own: their hooks bring them to the features.
        videos = features.to(features.device if device.type == "meta" else device).split(num_frames)
        chunk_size = None if torch.is_grad_enabled() else MIXER_CHUNK_TOKENS
        tokens = self.temporal_projector(videos, chunk_size=chunk_size)
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=tuple(
                self.compress(video, compression).flatten(0, 2)
                for video, compression in zip(
                    tokens, self._compressions(compressions, len(videos)), strict=True
                )
            ),
        )

    @property
    def temporal_projector_device(self) -> torch.device:
        """Device of the temporal projector, which may differ from the encoder's under a device map."""
        return next(self.temporal_projector.parameters()).device

    def _compressions(self, given: torch.Tensor | None, num_videos: int) -> list[TokenCompression]:
        if given is None:
            return [self.config.compression] * num_videos
        if given.shape != (num_videos, 3):
            raise ValueError(f"compression must have shape {(num_videos, 3)}, got {tuple(given.shape)}")
        return [TokenCompression(*row) for row in given.tolist()]

    def _attention_mask(self, mask: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor | None:
        """Returns the mask as the language model's attention takes it: eager attention adds masks of pairs to scores."""
        is_pairs = isinstance(mask, torch.Tensor) and mask.ndim != _PADDING_MASK_DIMS
        if mask is None or not is_pairs or mask.dtype != torch.bool:
            return mask
        attention = self.language_model.config._attn_implementation
        if attention == "sdpa":
            return mask
        if attention != "eager":
            raise ValueError(
                f"attention_mask of pairs of tokens needs sdpa or eager attention, not {attention}"
            )
        device = inputs_embeds.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs_embeds.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def _fill_placeholders(
        self,
        modality: str,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor | None,
    ) -> torch.Tensor:
        """Replaces the embeddings of the placeholders of ``modality`` by visual tokens; None has no tokens."""
        mask = self._placeholder_mask(modality, input_ids, inputs_embeds)
        num_placeholders, num_features = int(mask.sum()), 0 if features is None else features.shape[0]
        if num_placeholders != num_features:
            hint = ""
            if self.training and features is not None:
                hint = " (temporal_sample applies in evaluation only: process training samples with temporal_sample=1)"
            raise ValueError(
                f"{num_placeholders} {modality} placeholders in the text but {num_features} {modality} "
                f"tokens from the temporal projector{hint}"
            )
        if features is None:
            return inputs_embeds
        features = features.to(device=inputs_embeds.device, dtype=inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), features)

    def _placeholder_mask(
        self, modality: str, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        token_id = self.config.image_token_id if modality == "image" else self.config.video_token_id
        if input_ids is not None:
            return (input_ids == token_id).to(inputs_embeds.device)
        placeholder = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(dim=-1)


class StormForConditionalGeneration(StormPreTrainedModel, GenerationMixin):
    """STORM with a language-model head: answers in text about videos, images and text.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: StormConfig) -> None:
        super().__init__(config)
        self.model = StormModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        self._tied_weights_keys = {"lm_head.weight": f"model.{_input_embedding_name(self.model)}"}
        self.post_init()

    @property
    def language_model(self) -> PreTrainedModel:
        """The language model without its head."""
        return self.model.language_model

    @property
    def vision_tower(self) -> PreTrainedModel:
        """The vision encoder."""
        return self.model.vision_tower

    @property
    def temporal_projector(self) -> TemporalProjector:
        """The temporal projector."""
        return self.model.temporal_projector

    def get_input_embeddings(self) -> nn.Embedding:
        """Returns the language model's token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the language model's head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the language model's head."""
        self.lm_head = new_embeddings  # type: ignore[assignment]  # whatever the language model uses

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_compression: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """See `StormModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_compression, **kwargs)

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor | None,
        video_grid_thw: torch.Tensor,
        video_compression: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """See `StormModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, video_compression, **kwargs)

    @can_return_tuple
    @accepts_both_cache_names
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        image_compression: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        video_compression: torch.Tensor | None = None,
        image_patch_features: torch.Tensor | None = None,
        video_patch_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> StormCausalLMOutputWithPast:
        """Computes the next-token scores and, with labels, the loss.

        Args:
            input_ids: See `StormModel.forward`, as all arguments that are not described here.
            pixel_values: See `StormModel.forward`.
            pixel_values_videos: See `StormModel.forward`.
            attention_mask: See `StormModel.forward`.
            position_ids: See `StormModel.forward`.
            cache: See `StormModel.forward`.
            inputs_embeds: See `StormModel.forward`.
            labels: Token ids to predict, ``(b, l)``; -100 where no loss is taken.
            use_cache: See `StormModel.forward`.
            logits_to_keep: Compute scores for this many last positions, or for these positions; 0 for all.
            skip_logits: With ``labels``: compute scores only where there is one, and return none. Most tokens of a
                sample are pictures and questions, and scores are the widest tensor of a training step.
            image_compression: See `StormModel.forward`.
            video_grid_thw: See `StormModel.forward`.
            video_compression: See `StormModel.forward`.
            image_patch_features: See `StormModel.forward`.
            video_patch_features: See `StormModel.forward`.
            image_features: See `StormModel.forward`.
            video_features: See `StormModel.forward`.
            **kwargs: Passed on to the language model and the loss.

        Returns:
            Loss, scores, cache and visual tokens.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            image_compression=image_compression,
            video_grid_thw=video_grid_thw,
            video_compression=video_compression,
            image_patch_features=image_patch_features,
            video_patch_features=video_patch_features,
            image_features=image_features,
            video_features=video_features,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if skip_logits and labels is not None:
            logits, loss = None, self._loss_at_labels(hidden_states, labels, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits, loss = self._logits(hidden_states[:, kept]), None
            if labels is not None:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
                )
        return StormCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _scale_logits(self.lm_head(hidden_states), self.config.text_config)

    def _loss_at_labels(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Computes the loss from the states ``(b, l, d)`` that come before a label, and from no others."""
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).to(hidden_states.device)
        is_target = targets != IGNORED_LABEL
        return self.loss_function(
            logits=self._logits(hidden_states[is_target]),
            labels=None,
            shift_labels=targets[is_target],
            vocab_size=self.config.text_config.vocab_size,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns the inputs of the next step; pictures are given with the prompt only."""
        if inputs_embeds is None and next_sequence_length == input_ids.shape[1]:
            # Nothing is cached: an assistant model reads the prompt, which transformers calls no first iteration.
            is_first_iteration = True
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in _VISUAL_INPUTS:
                kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        """Repeats each sample for beams or several answers; its videos are encoded once and then repeated."""
        visual = {name: model_kwargs.pop(name) for name in _VISUAL_INPUTS if name in model_kwargs}
        if expand_size > 1 and any(value is not None for value in visual.values()):
            visual = self._expand_visual_tokens(
                expand_size, input_ids, model_kwargs.get("inputs_embeds"), visual
            )
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        return input_ids, model_kwargs | visual

    def _expand_visual_tokens(
        self,
        expand_size: int,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        visual: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        names = ("pixel_values", "image_compression", "image_patch_features", "image_features",
                 "pixel_values_videos", "video_grid_thw", "video_compression", "video_patch_features", "video_features")  # fmt: skip
        tokens = self.model._visual_tokens(*(visual.get(name) for name in names))
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        else:
            input_ids = None
        expanded = {}
        for modality, features in zip(("image", "video"), tokens, strict=True):
            if features is not None:
                per_sample = (
                    self.model._placeholder_mask(modality, input_ids, inputs_embeds).sum(dim=1).tolist()
                )
                expanded[f"{modality}_features"] = torch.cat(
                    [sample.repeat(expand_size, 1) for sample in features.split(per_sample)]
                )
        return expanded


def _is_prompt(input_ids: torch.Tensor | None, cache: Cache | None) -> bool:
    """Returns whether these are the first tokens of a text; a step of generation, one token, is told without a sync."""
    if input_ids is None or input_ids.shape[1] == 1:
        return False
    return cache is None or int(cache.get_seq_length()) == 0


def _input_embedding_name(model: StormModel) -> str:
    """Returns the name of the token embedding's weight, which models call ``embed_tokens``, ``wte`` and more."""
    weight = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def _scale_logits(logits: torch.Tensor, text_config: Any) -> torch.Tensor:
    """Applies what some language models do to their scores: Cohere and Granite scale them, Gemma caps them."""
    if (scale := getattr(text_config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (scaling := getattr(text_config, "logits_scaling", None)) is not None:
        logits = logits / scaling
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
