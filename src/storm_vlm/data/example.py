"""One record to what the model is trained on: token ids, labels on the answers, pixels.

Shapes: ``l`` tokens, ``f`` frames of all videos of the record.
"""

import bisect
import math
from typing import Any

import torch

from storm_vlm.data.answers import Span, render_with_answers
from storm_vlm.data.record import Record
from storm_vlm.data.side_by_side import side_by_side
from storm_vlm.errors import DataError
from storm_vlm.model import StormProcessor, TokenCompression, visual_grid
from storm_vlm.model.image_processing_storm import check_size
from storm_vlm.model.modeling_storm import IGNORED_LABEL
from storm_vlm.video import read_video

# A frame group's time as text in a video of an hour: the longest that is reckoned with.
_LONG_TIME = "[3599.9s]"


def encode_record(
    record: Record,
    processor: StormProcessor,
    *,
    max_length: int | None = None,
    temporal_sample: int = 1,
) -> dict[str, torch.Tensor]:
    """Reads the files of a record and turns it into model inputs with labels.

    Args:
        record: The conversation, and the others beside it.
        processor: Its settings say how many frames are read and how they are pooled.
        max_length: Most tokens that a record may have, those of the others counted; None for no limit.
        temporal_sample: Temporal sampling, for examples to evaluate on; in training a model never samples.

    Returns:
        ``input_ids`` and ``labels`` ``(l,)``; with others ``conversation_ids`` ``(l,)``, see `side_by_side`; of pictures
        ``pixel_values`` and ``image_compression``, of videos ``pixel_values_videos`` ``(f, 3, height, width)``,
        ``video_grid_thw`` and ``video_compression``.

    Raises:
        DataError: The answer is empty or the record is longer than ``max_length``; a file that cannot be read is a
            VideoError, placeholders without files a ValueError.
    """
    text, spans = render_with_answers(processor, record.to_messages())
    images = [read_video(path, num_frames=1).frames[0] for path in record.paths("image")]
    videos = [str(path) for path in record.paths("video")]
    _check_placeholders(processor, text, len(images), len(videos))
    inputs = processor(
        text=[text],
        images=images or None,
        videos=[videos] if videos else None,
        videos_kwargs={"temporal_sample": temporal_sample},
        return_offsets_mapping=True,
        return_text_replacement_offsets=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    offsets, replaced = inputs.pop("offset_mapping")[0], inputs.pop("text_replacement_offsets")[0]
    inputs.pop("attention_mask")
    input_ids = inputs.pop("input_ids")[0]
    is_answer = _in_spans(offsets, _moved(spans, replaced))
    for token_id in (processor.image_token_id, processor.video_token_id):
        is_answer &= input_ids != token_id
    texts = {"input_ids": input_ids, "labels": input_ids.masked_fill(~is_answer, IGNORED_LABEL)}
    if record.others:
        separator = replaced[-1]["replacement"].rpartition(replaced[-1]["text"])[2]
        tails = [_encode_tail(other, processor, separator) for other in record.others]
        texts = side_by_side(texts, tails, _end_of_shown(input_ids, processor))
    num_tokens = len(texts["input_ids"])
    if max_length is not None and num_tokens > max_length:
        raise DataError(f"{num_tokens} tokens are more than max_length={max_length}")
    return {**inputs, **texts}


def estimate_length(record: Record, processor: StormProcessor) -> int:
    """Returns about how many tokens a record has, without reading its files; a short video has fewer.

    Args:
        record: The conversation.
        processor: As in `encode_record`.

    Returns:
        Tokens, counting each video as if it had all the frames that the processor asks for.
    """
    text = processor.apply_chat_template(record.to_messages(), tokenize=False)
    num_tokens = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    num_tokens += sum(len(_encode_tail(other, processor, "")["input_ids"]) for other in record.others)
    pictures, video = processor.image_processor, processor.video_processor
    pooling = TokenCompression(video.temporal_pool, video.spatial_pool)
    grid = (video.num_frames, *check_size(video.size, video.patch_size))
    groups, rows, columns = visual_grid(grid, video.downsample, pooling)
    times = len(processor.tokenizer(_LONG_TIME, add_special_tokens=False)["input_ids"])
    separator = {"none": 0, "newline": 1, "timestamp": times}[processor.frame_separator]
    image_grid = visual_grid(
        pictures.patch_grid(), pictures.downsample, TokenCompression(spatial_pool=pictures.spatial_pool)
    )
    num_tokens += len(record.paths("video")) * (groups * (rows * columns + separator) - 1)
    return num_tokens + len(record.paths("image")) * (math.prod(image_grid) - 1)


def _encode_tail(record: Record, processor: StormProcessor, separator: str) -> dict[str, torch.Tensor]:
    """Encodes what comes after all that a conversation shows.

    Args:
        record: The conversation.
        processor: As in `encode_record`.
        separator: What the processor writes behind the last placeholder.

    Returns:
        ``input_ids`` and ``labels``, ``(l,)``.
    """
    text, spans = render_with_answers(processor, record.to_messages())
    _check_placeholders(processor, text, len(record.paths("image")), len(record.paths("video")))
    start = max(
        text.rfind(token) + len(token)
        for token in (processor.image_token, processor.video_token)
        if token in text
    )
    encoded = processor.tokenizer(
        separator + text[start:], add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt"
    )
    moved = len(separator) - start
    is_answer = _in_spans(encoded["offset_mapping"][0], [(a + moved, b + moved) for a, b in spans])
    input_ids = encoded["input_ids"][0]
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(~is_answer, IGNORED_LABEL)}


def _end_of_shown(input_ids: torch.Tensor, processor: StormProcessor) -> int:
    """Returns the number of tokens up to the last placeholder, which is counted."""
    is_visual = (input_ids == processor.image_token_id) | (input_ids == processor.video_token_id)
    return int(is_visual.nonzero()[-1]) + 1


def _check_placeholders(processor: StormProcessor, text: str, num_images: int, num_videos: int) -> None:
    """Placeholders that a user wrote into a text would be taken for pictures."""
    for token, count in ((processor.image_token, num_images), (processor.video_token, num_videos)):
        if text.count(token) != count:
            raise DataError(f"the text has {text.count(token)} {token} but {count} were given")


def _moved(spans: list[Span], replaced: list[dict[str, Any]]) -> list[Span]:
    """Returns spans of the text as written in the text whose placeholders have been multiplied."""
    ends = [entry["span"][1] for entry in replaced]
    gained = [0, *(entry["new_span"][1] - entry["span"][1] for entry in replaced)]
    return [
        (start + gained[bisect.bisect_right(ends, start)], end + gained[bisect.bisect_right(ends, end)])
        for start, end in spans
    ]


def _in_spans(offsets: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    """Returns which tokens, given by their characters ``(l, 2)``, overlap a span."""
    chosen = torch.zeros(len(offsets), dtype=torch.bool)
    for start, end in spans:
        chosen |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return chosen
