"""Training examples by number: bad records are replaced, always by the same others, and reported."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from storm_vlm.data.example import encode_record, estimate_length
from storm_vlm.data.feature_cache import FeatureCache
from storm_vlm.data.mixture import Mixture
from storm_vlm.errors import DataError
from storm_vlm.model import StormProcessor

logger = logging.getLogger(__name__)

# What a record with a missing or damaged file, a wrong field or a wrong text raises; StormError is a ValueError.
RECORD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    jinja2.TemplateError,
    Image.DecompressionBombError,
)
# Replacements of similar length that are tried before any record is.
_SIMILAR_TRIES = 8


@dataclass(frozen=True, slots=True)
class BadSample:
    """A record that could not be used.

    Attributes:
        label: Set, row and id of the record.
        reason: What is wrong with it.
    """

    label: str
    reason: str


class TrainingDataset(Dataset[dict[str, Any]]):
    """Encodes the records of a mixture.

    A record that cannot be used is replaced by another that depends on its number and the seed alone, no longer than
    it where lengths are known, so that batches, steps and a resumed run do not depend on who met it when.

    Args:
        mixture: The records.
        processor: Encodes them.
        max_length: See `encode_record`.
        max_bad_samples: Bad records that one example may meet before it is given up.
        lengths: Tokens of each record, about; None if they are not needed.
        temporal_sample: See `encode_record`.

    Attributes:
        features: Encoded examples to take in place of reading files; None to read them.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: StormProcessor,
        *,
        max_length: int | None = None,
        max_bad_samples: int = 0,
        lengths: np.ndarray | None = None,
        temporal_sample: int = 1,
    ) -> None:
        self.mixture = mixture
        self.processor = processor
        self.max_length = max_length
        self.max_bad_samples = max_bad_samples
        self.temporal_sample = temporal_sample
        self.features: FeatureCache | None = None
        self._by_length = None if lengths is None else np.argsort(lengths, kind="stable")
        self._rank = None if self._by_length is None else np.argsort(self._by_length, kind="stable")

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one example and the records that it replaces.

        Args:
            index: Number of the record.

        Returns:
            What `encode_record` returns, and ``bad_samples``; with more than ``max_bad_samples`` of them, these alone.
        """
        bad: list[BadSample] = []
        for candidate in self._candidates(index):
            try:
                example = self.encode(candidate)
            except RECORD_ERRORS as error:
                bad.append(BadSample(self.mixture.label(candidate), " ".join(str(error).split())))
                if len(bad) > self.max_bad_samples:
                    break
            else:
                return {**example, "bad_samples": tuple(bad)}
        return {"bad_samples": tuple(bad)}

    def encode(self, index: int) -> dict[str, torch.Tensor]:
        """Returns one example, from the features where there are some; a record that cannot be used raises."""
        record = self.mixture[index]
        if self.features is not None and (known := self.features.load(record)) is not None:
            return known
        example = encode_record(
            record, self.processor, max_length=self.max_length, temporal_sample=self.temporal_sample
        )
        if self.features is not None:
            # A batch holds pixels or features, not both.
            raise DataError(f"its features are not in {self.features.folder}: its files have changed since")
        return example

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        random = np.random.default_rng((self.mixture.seed, index))
        seen = {index}
        while len(seen) < len(self):
            candidate = int(random.integers(len(self)))
            if self._rank is not None and self._by_length is not None and len(seen) <= _SIMILAR_TRIES:
                candidate = int(self._by_length[random.integers(self._rank[index] + 1)])
                if candidate in seen:
                    candidate = int(random.integers(len(self)))
            if candidate not in seen:
                seen.add(candidate)
                yield candidate


def estimate_lengths(mixture: Mixture, processor: StormProcessor) -> np.ndarray:
    """Returns about how many tokens each record has; one that cannot be read counts as a middling one."""
    lengths = np.zeros(len(mixture), dtype=np.int64)
    for index in range(len(mixture)):
        try:
            lengths[index] = estimate_length(mixture[index], processor)
        except RECORD_ERRORS as error:
            logger.debug("%s: %s", mixture.label(index), error)
    known = lengths[lengths > 0]
    return np.where(lengths > 0, lengths, int(np.median(known)) if len(known) else 1)


def unpack_example(example: dict[str, Any]) -> tuple[dict[str, torch.Tensor], tuple[BadSample, ...]]:
    """Returns the model inputs of an example, empty if it was given up, and the bad records it met."""
    return {name: value for name, value in example.items() if name != "bad_samples"}, example["bad_samples"]
