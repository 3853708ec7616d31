"""Mixtures: which data sets are trained on, how much of each, and in which order."""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from storm_vlm.data.readers import DataFormat, RecordSet, read_records
from storm_vlm.data.record import Record, Turn
from storm_vlm.data.yaml_file import read_yaml
from storm_vlm.errors import DataError

_SAMPLING = re.compile(r"all|(first|end|random):(\d+(?:\.\d+)?)(%?)")


@dataclass(frozen=True, slots=True)
class SetConfig:
    """One data set of a mixture.

    Attributes:
        name: Name for messages.
        path: File or folder.
        format: How it is laid out; found out from the path if None.
        media: Folder that its pictures and videos are relative to; where its file lies if None.
        sampling: Which records: ``all``, or ``first``, ``end`` or ``random`` and a number or share: ``random:10%``.
        weight: How often each record occurs in an epoch; a fraction is a part drawn anew for each epoch.
        subsets: See `read_records`.
        split: See `read_records`.

    Raises:
        DataError: A value is out of range; the message names the field.
    """

    name: str
    path: Path
    format: DataFormat | None = None
    media: Path | None = None
    sampling: str = "all"
    weight: float = 1.0
    subsets: tuple[str, ...] = ()
    split: str | None = None

    def __post_init__(self) -> None:
        if not _SAMPLING.fullmatch(self.sampling):
            raise DataError(
                f"{self.name}.sampling: expected all, first:N, end:N or random:N (N may be 50%), "
                f"got {self.sampling!r}"
            )
        if not 0 < self.weight < float("inf"):
            raise DataError(f"{self.name}.weight: expected a number above 0, got {self.weight}")


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """The data sets of a mixture.

    Attributes:
        sets: At least one set; names differ.

    Raises:
        DataError: There is no set, or a name occurs twice.
    """

    sets: tuple[SetConfig, ...]

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.sets]
        if not names or len(set(names)) != len(names):
            raise DataError(f"sets: expected at least one set, each with a name of its own, got {names}")


def read_mixture_config(path: Path) -> MixtureConfig:
    """Reads a mixture; paths in it are relative to the file.

    Args:
        path: YAML file with the key ``sets``; or a data set, which is then the only one.

    Returns:
        The mixture.

    Raises:
        DataError: The file or a field is wrong; the message names both.
    """
    if path.suffix not in (".yaml", ".yml"):
        return MixtureConfig((SetConfig(path.stem, path),))
    content = read_yaml(path, DataError)
    if not isinstance(content, Mapping) or set(content) != {"sets"} or not isinstance(content["sets"], list):
        raise DataError(f"{path}: expected one key, 'sets', with a list of data sets")
    try:
        return MixtureConfig(tuple(_set_config(entry, path.parent) for entry in content["sets"]))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


class Mixture:
    """The records of a mixture, numbered through all its sets.

    Args:
        config: The sets.
        seed: Seed of random choices and of the order.
        conversations_per_example: Most neighbouring records that begin with the same pictures and videos to take as
            one record, the others beside the first.

    Raises:
        DataError: A set cannot be read, or nothing of it is left.
    """

    def __init__(self, config: MixtureConfig, *, seed: int = 0, conversations_per_example: int = 1) -> None:
        self.seed = seed
        self.sets: list[RecordSet] = []
        # Of each set, the rows of each of its records.
        self._rows: list[Sequence[np.ndarray] | np.ndarray] = []
        self._weights: list[float] = []
        for number, entry in enumerate(config.sets):
            opened = read_records(
                entry.name,
                entry.path,
                data_format=entry.format,
                media_folder=entry.media,
                subsets=entry.subsets,
                split=entry.split,
            )
            chosen = _choose(sum(map(len, opened)), entry.sampling, (seed, number))
            if not len(chosen):
                raise DataError(f"{entry.name}.sampling: {entry.sampling!r} leaves no record of {entry.path}")
            starts = np.cumsum([0, *map(len, opened)])
            for records, start in zip(opened, starts, strict=False):
                rows = chosen[(chosen >= start) & (chosen < start + len(records))] - start
                self.sets.append(records)
                self._rows.append(_groups(records, rows, conversations_per_example))
                self._weights.append(entry.weight)
        self._ends = list(accumulate(map(len, self._rows)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        records, rows = self._locate(index)
        first, *others = (records[int(row)] for row in rows)
        return replace(first, others=tuple(others))

    def label(self, index: int) -> str:
        """Returns what names a record in a message."""
        records, rows = self._locate(index)
        return records.label(int(rows[0]))

    def epoch_indices(self, epoch: int) -> np.ndarray:
        """Returns the records of an epoch in a random order that depends on the seed and the epoch alone."""
        random = np.random.default_rng((self.seed, epoch))
        parts = []
        for rows, end, weight in zip(self._rows, self._ends, self._weights, strict=True):
            indices = np.arange(end - len(rows), end)
            whole, fraction = divmod(weight, 1)
            parts += [
                np.repeat(indices, int(whole)),
                random.permutation(indices)[: round(fraction * len(rows))],
            ]
        together = np.concatenate(parts)
        if not len(together):
            raise DataError("weight: the weights of the mixture leave no record in an epoch")
        return random.permutation(together)

    def _locate(self, index: int) -> tuple[RecordSet, np.ndarray]:
        number = bisect_right(self._ends, index)
        start = self._ends[number] - len(self._rows[number])
        return self.sets[number], self._rows[number][index - start]


def _groups(records: RecordSet, rows: np.ndarray, size: int) -> Sequence[np.ndarray] | np.ndarray:
    """Joins neighbouring rows that begin with the same pictures and videos, at most ``size`` of them."""
    if size == 1:
        return rows.reshape(-1, 1)
    beginnings = [_beginning(records, int(row)) for row in rows]
    groups: list[list[int]] = []
    for row, before, beginning in zip(rows.tolist(), [None, *beginnings], beginnings, strict=False):
        if groups and beginning and beginning == before and len(groups[-1]) < size:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [np.array(group) for group in groups]


def _beginning(records: RecordSet, row: int) -> tuple[Turn, ...]:
    try:
        return records[row].beginning
    except (DataError, KeyError, TypeError):
        return ()  # a bad sample, of its own


def _choose(total: int, sampling: str, seed: tuple[int, int]) -> np.ndarray:
    """Returns the chosen row numbers, ascending."""
    if sampling == "all":
        return np.arange(total)
    strategy, amount, percent = _SAMPLING.fullmatch(sampling).groups()  # type: ignore[union-attr]  # was checked
    count = min(total, round(float(amount) / 100 * total) if percent else int(float(amount)))
    if strategy == "random":
        return np.sort(np.random.default_rng(seed).permutation(total)[:count])
    return np.arange(total)[:count] if strategy == "first" else np.arange(total - count, total)


def _set_config(entry: Any, folder: Path) -> SetConfig:
    if not isinstance(entry, Mapping):
        raise DataError(f"sets: expected a data set with name and path, got {entry!r}")
    known = {field.name for field in fields(SetConfig)}
    if unknown := set(entry) - known:
        raise DataError(
            f"sets: unknown field {', '.join(map(repr, sorted(unknown)))}, known: {', '.join(sorted(known))}"
        )
    values = dict(entry)
    if not isinstance(values.get("path"), str):
        raise DataError(f"sets.path: expected a file or folder, got {values.get('path')!r}")
    values.setdefault("name", Path(values["path"]).stem)
    for name in ("path", "media"):
        if values.get(name) is not None:
            values[name] = folder / Path(values[name]).expanduser()
    values["subsets"] = tuple(values.get("subsets") or ())
    if not isinstance(values.get("weight", 1.0), int | float) or isinstance(values.get("weight"), bool):
        raise DataError(f"{values['name']}.weight: expected a number, got {values['weight']!r}")
    return SetConfig(**values | {"sampling": str(values.get("sampling", "all"))})
