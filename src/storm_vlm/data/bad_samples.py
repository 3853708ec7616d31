"""The list of bad records of a run: written to a file as they come, and at some number too many."""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from storm_vlm.data.dataset import BadSample
from storm_vlm.errors import DataError

logger = logging.getLogger(__name__)


class BadSampleLog:
    """Counts bad records, each once, and stops the run when there are too many.

    Args:
        path: File with one JSON object a line; what an interrupted run wrote to it counts.
        max_bad_samples: Most bad records that a run may have.
    """

    def __init__(self, path: Path, max_bad_samples: int) -> None:
        self.path = path
        self.max_bad_samples = max_bad_samples
        self._labels = (
            {json.loads(line)["label"] for line in path.read_text().splitlines()} if path.is_file() else set()
        )

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, samples: Iterable[BadSample]) -> None:
        """Notes bad records.

        Args:
            samples: Records, new or known.

        Raises:
            DataError: There are more than ``max_bad_samples``.
        """
        last: BadSample | None = None
        for sample in samples:
            if sample.label in self._labels:
                continue
            self._labels.add(sample.label)
            logger.warning("bad sample %s: %s", sample.label, sample.reason)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(sample)) + "\n")
            last = sample
        if last is not None and len(self) > self.max_bad_samples:
            raise DataError(
                f"{len(self)} bad samples are more than max_bad_samples={self.max_bad_samples}; the last is "
                f"{last.label}: {last.reason}; all are listed in {self.path}"
            )
