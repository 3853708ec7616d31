"""Chat messages as OpenAI and transformers write them: one record to our own form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from storm_vlm.data.record import Item, Record, Role, Turn
from storm_vlm.errors import DataError

# Where an item of a message names its file; OpenAI nests the address.
_FILE_FIELDS = ("path", "url")


def parse_chat(row: Mapping[str, Any], media_folder: Path) -> Record:
    """Reads one record with ``messages``, each with a role and text or a list of items.

    Args:
        row: The record.
        media_folder: Folder that the paths of pictures and videos are relative to.

    Returns:
        The conversation.

    Raises:
        DataError: A field is missing or of a wrong kind; the message names it.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError("messages: expected a list of messages")
    return Record(str(row.get("id", "")), tuple(_turn(message, media_folder) for message in messages))


def _turn(message: Any, media_folder: Path) -> Turn:
    if not isinstance(message, Mapping) or message.get("role") not in get_args(Role):
        role = message.get("role") if isinstance(message, Mapping) else message
        raise DataError(f"messages.role: expected one of {', '.join(get_args(Role))}, got {role!r}")
    content = message.get("content")
    if isinstance(content, str):
        return Turn(message["role"], (Item("text", content),))
    if not isinstance(content, list):
        raise DataError(f"messages.content: expected text or a list of items, got {type(content).__name__}")
    return Turn(message["role"], tuple(_item(item, media_folder) for item in content))


def _item(item: Any, media_folder: Path) -> Item:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return Item("text", item["text"])
    kind = str(kind).removesuffix("_url")
    if kind not in ("image", "video"):
        raise DataError(f"messages.content.type: expected text, image or video, got {kind!r}")
    value = next((item[name] for name in (*_FILE_FIELDS, kind, f"{kind}_url") if item.get(name)), None)
    value = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(value, str):
        raise DataError(f"messages.content: an item of type {kind} needs 'path' or {kind!r}")
    return Item(cast(Any, kind), str(media_folder / value.removeprefix("file://")))
