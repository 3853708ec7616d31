"""Examples to one batch: texts padded on the right, pictures and videos one after the other.

Shapes: ``b`` examples, ``l`` tokens of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from storm_vlm.data.dataset import BadSample, unpack_example
from storm_vlm.data.side_by_side import PADDING, SHARED, attention_inputs
from storm_vlm.model import StormProcessor
from storm_vlm.model.modeling_storm import IGNORED_LABEL

_TEXT_NAMES = {"input_ids", "labels", "conversation_ids"}


@dataclass(frozen=True, slots=True)
class StormCollator:
    """Joins examples with and without pictures and videos.

    Attributes:
        processor: Names the token to pad with and the inputs of pictures and videos.
    """

    processor: StormProcessor

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Joins examples.

        Args:
            examples: What `TrainingDataset` returns.

        Returns:
            Model inputs: ``input_ids``, ``attention_mask`` and ``labels`` ``(b, l)``, the pixels; where conversations
            stand side by side the mask and ``position_ids`` of `attention_inputs`; and
            ``bad_samples``, the records that could not be used. These alone if an example was given up.
        """
        unpacked = [unpack_example(example) for example in examples]
        bad: tuple[BadSample, ...] = sum((bad for _, bad in unpacked), ())
        inputs = [values for values, _ in unpacked]
        if not all(inputs):
            return {"bad_samples": bad}
        pad_id = self.processor.tokenizer.pad_token_id
        batch: dict[str, Any] = {
            "input_ids": _padded(inputs, "input_ids", pad_id),
            **_attention(inputs),
            "labels": _padded(inputs, "labels", IGNORED_LABEL),
        }
        visual = {name for values in inputs for name in values} - _TEXT_NAMES
        for name in sorted(visual):
            batch[name] = torch.cat([values[name] for values in inputs if name in values])
        return {**batch, "bad_samples": bad}


def _attention(inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    if not any("conversation_ids" in values for values in inputs):
        ones = [torch.ones_like(values["input_ids"]) for values in inputs]
        return {"attention_mask": pad_sequence(ones, batch_first=True)}
    alone = [
        {"conversation_ids": torch.full_like(values["input_ids"], SHARED), **values} for values in inputs
    ]
    return attention_inputs(_padded(alone, "conversation_ids", PADDING))


def _padded(inputs: Sequence[dict[str, torch.Tensor]], name: str, value: int) -> torch.Tensor:
    return pad_sequence([values[name] for values in inputs], batch_first=True, padding_value=value)
