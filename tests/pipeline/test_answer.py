"""Answers as streams: given up, failed, stopped by a text, and what their reports say."""

import threading

import pytest
import torch

from storm_vlm.errors import StormError
from storm_vlm.pipeline.answer import AnswerReport, AnswerStream
from tests.pipeline.test_video_qa import direct_answer


def is_writing() -> bool:
    return any(thread.name == "storm-answer" for thread in threading.enumerate())


def stream_of(video_qa, pieces, stop=()):
    """An answer that arrives in the given pieces."""

    def generate(streamer, watch):
        for piece in pieces:
            streamer.text_queue.put(piece)

    return AnswerStream(generate, video_qa.processor.tokenizer, AnswerReport(), stop)


def test_answer_left_by_a_break_stops(video_qa):
    steps = []
    video_qa.model.language_model.register_forward_hook(lambda *_: steps.append(1))
    for _ in video_qa.ask(None, "Who?", max_new_tokens=500):
        break
    assert not is_writing()
    stream = video_qa.ask(None, "Who?", max_new_tokens=500)
    next(iter(stream))
    del stream
    assert not is_writing()
    assert len(steps) < 500, "neither answer was to be written to its end"


def test_answer_that_is_never_read_costs_nothing(video_qa):
    calls = []
    video_qa.model.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    stream = video_qa.ask(None, "Who?")
    del stream
    assert calls == []


def test_text_is_the_whole_answer(video_qa):
    whole = video_qa.ask(None, "Who?", max_new_tokens=10).text()
    stream = video_qa.ask(None, "Who?", max_new_tokens=10)
    next(iter(stream))
    assert stream.text() == whole
    assert stream.text() == whole
    assert list(stream) == []


def test_failed_answer_stays_failed(video_qa):
    video_qa.model.language_model.register_forward_pre_hook(lambda *_: 1 / 0)
    stream = video_qa.ask(None, "Who?")
    with pytest.raises(ZeroDivisionError):
        stream.text()
    with pytest.raises(RuntimeError, match="ended before it was complete"):
        stream.text()
    assert not is_writing()


@pytest.mark.parametrize("stop", [("###",), ("#", "xyz"), ("never", "##")], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_text_ends_the_answer_however_it_is_cut(video_qa, stop, size):
    text = "one # two ### three"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    want = min((text.split(mark)[0] for mark in stop), key=len)
    assert "".join(stream_of(video_qa, pieces, stop)) == want


def test_text_without_the_stop_text_comes_whole(video_qa):
    assert "".join(stream_of(video_qa, ["a #", "# b ", "##"], ("###",))) == "a ## b ##"


def test_stop_text_ends_generation(video_qa, clip):
    whole = direct_answer(video_qa, clip, "What?", max_new_tokens=40)
    mark = whole[10:12]
    stream = video_qa.ask(clip, "What?", max_new_tokens=40, stop=[mark])
    assert stream.text() == whole[: whole.index(mark)].strip()
    assert not is_writing()


def test_only_the_answer_that_encoded_reports_encoding(video_qa, clip):
    first = video_qa.ask(clip, "What?", max_new_tokens=2)
    first.text()
    second = video_qa.ask(clip, "What?", max_new_tokens=2)
    second.text()
    assert "vision" in first.report.seconds
    assert not first.report.is_video_from_cache
    assert set(second.report.seconds) == {"prefill", "decode"}
    assert second.report.is_video_from_cache
    assert second.report.time_to_first_token_seconds >= second.report.seconds["prefill"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"num_frames": 4}, "num_frames: there is no video left to encode"),
    ],
    ids=str,
)
def test_options_without_meaning(video_qa, options, message):
    with pytest.raises(StormError, match=message):
        video_qa.ask(None, "Who?", **options)


def test_gradients_may_flow_through_encoded_tokens(video_qa, clip):
    scale = torch.ones((), requires_grad=True)
    (video_qa.encode(clip).tokens * scale).sum().backward()
    assert scale.grad is not None
