"""Where the answers are in a conversation that a chat template has written out: what the loss is taken on."""

import re
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from storm_vlm.errors import DataError
from storm_vlm.model import StormProcessor

Span = tuple[int, int]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Private-use characters: no text and no template has them.
_MARK = "\ue000{}\ue001"


def render_with_answers(processor: StormProcessor, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
    """Writes a conversation with the chat template and finds what the assistant is to write.

    That is each answer with what stands between the generation prompt and it, and with the token that ends the turn.
    A template that marks its answers with ``{% generation %}`` is believed; for any other, each answer is found by
    rendering the conversation with marks in place of the answers.

    Args:
        processor: Its chat template is used.
        messages: The conversation.

    Returns:
        The text, and first and last-plus-one character of each answer.

    Raises:
        DataError: There is no answer, one is empty, or the template changes what the assistant says.
    """
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise DataError("the answer is empty" if answers else "there is no answer to learn from")
    template = processor.chat_template
    tokens = processor.tokenizer.special_tokens_map
    if _GENERATION_MARK.search(template):
        (text,), (spans,) = render_jinja_template(
            conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **tokens
        )
        return text, [(start, end) for start, end in spans]
    text = _render(processor, messages)
    pieces = _pieces_around_answers(processor, messages)
    for candidates in (answers, [answer.strip() for answer in answers]):
        if _interleave(pieces, candidates) == text:
            return text, _spans(processor, messages, pieces, candidates)
    raise DataError("the chat template changes the answers: they cannot be found in what it writes")


def _render(processor: StormProcessor, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def _pieces_around_answers(processor: StormProcessor, messages: list[dict[str, Any]]) -> list[str]:
    """Returns the text before, between and after the answers."""
    marked, count = [], 0
    for message in messages:
        if message["role"] == "assistant":
            message = {**message, "content": _MARK.format(count)}
            count += 1
        marked.append(message)
    text, pieces = _render(processor, marked), []
    for number in range(count):
        before, found, text = text.partition(_MARK.format(number))
        if not found:
            raise DataError("the chat template leaves out an answer")
        pieces.append(before)
    return [*pieces, text]


def _interleave(pieces: list[str], answers: list[str]) -> str:
    return "".join(piece + answer for piece, answer in zip(pieces, answers, strict=False)) + pieces[-1]


def _spans(
    processor: StormProcessor, messages: list[dict[str, Any]], pieces: list[str], answers: list[str]
) -> list[Span]:
    last_question = max(i for i, message in enumerate(messages) if message["role"] != "assistant")
    question = messages[: last_question + 1]
    without, with_prompt = _render(processor, question), _render(processor, question, prompt=True)
    prompt = with_prompt.removeprefix(without)
    spans, position = [], 0
    for before, answer, after in zip(pieces, answers, pieces[1:], strict=False):
        position += len(before)
        # What a template puts between the generation prompt and the answer is written by the model too.
        found = before.rfind(prompt) if prompt else -1
        start = position - (len(before) - found - len(prompt) if found >= 0 else 0)
        position += len(answer)
        spans.append((start, position + _end_of_turn(processor, after)))
    return spans


def _end_of_turn(processor: StormProcessor, after: str) -> int:
    """Returns the length of the end-of-turn token at the beginning of what follows an answer, 0 without one."""
    tokenizer = processor.tokenizer
    specials = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    body = after.lstrip()
    found = [token for token in specials if body.startswith(token)]
    return len(after) - len(body) + len(max(found, key=len)) if found else 0
