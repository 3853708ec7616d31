"""What `storm_world.yaml` asks for: the world's multiple-choice questions as lmms-eval's messages, and their score."""

from pathlib import Path
from typing import Any

from storm_vlm.evaluation import parse_letter

_FOLDER = Path("recipes/data/world/test_in_vocabulary")


def with_options(dataset: Any) -> Any:
    """Leaves out the open questions."""
    return dataset.filter(lambda document: document["form"] == "multiple_choice")


def doc_to_visual(document: dict[str, Any]) -> list[str]:
    """Returns the video's path."""
    return [str(_FOLDER / document["video"])]


def doc_to_text(document: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """Returns the question with its options."""
    return document["conversations"][0]["value"].removeprefix("<video>\n")


def doc_to_messages(
    document: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Returns the video and the question as one message."""
    content = [
        {"type": "video", "url": doc_to_visual(document)[0]},
        {"type": "text", "text": doc_to_text(document)},
    ]
    return [{"role": "user", "content": content}]


def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Scores an answer; one that names no option is wrong."""
    return {"accuracy": float(parse_letter(results[0], document["options"]) == document["answer"])}
