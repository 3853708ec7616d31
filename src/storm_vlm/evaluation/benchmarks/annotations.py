"""Annotation files as published: rows of JSON, JSONL or Parquet, and their fields with checks."""

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storm_vlm.data.readers import read_rows
from storm_vlm.errors import DataError


@dataclass(frozen=True, slots=True)
class AnnotationRow:
    """A record of an annotation file; a field that is missing or of another kind is a DataError that names it.

    Attributes:
        values: The fields as stored.
        where: File and number of the record, for messages.
    """

    values: Mapping[str, Any]
    where: str

    def text(self, name: str) -> str:
        """Returns a field that is a text, or a number as one."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.error(name, f"expected a text, got {value!r}")
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """Returns a field that is a list of texts, at least one; numbers become texts."""
        value = self._value(name)
        if not isinstance(value, list) or not value or not all(isinstance(item, str | int) for item in value):
            raise self.error(name, f"expected a list of texts, got {value!r}")
        return tuple(str(item) for item in value)

    def number(self, name: str) -> float:
        """Returns a field that is a number."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"expected a number, got {value!r}")
        return float(value)

    def rows(self, name: str) -> list["AnnotationRow"]:
        """Returns a field that is a list of records."""
        value = self._value(name)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(name, f"expected a list of records, got {value!r}")
        return [AnnotationRow(item, f"{self.where}, {name}[{i}]") for i, item in enumerate(value)]

    def letter(self, name: str, options: Sequence[str]) -> str:
        """Returns a field that is the letter of one of the options, in upper case."""
        letter = self.text(name).strip().upper()
        letters = string.ascii_uppercase[: len(options)]
        if len(letter) != 1 or letter not in letters:
            raise self.error(name, f"expected a letter of {letters}, got {letter!r}")
        return letter

    def letter_of_index(self, name: str, options: Sequence[str]) -> str:
        """Returns the letter of the option that a field counts from 0."""
        index = self.number(name)
        if index not in range(len(options)):
            raise self.error(name, f"expected a number from 0 to {len(options) - 1}, got {index:g}")
        return string.ascii_uppercase[int(index)]

    def letter_of_text(self, name: str, options: Sequence[str]) -> str:
        """Returns the letter of the option that a field repeats."""
        text = self.text(name)
        if text not in options:
            raise self.error(name, f"expected one of the options {list(options)}, got {text!r}")
        return string.ascii_uppercase[options.index(text)]

    def error(self, name: str, problem: str) -> DataError:
        """Returns an error that names file, record and field."""
        return DataError(f"{self.where}: field {name!r}: {problem}")

    def _value(self, name: str) -> Any:
        if self.values.get(name) is None:
            raise self.error(name, f"is missing; there are {', '.join(map(str, self.values))}")
        return self.values[name]


def read_annotations(file: Path) -> list[AnnotationRow]:
    """Reads an annotation file.

    Args:
        file: A ``.json``, ``.jsonl`` or ``.parquet`` file.

    Returns:
        Its records.

    Raises:
        DataError: It is not there or cannot be read; the message says so.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such annotation file; docs/evaluate.md says how a benchmark is laid out")
    rows = _read_parquet(file) if file.suffix == ".parquet" else read_rows(file)
    return [AnnotationRow(row, f"{file}: record {i}") for i, row in enumerate(rows)]


def read_mapping(file: Path) -> AnnotationRow:
    """Reads a JSON file that is one object; a DataError names the file if it is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{file}: expected one JSON object")
    return AnnotationRow(values, str(file))


def find_one(folder: Path, pattern: str) -> Path:
    """Returns the only file of a folder that fits a pattern; a DataError says if there is none or several."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(
            f"{folder}: expected one file {pattern}, found {len(found)}; docs/evaluate.md says how a benchmark is laid out"
        )
    return found[0]


def lettered(options: Sequence[str], form: str) -> str:
    """Writes options on lines, as ``form`` shows the first of them: ``A. {}`` or ``(A) {}``."""
    return "\n".join(
        form.replace("A", letter, 1).format(option)
        for letter, option in zip(string.ascii_uppercase, options, strict=False)
    )


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415 (an optional dependency)
    except ImportError as error:
        raise DataError(f"{file}: Parquet needs pyarrow: pip install 'storm-vlm[train]'") from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as Parquet: {error}") from error
    return rows
