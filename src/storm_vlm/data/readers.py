"""Data sets on disk: files and folders in the published layouts, as sequences of records."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from storm_vlm.data.chat import parse_chat
from storm_vlm.data.llava import parse_llava
from storm_vlm.data.record import Record
from storm_vlm.errors import DataError

DataFormat = Literal["llava", "chat", "llava_video_178k", "llava_cc3m", "hf_dataset"]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RecordSet:
    """Rows of one file or table, read into records when they are asked for.

    Attributes:
        name: Name of the set, for messages.
        rows: The rows as they are stored.
        parse: Reads one row.
        media_folder: Folder that paths are relative to.
    """

    name: str
    rows: Sequence[Row]
    parse: Callable[[Row, Path], Record]
    media_folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        return self.parse(self.rows[index], self.media_folder)

    def label(self, index: int) -> str:
        """Returns what names a row in a message: the set, the row's number and its id."""
        row = self.rows[index]
        identity = row.get("id") if isinstance(row, Mapping) else None
        return f"{self.name}[{index}]" + (f" id={identity}" if identity not in (None, "") else "")


def read_records(
    name: str,
    path: Path,
    *,
    data_format: DataFormat | None = None,
    media_folder: Path | None = None,
    subsets: Sequence[str] = (),
    split: str | None = None,
) -> list[RecordSet]:
    """Opens a data set.

    Args:
        name: Name of the set, for messages.
        path: A JSON or JSONL file, or the folder of a published data set.
        data_format: How it is laid out; found out from the path if None.
        media_folder: Folder that paths are relative to; where the file lies if None.
        subsets: Of LLaVA-Video-178K, the folders (``0_30_s_academic_v0_1``) and kinds (``cap``, ``oe``, ``mc``) to
            take; all if empty.
        split: Of a Hugging Face data set, the split to take; ``train`` if it has several.

    Returns:
        At least one set of records.

    Raises:
        DataError: There is nothing there, or it is in no known format; the message names the path.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    data_format = data_format or _detect(path)
    if data_format not in get_args(DataFormat):
        raise DataError(f"format must be one of {', '.join(get_args(DataFormat))}, got {data_format!r}")
    if subsets and data_format != "llava_video_178k":
        raise DataError(f"subsets: {path} in format {data_format} has none")
    if data_format == "hf_dataset":
        from storm_vlm.data.hf_dataset import open_dataset  # noqa: PLC0415 (an optional dependency)

        rows = open_dataset(path, split)
        return [RecordSet(name, rows, _parser(rows, path), media_folder or _folder(path))]
    if data_format == "llava_video_178k":
        return _read_video_178k(name, path, subsets)
    if data_format == "llava_cc3m":
        return [_read_cc3m(name, path, media_folder)]
    rows = read_rows(path)
    parse = parse_chat if data_format == "chat" else parse_llava
    return [RecordSet(name, rows, parse, media_folder or path.parent)]


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a JSON list or of a file with one JSON object a line.

    Args:
        path: File that ends in ``.json`` or ``.jsonl``.

    Returns:
        Its rows, at least one.

    Raises:
        DataError: It is no JSON, or no list of objects; the message names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        rows = [_decode(line, path, number) for number, line in lines]
    else:
        rows = _decode(text, path, None)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of at least one JSON object")
    return rows


def _decode(text: str, path: Path, line: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {line or error.lineno} is no JSON: {error.msg}") from error


def _detect(path: Path) -> DataFormat:
    if path.is_file():
        if path.suffix in (".json", ".jsonl"):
            return "chat" if "messages" in read_rows(path)[0] else "llava"
        if path.suffix == ".parquet":
            return "hf_dataset"
        raise DataError(f"{path}: expected .json, .jsonl, .parquet or a folder")
    if (path / "chat.json").is_file():
        return "llava_cc3m"
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return "hf_dataset"
    if _video_178k_files(path):
        return "llava_video_178k"
    if any(path.rglob("*.parquet")):
        return "hf_dataset"
    raise DataError(f"{path}: in none of the known layouts; say which one with format")


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _parser(rows: Sequence[Row], path: Path) -> Callable[[Row, Path], Record]:
    columns = getattr(rows, "column_names", ())
    for column, parse in (("messages", parse_chat), ("conversations", parse_llava)):
        if column in columns:
            return parse
    raise DataError(f"{path}: needs a column 'messages' or 'conversations', has {', '.join(columns)}")


def _read_cc3m(name: str, path: Path, media_folder: Path | None) -> RecordSet:
    images = path / "images"
    media_folder = media_folder or (images if images.is_dir() else path)
    if (path / "images.zip").is_file() and not images.is_dir() and media_folder == path:
        raise DataError(f"{path / 'images.zip'} is not unpacked: unzip it into {images}")
    return RecordSet(name, read_rows(path / "chat.json"), parse_llava, media_folder)


def _video_178k_files(path: Path) -> dict[Path, str]:
    """Returns the question files of LLaVA-Video-178K and the kind of each: cap, oe or mc."""
    kinds: dict[Path, str] = {}
    for file in sorted([*path.glob("*.json"), *path.glob("*/*.json")]):
        found = [kind for kind in ("cap", "oe", "mc") if kind in file.stem.split("_")]
        if found:
            kinds[file] = found[0]
    return kinds


def _read_video_178k(name: str, path: Path, subsets: Sequence[str]) -> list[RecordSet]:
    files = _video_178k_files(path)
    known = {*files.values(), *(file.parent.name for file in files)}
    if unknown := set(subsets) - known:
        raise DataError(
            f"subsets: {path} has no {', '.join(sorted(unknown))}, only {', '.join(sorted(known))}"
        )
    kinds = set(subsets) & {"cap", "oe", "mc"} or {"cap", "oe", "mc"}
    folders = set(subsets) - {"cap", "oe", "mc"}
    chosen = [
        file for file, kind in files.items() if kind in kinds and (not folders or file.parent.name in folders)
    ]
    if not chosen:
        raise DataError(f"{path}: no question files of LLaVA-Video-178K for subsets {list(subsets)}")
    return [
        RecordSet(f"{name}/{file.relative_to(path)}", read_rows(file), parse_llava, file.parent)
        for file in chosen
    ]
