"""LLaVA's conversation format: one record to our own form."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storm_vlm.data.record import Item, ItemType, Record, Role, Turn
from storm_vlm.errors import DataError

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_PLACEHOLDER = re.compile(r"(<image>|<video>)")


def parse_llava(row: Mapping[str, Any], media_folder: Path) -> Record:
    """Reads one record with ``conversations`` and, where it shows something, ``image`` or ``video``.

    A record with files and no placeholder shows them before its first question. In a record that has videos and no
    image, ``<image>`` stands for a video, as in LLaVA's own video data.

    Args:
        row: The record.
        media_folder: Folder that the paths of pictures and videos are relative to.

    Returns:
        The conversation.

    Raises:
        DataError: A field is missing, or placeholders and files do not fit; the message names the field.
    """
    conversations = row.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise DataError("conversations: expected a list of messages")
    files: dict[ItemType, list[str]] = {
        "image": _files(row, "image", media_folder),
        "video": _files(row, "video", media_folder),
    }
    texts = [_text(message) for message in conversations]
    if not any(_PLACEHOLDER.search(text) for text in texts):
        first = next((i for i, message in enumerate(conversations) if _role(message) == "user"), 0)
        shown = "<image>" * len(files["image"]) + "<video>" * len(files["video"])
        texts[first] = shown + texts[first]
    remaining = {kind: list(paths) for kind, paths in files.items()}
    only_videos = bool(files["video"]) and not files["image"]
    turns = tuple(
        Turn(_role(message), tuple(_items(text, remaining, only_videos)))
        for message, text in zip(conversations, texts, strict=True)
    )
    left = {kind: len(paths) for kind, paths in remaining.items() if paths}
    if left:
        raise DataError(f"conversations: {_counted(left)} more than there are placeholders")
    return Record(str(row.get("id", "")), turns)


def _items(text: str, remaining: dict[ItemType, list[str]], only_videos: bool) -> list[Item]:
    items: list[Item] = []
    for part in _PLACEHOLDER.split(text):
        if _PLACEHOLDER.fullmatch(part):
            kind: ItemType = "video" if part == "<video>" or only_videos else "image"
            if not remaining[kind]:
                raise DataError(f"conversations: more {part} than files in {kind!r}")
            items.append(Item(kind, remaining[kind].pop(0)))
        elif part:
            # The chat template puts its own line break behind what is shown.
            after_visual = bool(items) and items[-1].type != "text"
            part = part.removeprefix("\n") if after_visual else part
            items += [Item("text", part)] if part else []
    return items


def _files(row: Mapping[str, Any], field: ItemType, media_folder: Path) -> list[str]:
    value = row.get(field)
    paths = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) for path in paths):
        raise DataError(f"{field}: expected a path or a list of paths, got {value!r}")
    return [str(media_folder / path) for path in paths]


def _role(message: Any) -> Role:
    role = message.get("from", message.get("role")) if isinstance(message, Mapping) else None
    if role not in _ROLES:
        raise DataError(f"conversations.from: expected one of {', '.join(_ROLES)}, got {role!r}")
    return _ROLES[role]


def _text(message: Any) -> str:
    text = message.get("value", message.get("content")) if isinstance(message, Mapping) else None
    if not isinstance(text, str):
        raise DataError(f"conversations.value: expected text, got {type(text).__name__}")
    return text


def _counted(left: dict[ItemType, int]) -> str:
    return " and ".join(f"{count} {kind} file{'s' * (count > 1)}" for kind, count in left.items())
