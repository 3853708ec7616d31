"""One conversation with its pictures and videos: the form that every data format is brought to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ItemType = Literal["text", "image", "video"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Item:
    """A piece of a message.

    Attributes:
        type: What it is.
        value: The text, or the path of the file.
    """

    type: ItemType
    value: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: Who speaks.
        items: What is said and shown, in order.
    """

    role: Role
    items: tuple[Item, ...]

    @property
    def text(self) -> str:
        """The words of the message."""
        return "".join(item.value for item in self.items if item.type == "text")


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation.

    Attributes:
        name: Its id in its data set, for messages.
        turns: The messages, the first one first.
        others: More conversations that begin as this one, up to the last picture or video that it shows, and are
            trained on beside it: they share what is shown and do not see each other.
    """

    name: str
    turns: tuple[Turn, ...]
    others: tuple["Record", ...] = ()

    @property
    def beginning(self) -> tuple[Turn, ...]:
        """The messages up to the last picture or video; none if the conversation shows nothing."""
        shown = [
            (i, j)
            for i, turn in enumerate(self.turns)
            for j, item in enumerate(turn.items)
            if item.type != "text"
        ]
        if not shown:
            return ()
        i, j = shown[-1]
        return (*self.turns[:i], Turn(self.turns[i].role, self.turns[i].items[: j + 1]))

    def paths(self, item_type: ItemType) -> list[Path]:
        """Returns the files of one type in the order in which the conversation shows them."""
        return [Path(item.value) for turn in self.turns for item in turn.items if item.type == item_type]

    def to_messages(self) -> list[dict[str, Any]]:
        """Returns chat messages for `StormProcessor.apply_chat_template`; an answer is plain text."""
        return [
            {"role": turn.role, "content": turn.text}
            if all(item.type == "text" for item in turn.items)
            else {
                "role": turn.role,
                "content": [
                    {"type": item.type, "text" if item.type == "text" else "path": item.value}
                    for item in turn.items
                ],
            }
            for turn in self.turns
        ]
