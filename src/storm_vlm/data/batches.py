"""Which records make which batch: one list for the whole run, so that a run can be resumed at any batch of it."""

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from storm_vlm.data.mixture import Mixture
from storm_vlm.errors import DataError

# Batches' worth of records that are sorted by length together: enough to group, few enough to stay random.
_GROUP_BATCHES = 64


class TrainingBatches(Sampler[list[int]]):
    """The batches of all epochs, one epoch after the other; they depend on the mixture's seed and nothing else.

    Args:
        mixture: The records.
        num_epochs: Times through the mixture; the last may be a part, such as 0.5.
        batch_size: Records in a batch; with ``token_budget`` the most.
        token_budget: Most tokens of a batch, counted with padding; one longer record makes a batch of its own.
        lengths: Tokens of each record; with them, records of similar length come together.
        multiple: Batches that are taken together: processes times accumulated batches.
        max_steps: Most times that ``multiple`` batches are taken; None for no limit.

    Raises:
        DataError: A token budget is asked for without lengths, or a number is out of range.
    """

    # accelerate gives whole batches to processes, in turn, and asks these two.
    batch_size = None
    drop_last = True

    def __init__(
        self,
        mixture: Mixture,
        *,
        num_epochs: float = 1.0,
        batch_size: int | None = None,
        token_budget: int | None = None,
        lengths: np.ndarray | None = None,
        multiple: int = 1,
        max_steps: int | None = None,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("token_budget", token_budget),
            ("max_steps", max_steps),
        ):
            if value is not None and value < 1:
                raise DataError(f"{name}: expected at least 1, got {value}")
        if not 0 < num_epochs < float("inf"):
            raise DataError(f"num_epochs: expected a number above 0, got {num_epochs}")
        if (batch_size is None and token_budget is None) or (token_budget is not None and lengths is None):
            raise DataError("batch_size or token_budget is needed, and lengths for a token_budget")
        self.mixture = mixture
        self.num_epochs = num_epochs
        self._most = batch_size
        self.token_budget = token_budget
        self.lengths = lengths
        self._multiple = multiple
        self._epoch_counts = self._count(max_steps)
        self._length = sum(self._epoch_counts)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        for epoch, count in enumerate(self._epoch_counts):
            yield from self.epoch_batches(epoch)[:count]

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """Returns the batches of one epoch in their order."""
        indices = self.mixture.epoch_indices(epoch)
        if self.lengths is None:
            size = self._most or 1
            return [indices[i : i + size].tolist() for i in range(0, len(indices), size)]
        group = _GROUP_BATCHES * (self._most or max(1, (self.token_budget or 1) // int(self.lengths.mean())))
        batches = []
        for start in range(0, len(indices), group):
            part = indices[start : start + group]
            batches += self._cut(part[np.argsort(-self.lengths[part], kind="stable")])
        order = np.random.default_rng((self.mixture.seed, epoch, 1)).permutation(len(batches))
        return [batches[i] for i in order]

    def _cut(self, indices: np.ndarray) -> list[list[int]]:
        """Cuts records, the longest first, into batches: the first of each says how many tokens the others take."""
        batches: list[list[int]] = []
        for index in indices.tolist():
            batch = batches[-1] if batches else []
            is_full = self._most is not None and len(batch) >= self._most
            longest = int(self.lengths[batch[0]]) if batch and self.lengths is not None else 0
            over = self.token_budget is not None and (len(batch) + 1) * longest > self.token_budget
            if not batch or is_full or over:
                batches.append([index])
            else:
                batch.append(index)
        return batches

    def _count(self, max_steps: int | None) -> list[int]:
        """Returns the batches to take from each epoch: whole steps in all, and at least one."""
        counts: list[int] = []
        wanted: float = math.inf if max_steps is None else max_steps * self._multiple
        epoch = 0
        while epoch < self.num_epochs and sum(counts) < wanted:
            part = min(1.0, self.num_epochs - epoch)
            counts.append(math.ceil(part * len(self.epoch_batches(epoch))))
            epoch += 1
        total = min(sum(counts), wanted)
        surplus = sum(counts) - int(total // self._multiple * self._multiple)
        if surplus >= sum(counts):
            raise DataError(
                f"num_epochs: {sum(counts)} batches are less than one step, which takes {self._multiple}: "
                "train longer or on smaller batches"
            )
        while surplus:
            taken = min(surplus, counts[-1])
            counts[-1] -= taken
            surplus -= taken
            if not counts[-1]:
                counts.pop()
        return counts
