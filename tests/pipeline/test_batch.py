"""Answers in a batch against the same questions asked one by one, whatever was asked before."""

import functools

import pytest

from storm_vlm.errors import BudgetError, StormError
from storm_vlm.model import StormForConditionalGeneration
from storm_vlm.pipeline import Prompt
from tests.video.clips import write_clip

QUESTIONS = ("Why?", "What do you see there, and where?", "How many are there?")
NEW_TOKENS = 12


def one_by_one(video_qa, prompts):
    return [
        video_qa.ask(
            prompt.video, prompt.question, system=prompt.system, captions=prompt.captions,
            answer_start=prompt.answer_start, max_new_tokens=NEW_TOKENS,
        ).text()
        for prompt in prompts
    ]  # fmt: skip


@pytest.fixture
def other_clip(tmp_path):
    path = tmp_path / "other.mp4"
    write_clip(path, num_frames=30, fps=10, size=(64, 48))
    return path


@pytest.fixture
def count_tokens(video_qa, monkeypatch):
    """Keeps how many tokens the model has read in each call."""
    lengths = []
    forward = StormForConditionalGeneration.forward

    @functools.wraps(forward)
    def counted(self, *args, **inputs):
        lengths.append(tuple(inputs["input_ids"].shape))
        return forward(self, *args, **inputs)

    monkeypatch.setattr(StormForConditionalGeneration, "forward", counted)
    return lengths


def test_questions_about_one_video(video_qa, clip):
    video = video_qa.encode(clip)
    prompts = [Prompt(video, question) for question in QUESTIONS]
    expected = one_by_one(video_qa, prompts)
    assert len(set(expected)) > 1, "answers that are all alike would show nothing"
    for _ in range(2):  # cold, and with the video kept from the call before
        assert video_qa.ask_batch(prompts, max_new_tokens=NEW_TOKENS) == expected
    assert video_qa.ask_batch(prompts[1:2], max_new_tokens=NEW_TOKENS) == expected[1:2]
    assert one_by_one(video_qa, prompts) == expected, "what a batch keeps is right for single questions too"


def test_questions_about_several_videos_and_none(video_qa, clip, other_clip):
    first, second = video_qa.encode(clip), video_qa.encode(other_clip, num_frames=5)
    prompts = [
        Prompt(first, QUESTIONS[0], system="Be brief."),
        Prompt(None, QUESTIONS[1]),
        Prompt(second, QUESTIONS[2], answer_start="There are"),
        Prompt(first, QUESTIONS[1], captions=[(0.5, "a caption")]),
    ]
    assert video_qa.ask_batch(prompts, max_new_tokens=NEW_TOKENS) == one_by_one(video_qa, prompts)
    no_video = [Prompt(None, question) for question in QUESTIONS]
    assert video_qa.ask_batch(no_video, max_new_tokens=NEW_TOKENS) == one_by_one(video_qa, no_video)


def test_the_video_is_read_once(video_qa, clip, count_tokens):
    prompts = [Prompt(video_qa.encode(clip), question) for question in QUESTIONS]
    video_qa.ask_batch(prompts, max_new_tokens=1)
    (_, num_shared), (_, num_rest) = count_tokens
    count_tokens.clear()
    video_qa.ask_batch(prompts, max_new_tokens=1)
    assert count_tokens == [(len(prompts), num_rest)]
    assert num_shared > prompts[0].video.num_visual_tokens


def test_layers_with_windows_read_whole_prompts(video_qa, clip, monkeypatch):
    monkeypatch.setattr("storm_vlm.pipeline.batch.can_be_cut", lambda cache: False)
    prompts = [Prompt(video_qa.encode(clip), question) for question in QUESTIONS]
    assert video_qa.ask_batch(prompts, max_new_tokens=NEW_TOKENS) == one_by_one(video_qa, prompts)


def test_what_cannot_be_asked_is_an_error(video_qa, clip):
    video = video_qa.encode(clip)
    with pytest.raises(StormError, match="question is empty"):
        video_qa.ask_batch([Prompt(video, "Why?"), Prompt(video, " ")])
    with pytest.raises(BudgetError, match="600"):
        video_qa.ask_batch([Prompt(video, "Why?"), Prompt(video, "why " * 200)])
    with pytest.raises(StormError, match="max_new_tokens"):
        video_qa.ask_batch([Prompt(video, "Why?")], max_new_tokens=0)
