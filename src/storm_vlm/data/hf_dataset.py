"""Hugging Face data sets from a local folder or file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from storm_vlm.errors import DataError


def open_dataset(path: Path, split: str | None) -> Sequence[Mapping[str, Any]]:
    """Opens a data set that ``save_to_disk`` wrote, or a folder or file in Parquet.

    Args:
        path: Folder or file.
        split: Split to take; the only one, or ``train``, if None.

    Returns:
        Its rows, which stay on disk.

    Raises:
        DataError: It cannot be read or has no such split.
    """
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(path))
        else:
            files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
            found = datasets.DatasetDict(_splits(files))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a data set: {str(error).splitlines()[0]}") from error
    if isinstance(found, datasets.Dataset):
        return found
    names = list(found)
    wanted = split or (names[0] if len(names) == 1 else "train")
    if wanted not in found:
        raise DataError(f"{path}: split {wanted!r} is not there, only {', '.join(map(str, names))}")
    return found[wanted]


def _splits(files: list[Path]) -> dict[str, datasets.Dataset]:
    """Returns Parquet files by split: ``train-00000-of-00002.parquet`` belongs to ``train``."""
    names: dict[str, list[str]] = {}
    for file in files:
        names.setdefault(file.stem.split("-")[0], []).append(str(file))
    return {name: datasets.Dataset.from_parquet(paths) for name, paths in names.items()}
