"""The temporal projector: vision features in, tokens that know about their neighbours in time out.

Shapes: ``t`` frames, ``h`` rows, ``w`` columns of patches, ``c`` vision channels, ``d`` projector width.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from storm_vlm.model.configuration_storm import TemporalProjectorConfig
from storm_vlm.model.mamba_mixer import MambaMixer, MambaState


class TemporalLayer(GradientCheckpointingLayer):
    """One residual Mamba layer: ``x + mixer(norm(x))`` (STORM, Eq. 5)."""

    def __init__(self, config: TemporalProjectorConfig) -> None:
        super().__init__()
        _, hidden_size, _ = config.sizes()
        self.norm = nn.LayerNorm(hidden_size, eps=config.norm_eps)
        self.mixer = MambaMixer(
            hidden_size,
            d_state=config.d_state,
            d_conv=config.d_conv,
            expand=config.expand,
            dt_rank=config.dt_rank,
            bidirectional=config.bidirectional,
        )

    def forward(self, hidden_states: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
        """Enriches whole sequences, ``(b, l, d)``; ``chunk_size`` as in `MambaMixer.forward`."""
        return hidden_states + self.mixer(self.norm(hidden_states), chunk_size=chunk_size)

    def step(self, hidden_states: torch.Tensor, state: MambaState | None) -> tuple[torch.Tensor, MambaState]:
        """Enriches the next piece of a sequence; see `MambaMixer.step`."""
        mixed, state = self.mixer.step(self.norm(hidden_states), state)
        return hidden_states + mixed, state


class TemporalProjector(nn.Module):
    """Pixel shuffle, a projection to the language model's width, and residual Mamba layers over the whole video.

    One class is STORM (``projector_type="linear"`` and Mamba layers) and its baseline (``projector_type="mlp"`` and
    no layers). Videos are independent of each other: one in a batch gives what it gives alone.

    Args:
        config: Sizes and choices; ``input_size`` and ``output_size`` must be set.

    Source:
        STORM (arXiv 2503.04130), section 3 and Figure 6; the ``mlp`` form is NVILA's ``mlp_downsample``.
    """

    def __init__(self, config: TemporalProjectorConfig) -> None:
        super().__init__()
        _, hidden_size, output_size = config.sizes()
        self.config = config
        self.downsample_side = math.isqrt(config.downsample)
        self.input_projection = _input_projection(config)
        self.layers = nn.ModuleList(TemporalLayer(config) for _ in range(config.num_mamba_layers))
        self.output_projection = (
            nn.Linear(hidden_size, output_size) if hidden_size != output_size else nn.Identity()
        )
        self.reset_parameters()

    def forward(
        self, features: Sequence[torch.Tensor], *, chunk_size: int | None = None
    ) -> list[torch.Tensor]:
        """Projects and enriches several videos.

        Args:
            features: Vision features of each video, ``(t, h, w, c)``; the sizes may differ between videos.
            chunk_size: As in `MambaMixer.forward`.

        Returns:
            Tokens of each video, ``(t, ceil(h / side), ceil(w / side), output_size)``.
        """
        return self.mix([self.project(video) for video in features], chunk_size=chunk_size)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Merges neighbouring patches and projects them; frames do not see each other here.

        Args:
            features: Vision features, ``(t, h, w, c)``.

        Returns:
            Tokens, ``(t, ceil(h / side), ceil(w / side), d)``; a grid that the side does not divide is padded with
            zeros below and on the right.
        """
        return self.input_projection(pixel_shuffle(features, self.downsample_side))

    def mix(self, tokens: Sequence[torch.Tensor], *, chunk_size: int | None = None) -> list[torch.Tensor]:
        """Runs the Mamba layers over each video as one sequence: left to right, top to bottom, frame to frame.

        Args:
            tokens: Projected tokens of each video, ``(t, h, w, d)``.
            chunk_size: As in `MambaMixer.forward`.

        Returns:
            Enriched tokens of each video, ``(t, h, w, output_size)``.
        """
        mixed: list[torch.Tensor | None] = [None] * len(tokens)
        for members in _group_by_shape(tokens):
            sequences = torch.stack([tokens[i].flatten(0, 2) for i in members])  # (b, t * h * w, d)
            for layer in self.layers:
                sequences = layer(sequences, chunk_size)
            sequences = self.output_projection(sequences)
            for i, sequence in zip(members, sequences, strict=True):
                mixed[i] = sequence.unflatten(0, tokens[i].shape[:3])
        return [video for video in mixed if video is not None]

    def step(
        self, features: torch.Tensor, states: Sequence[MambaState] | None = None
    ) -> tuple[torch.Tensor, list[MambaState]]:
        """Projects and enriches the next frames of an endless video.

        Args:
            features: Vision features of the frames that follow those already seen, ``(t, h, w, c)``.
            states: One state for each layer, from the call before; None at the beginning.

        Returns:
            Tokens, ``(t, h', w', output_size)``, equal to those of ``forward`` on the whole video, and the states; a
            bidirectional projector has none, which is a ValueError.
        """
        tokens = self.project(features)
        sequence = tokens.flatten(0, 2)[None]  # (1, t * h * w, d)
        next_states = []
        for index, layer in enumerate(self._temporal_layers):
            sequence, state = layer.step(sequence, None if states is None else states[index])
            next_states.append(state)
        return self.output_projection(sequence)[0].unflatten(0, tokens.shape[:3]), next_states

    @property
    def _temporal_layers(self) -> list[TemporalLayer]:
        return list(self.layers)  # type: ignore[arg-type]  # a ModuleList does not know what it holds

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zeroes the mixers' outputs if the config asks that the Mamba layers begin as the identity."""
        if self.config.zero_init_residual:
            for layer in self._temporal_layers:
                init.zeros_(layer.mixer.out_proj.weight)


def pixel_shuffle(features: torch.Tensor, side: int) -> torch.Tensor:
    """Moves each ``side x side`` block of patches into the channels, row by row.

    Args:
        features: Vision features, ``(t, h, w, c)``.
        side: Side of the block.

    Returns:
        ``(t, ceil(h / side), ceil(w / side), side * side * c)``; missing patches are zeros.
    """
    _, h, w, _ = features.shape
    features = functional.pad(features, (0, 0, 0, -w % side, 0, -h % side))
    return rearrange(features, "t (h a) (w b) c -> t h w (a b c)", a=side, b=side)


def _input_projection(config: TemporalProjectorConfig) -> nn.Module:
    input_size, hidden_size, _ = config.sizes()
    merged_size = input_size * config.downsample
    if config.projector_type == "linear":
        return nn.Linear(merged_size, hidden_size)
    return nn.Sequential(
        nn.LayerNorm(merged_size),
        nn.Linear(merged_size, hidden_size),
        nn.GELU(),
        nn.Linear(hidden_size, hidden_size),
    )


def _group_by_shape(tokens: Sequence[torch.Tensor]) -> list[list[int]]:
    """Returns the indices of videos of equal shape together: they are scanned as one batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, video in enumerate(tokens):
        groups.setdefault(tuple(video.shape), []).append(index)
    return list(groups.values())
