"""What a recipe will train, before it does: sizes, learning rates, tokens, steps and an estimate of the memory."""

import statistics
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from storm_vlm.data import TrainingBatches
from storm_vlm.training.parts import count_parameters
from storm_vlm.training.recipe import Recipe

_FLOAT_BYTES, _HALF_BYTES = 4, 2
# Weights' gradient and AdamW's two moments, all in float32.
_TRAINED_BYTES = 3 * _FLOAT_BYTES
# Activations kept for the backward pass: of a transformer layer about this many values of the width for each token,
# with and without gradient checkpointing.
_VALUES_A_TOKEN, _VALUES_A_TOKEN_CHECKPOINTED = 34, 2
# Copies of the scores that the loss makes, beside them.
_LOGIT_COPIES = 3


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One part of the model.

    Attributes:
        name: Its name.
        num_parameters: All of its weights.
        num_trained: Those that are trained.
        learning_rate: None if it is frozen.
    """

    name: str
    num_parameters: int
    num_trained: int
    learning_rate: float | None


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What a run will do.

    Attributes:
        parts: The parts of the model.
        num_records: Records of the mixture.
        num_batches: Batches of the run, of all processes.
        num_steps: Steps of the optimizer.
        median_tokens_per_sample: Tokens of a record, about.
        max_tokens_per_sample: Tokens of the longest record, about.
        tokens_per_step: Tokens of a step, about, padding left out; the median of the run's first steps.
        memory_bytes: Estimate of the memory of one process without sharding: weights, gradients, moments, activations.
    """

    parts: tuple[PartPlan, ...]
    num_records: int
    num_batches: int
    num_steps: int
    median_tokens_per_sample: int
    max_tokens_per_sample: int
    tokens_per_step: int
    memory_bytes: int


def make_plan(
    recipe: Recipe,
    model: nn.Module,
    text_config: PreTrainedConfig,
    batches: TrainingBatches,
    lengths: list[int],
    num_processes: int,
) -> TrainingPlan:
    """Works out what a run will do.

    Args:
        recipe: The recipe.
        model: The model after `prepare_parts`.
        text_config: Config of its language model.
        batches: The batches of the run.
        lengths: Tokens of each record, about.
        num_processes: Processes that share the batches.

    Returns:
        The plan.
    """
    counts = count_parameters(model)
    multiple = recipe.schedule.gradient_accumulation_steps * num_processes
    first_batches = [batch for _, batch in zip(range(64 * multiple), batches, strict=False)]
    tokens = [sum(lengths[i] for i in batch) for batch in first_batches]
    steps = [sum(tokens[i : i + multiple]) for i in range(0, len(tokens), multiple)]
    padded = max(len(batch) * max(lengths[i] for i in batch) for batch in first_batches)
    return TrainingPlan(
        parts=tuple(
            PartPlan(name, total, trained, getattr(recipe.learning_rates, name))
            for name, (total, trained) in counts.items()
        ),
        num_records=len(lengths),
        num_batches=len(batches),
        num_steps=len(batches) // multiple,
        median_tokens_per_sample=int(statistics.median(lengths)),
        max_tokens_per_sample=max(lengths),
        tokens_per_step=int(statistics.median(steps)),
        memory_bytes=_memory_bytes(recipe, text_config, counts, padded),
    )


def _memory_bytes(
    recipe: Recipe, text: PreTrainedConfig, counts: dict[str, tuple[int, int]], batch_tokens: int
) -> int:
    schedule = recipe.schedule
    value_bytes = _HALF_BYTES if schedule.bf16 else _FLOAT_BYTES
    kept = _VALUES_A_TOKEN_CHECKPOINTED if schedule.gradient_checkpointing else _VALUES_A_TOKEN
    activations = batch_tokens * text.num_hidden_layers * text.hidden_size * kept * value_bytes
    logits = batch_tokens * text.vocab_size * _FLOAT_BYTES * _LOGIT_COPIES
    weights = sum(total * _FLOAT_BYTES + trained * _TRAINED_BYTES for total, trained in counts.values())
    return weights + activations + logits
