"""Training recipes: a YAML file, read into frozen dataclasses; an unknown or unusable setting is an error naming it."""

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from storm_vlm.data.yaml_file import read_yaml
from storm_vlm.errors import RecipeError

PART_NAMES = ("vision_tower", "temporal_projector", "language_model")


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise RecipeError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """What is trained: a saved model, or one composed anew.

    Attributes:
        path: Folder or hub id of a STORM model; None to compose.
        vision: Vision encoder to compose from; the default model's if None.
        llm: Language model to compose from; the default model's if None.
        projector: Fields of `TemporalProjectorConfig` for a composed model.
        projector_seed: Seed of a composed model's new projector.
        projector_from: Folder of an adapter whose projector the model begins with, and nothing else of it, be there
            `adapter_from` or not.
        adapter_from: Folder of an adapter that the model begins with, its projector and its LoRA weights; new ones if
            None. LoRA may go on with a higher rank and in more layers, which begin anew.
        num_llm_layers: Keep only so many first layers of the language model; all if None.
        image_size: Side of the frames in pixels for a composed model; the encoder's own if None.
        attn_implementation: Attention of the backbones; transformers' choice if None.
    """

    path: str | None = None
    vision: str | None = None
    llm: str | None = None
    projector: dict[str, Any] = field(default_factory=dict)
    projector_seed: int = 0
    projector_from: Path | None = None
    adapter_from: Path | None = None
    num_llm_layers: int | None = None
    image_size: int | None = None
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        _require(
            (self.vision is None) == (self.llm is None), "model.llm", "vision and llm together", self.llm
        )
        composed = self.vision is not None or bool(self.projector)
        _require(
            self.path is None or not composed,
            "model.path",
            "no vision, llm or projector beside it",
            self.path,
        )
        layers = self.num_llm_layers
        _require(layers is None or layers > 0, "model.num_llm_layers", "a number above 0", layers)


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """What it is trained on.

    Attributes:
        mixture: A mixture's YAML file, or a data set; relative to the recipe.
        max_length: Most tokens of a record; longer ones are bad samples.
        max_bad_samples: Most records that may be unusable before the run stops.
        num_workers: Processes that decode videos; 0 decodes in the training process.
        group_by_length: Put records of similar length into a batch.
        token_budget: Most tokens of a batch, counted with padding, in place of a number of records.
        conversations_per_example: Most neighbouring records about the same pictures and videos that make one example:
            these are encoded and read once, and the conversations do not see each other. Needs sdpa or eager attention.
        feature_cache: Folder for the features of a frozen vision encoder, which then sees each picture once, before
            training; relative to where the command runs. None for no cache.
    """

    mixture: Path
    max_length: int | None = None
    max_bad_samples: int = 0
    num_workers: int = 2
    group_by_length: bool = True
    token_budget: int | None = None
    conversations_per_example: int = 1
    feature_cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_length", "token_budget", "conversations_per_example"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"data.{name}", "a number above 0", value)
        for name in ("max_bad_samples", "num_workers"):
            _require(getattr(self, name) >= 0, f"data.{name}", "0 or more", getattr(self, name))


@dataclass(frozen=True, slots=True)
class VideoRecipe:
    """How videos are seen; saved into the model.

    Attributes:
        num_frames: Frames of a video.
        temporal_pool: See `TokenCompression`.
        spatial_pool: See `TokenCompression`.
        temporal_sample: For the trained model's users; training never samples.
        frame_separator: none, newline or timestamp; the model's own if None.
    """

    num_frames: int = 32
    temporal_pool: int = 1
    spatial_pool: int = 1
    temporal_sample: int = 1
    frame_separator: Literal["none", "newline", "timestamp"] | None = None

    def __post_init__(self) -> None:
        _require(self.num_frames > 0, "video.num_frames", "a number above 0", self.num_frames)


@dataclass(frozen=True, slots=True)
class LearningRates:
    """Learning rate of each part; a part without one is frozen.

    Attributes:
        vision_tower: Of the vision encoder.
        temporal_projector: Of the temporal projector.
        language_model: Of the language model, or of its LoRA weights.
    """

    vision_tower: float | None = None
    temporal_projector: float | None = None
    language_model: float | None = None

    def __post_init__(self) -> None:
        for name in PART_NAMES:
            rate = getattr(self, name)
            _require(rate is None or rate > 0, f"learning_rates.{name}", "a number above 0 or null", rate)
        trained = [name for name in PART_NAMES if getattr(self, name) is not None]
        _require(bool(trained), "learning_rates", "at least one part with a learning rate", None)


@dataclass(frozen=True, slots=True)
class LoraRecipe:
    """Low-rank adaptation of the language model's linear layers.

    Attributes:
        rank: Rank of the adapters.
        alpha: Their scale, divided by the rank.
        dropout: Share of their inputs dropped in training.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require(self.rank > 0, "lora.rank", "a number above 0", self.rank)
        _require(0 <= self.dropout < 1, "lora.dropout", "a share below 1", self.dropout)


@dataclass(frozen=True, slots=True)
class ScheduleRecipe:
    """How long, in what steps and how fast.

    Attributes:
        num_epochs: Times through the mixture; may be a fraction.
        max_steps: Most steps; None for no limit.
        batch_size: Records of a batch in one process; with ``data.token_budget`` the most, None for no limit then.
        gradient_accumulation_steps: Batches of a step in one process.
        warmup_ratio: Share of the steps in which the learning rates rise.
        lr_scheduler: How they fall: a scheduler of transformers, such as cosine, linear or constant.
        weight_decay: Of weights that are no biases and no norms.
        max_grad_norm: Longest gradient; 0 for no limit.
        optimizer: An optimizer of transformers' Trainer.
        bf16: Compute in bfloat16 where it is safe; weights stay float32.
        gradient_checkpointing: Compute activations again in the backward pass, to save memory.
        seed: Of the order of the records, of LoRA's new weights and of dropout.
    """

    num_epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int | None = 8
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.03
    lr_scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch"
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.num_epochs > 0, "schedule.num_epochs", "a number above 0", self.num_epochs)
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"schedule.{name}", "a number above 0", value)
        _require(0 <= self.warmup_ratio < 1, "schedule.warmup_ratio", "a share below 1", self.warmup_ratio)


@dataclass(frozen=True, slots=True)
class OutputRecipe:
    """What is written, and how often.

    Attributes:
        folder: Checkpoints, logs, the training curve and the trained model; relative to where the command runs.
        logging_steps: Steps between two lines of the log.
        save_steps: Steps between two checkpoints.
        save_total_limit: Checkpoints that are kept.
        report_to: Trackers of transformers' Trainer, such as tensorboard or trackio.
        merged: Write the whole trained model, LoRA merged, to ``model``.
        adapter: Write only what was trained, projector and LoRA, to ``adapter``.
        adapter_dtype: Type of the adapter's weights, from which a merged model with LoRA is made too.
    """

    folder: Path
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int = 2
    report_to: tuple[str, ...] = ("tensorboard",)
    merged: bool = True
    adapter: bool = False
    adapter_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("logging_steps", "save_steps", "save_total_limit"):
            _require(getattr(self, name) > 0, f"output.{name}", "a number above 0", getattr(self, name))


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training stage.

    Attributes:
        data: What it is trained on.
        learning_rates: Which parts are trained, and how fast.
        output: What is written.
        model: What is trained.
        video: How videos are seen.
        lora: Adapters for the language model; None to train its own weights or none.
        schedule: Steps and optimizer.
    """

    data: DataRecipe
    learning_rates: LearningRates
    output: OutputRecipe
    model: ModelRecipe = field(default_factory=ModelRecipe)
    video: VideoRecipe = field(default_factory=VideoRecipe)
    lora: LoraRecipe | None = None
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)

    def __post_init__(self) -> None:
        rate = self.learning_rates.language_model
        _require(
            self.lora is None or rate is not None, "learning_rates.language_model", "a rate for LoRA", rate
        )
        has_size = self.schedule.batch_size is not None or self.data.token_budget is not None
        _require(has_size, "schedule.batch_size", "a number, or data.token_budget", None)
        is_frozen = self.learning_rates.vision_tower is None
        cache = self.data.feature_cache
        _require(
            is_frozen or cache is None, "data.feature_cache", "a frozen vision_tower, or no cache", str(cache)
        )
        only_small = self.learning_rates.vision_tower is None and (self.lora is not None or rate is None)
        _require(
            not self.output.adapter or only_small,
            "output.adapter",
            "a frozen vision tower and a language model that is frozen or has LoRA",
            True,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain values, for a record of the run."""
        return _plain(asdict(self))


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: YAML file.
        overrides: Settings such as ``schedule.max_steps=10``; values are YAML.

    Returns:
        The recipe; the path of its mixture is relative to the file, unless it was overridden.

    Raises:
        RecipeError: The file or a setting is wrong; the message names both.
    """
    content = read_yaml(path, RecipeError)
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected settings, got {content!r}")
    data = content.get("data")
    if isinstance(data, dict) and isinstance(data.get("mixture"), str):
        data["mixture"] = str(path.parent / Path(data["mixture"]).expanduser())
    try:
        for override in overrides:
            _override(content, override)
        return _build(Recipe, content, "")
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _override(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: expected key=value, such as schedule.max_steps=10")
    *groups, last = name.strip().split(".")
    for group in groups:
        inner = content.setdefault(group, {})
        content[group] = inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override}: {group} has no settings of its own")
        content = inner
    try:
        content[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is no YAML") from error


def _build(kind: Any, content: Any, prefix: str) -> Any:
    """Returns a dataclass from a mapping of its fields."""
    if not isinstance(content, Mapping):
        raise RecipeError(f"{prefix.rstrip('.') or 'recipe'}: expected settings, got {content!r}")
    known = {entry.name: entry for entry in fields(kind)}
    if unknown := [name for name in content if name not in known]:
        raise RecipeError(f"unknown setting {prefix}{unknown[0]}, known: {', '.join(known)}")
    hints = typing.get_type_hints(kind)
    values = {name: _convert(hints[name], value, prefix + name) for name, value in content.items()}
    try:
        return kind(**values)
    except TypeError as error:
        missing = [name for name in known if name not in values and f"'{name}'" in str(error)]
        raise RecipeError(f"{prefix}{missing[0] if missing else ''}: this setting is needed") from error


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Returns a YAML value as the type of its field."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)  # fmt: skip
    if value is None and type(None) in options:
        return None
    (kind,) = [option for option in options if option is not type(None)]
    if is_dataclass(kind):
        return _build(kind, value, f"{name}.")
    if typing.get_origin(kind) is Literal:
        _require(value in typing.get_args(kind), name, f"one of {', '.join(typing.get_args(kind))}", value)
        return value
    if typing.get_origin(kind) is tuple:
        _require(isinstance(value, list), name, "a list", value)
        return tuple(value)
    return _convert_scalar(kind, value, name)


def _convert_scalar(kind: Any, value: Any, name: str) -> Any:
    if kind is float:
        # YAML reads 1e-3 as text, for want of a point.
        try:
            _require(not isinstance(value, bool), name, "a number", value)
            return float(value)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{name}: expected a number, got {value!r}") from error
    if kind is Path:
        _require(isinstance(value, str), name, "a path", value)
        return Path(value).expanduser()
    plain = typing.get_origin(kind) or kind
    is_right = isinstance(value, plain) and (plain is bool or not isinstance(value, bool))
    _require(is_right, name, f"a value of type {plain.__name__}", value)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
