"""A conversation about a video to the language model's tokens, and whether they fit its context."""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from storm_vlm.errors import BudgetError, StormError
from storm_vlm.model import StormProcessor
from storm_vlm.pipeline.video_tokens import VideoTokens

logger = logging.getLogger(__name__)

Message = dict[str, Any]
Caption = tuple[float, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question and what surrounds it.

    Attributes:
        video: The encoded video that it is about, or None.
        question: The question.
        system: A system message.
        captions: Seconds and texts, such as subtitles, to write between the frames, in order.
        answer_start: How the answer begins; the model goes on from there.
    """

    video: VideoTokens | None
    question: str
    system: str | None = None
    captions: Sequence[Caption] = ()
    answer_start: str = ""


def text_message(processor: StormProcessor, role: str, text: str, *, with_video: bool = False) -> Message:
    """Returns a message of a conversation.

    Args:
        processor: The model's processor.
        role: ``system``, ``user`` or ``assistant``.
        text: What is said.
        with_video: Whether the video stands in front of the text.

    Returns:
        The message, with items of type text and video.

    Raises:
        StormError: The text is empty or contains a placeholder.
    """
    name = "question" if role == "user" else f"{role} message"
    if not text.strip():
        raise StormError(f"the {name} is empty")
    for token in (processor.image_token, processor.video_token):
        if token in text:
            raise StormError(f"the {name} contains {token}, which stands for a picture: leave it out")
    content = [{"type": "video"}] if with_video else []
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


def question_messages(
    processor: StormProcessor, question: str, *, system: str | None, with_video: bool
) -> list[Message]:
    """Returns a conversation of one question; see `text_message`."""
    messages = [text_message(processor, "system", system)] if system else []
    return [*messages, text_message(processor, "user", question, with_video=with_video)]


def answer_message(processor: StormProcessor, text: str) -> Message:
    """Returns the message of an answer; placeholders that a model wrote stand for nothing and are left out."""
    content = [{"type": "text", "text": _without_placeholders(processor, text)}]
    return {"role": "assistant", "content": content}


def prompt_token_ids(
    processor: StormProcessor,
    messages: list[Message],
    video: VideoTokens | None,
    *,
    captions: Sequence[Caption] = (),
    answer_start: str = "",
) -> list[int]:
    """Returns the tokens of a conversation, with one placeholder for each visual token.

    Args:
        processor: The model's processor.
        messages: The conversation; the answer to its last message comes next.
        video: The video that it is about.
        captions: Seconds and texts to write between the frames, in order; placeholders in them are left out.
        answer_start: How the answer begins.

    Returns:
        The tokens.
    """
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt += answer_start
    if video is not None:
        prompt = prompt.replace(processor.video_token, _video_text(processor, video, captions), 1)
    tokenizer = processor.tokenizer
    has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]


def check_context(
    token_ids: list[int],
    video: VideoTokens | None,
    context_tokens: int,
    max_new_tokens: int,
    video_token_id: int,
) -> int:
    """Refuses a prompt that leaves no room for an answer.

    Args:
        token_ids: The prompt.
        video: The video that its placeholders stand for.
        context_tokens: Most tokens that the language model takes.
        max_new_tokens: Most tokens of the answer.
        video_token_id: Placeholder of video tokens.

    Returns:
        Most tokens that the answer can have.

    Raises:
        BudgetError: The prompt is too long; the message says what would fit.
    """
    room = context_tokens - len(token_ids)
    if room >= max_new_tokens:
        return max_new_tokens
    if room >= 1:
        logger.warning("the context leaves room for an answer of %d tokens only", room)
        return room
    problem = (
        f"the prompt has {len(token_ids)} tokens ({0 if video is None else video.num_visual_tokens} of them visual) and "
        f"the language model takes {context_tokens} with the answer"
    )
    if video is None:
        raise BudgetError(f"{problem}: ask a shorter question")
    tokens_per_group, num_text, num_groups = _prompt_parts(token_ids, video, video_token_id)
    fitting = (context_tokens - max_new_tokens - num_text) // tokens_per_group
    if fitting < 1:
        raise BudgetError(f"{problem}: ask a shorter question, for no more than a short answer")
    raise BudgetError(
        f"{problem}: with an answer of {max_new_tokens}, token_budget={fitting * video.num_visual_tokens // num_groups} "
        f"would fit, or {fitting * video.compression.frames_per_group} frames with this compression"
    )


def _video_text(processor: StormProcessor, video: VideoTokens, captions: Sequence[Caption]) -> str:
    """Writes each caption on a line of its own after the last frame group that begins no later than it."""
    texts = processor.frame_group_texts(video.patch_grid, video.compression, video.timestamps_seconds)
    starts = video.timestamps_seconds[:: video.compression.frames_per_group]
    for seconds, caption in captions:
        group = max(0, bisect_right(starts, seconds) - 1)
        texts[group] = f"{texts[group].rstrip()}\n{_without_placeholders(processor, caption)}\n"
    return "".join(texts)


def _without_placeholders(processor: StormProcessor, text: str) -> str:
    for token in (processor.image_token, processor.video_token):
        text = text.replace(token, "")
    return text


def _prompt_parts(token_ids: list[int], video: VideoTokens, video_token_id: int) -> tuple[int, int, int]:
    """Returns the tokens of a frame group with its separator, those of the text around the video, and the groups."""
    num_groups = video.tokens.shape[0]
    first = token_ids.index(video_token_id)
    last = len(token_ids) - 1 - token_ids[::-1].index(video_token_id)
    num_separators = last + 1 - first - video.num_visual_tokens
    # Timestamps differ in length; the average is rounded up.
    per_separator = -(-num_separators // max(1, num_groups - 1))
    tokens_per_group = video.num_visual_tokens // num_groups + per_separator
    return tokens_per_group, len(token_ids) - (last + 1 - first), num_groups
