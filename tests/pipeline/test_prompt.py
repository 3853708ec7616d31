"""Conversations as tokens: what does not fit is an error whose advice fits."""

import re

import pytest

from storm_vlm.errors import BudgetError, StormError
from storm_vlm.pipeline.prompt import answer_message, prompt_token_ids, text_message


@pytest.mark.parametrize(
    ("num_words", "options"), [(75, {}), (40, {"temporal_pool": 1}), (95, {"spatial_pool": 4})], ids=str
)
def test_advice_for_a_long_prompt_fits(video_qa, clip, num_words, options):
    question = "long " * num_words
    with pytest.raises(BudgetError, match=r"the prompt has \d+ tokens .* takes 600 with the answer") as error:
        video_qa.ask(clip, question, num_frames=50, max_new_tokens=20, **options)
    token_budget = int(re.search(r"token_budget=(\d+)", str(error.value))[1])
    num_frames = int(re.search(r"or (\d+) frames", str(error.value))[1])
    for advice in ({"token_budget": token_budget}, {"num_frames": num_frames}):
        answer = video_qa.ask(clip, question, max_new_tokens=20, **advice, **options)
        answer.text()
        assert answer.report.num_new_tokens == 20


def test_long_question_is_to_be_shorter(video_qa, clip):
    with pytest.raises(BudgetError, match="600 with the answer: ask a shorter question"):
        video_qa.ask(None, "long " * 200)
    with pytest.raises(BudgetError, match="ask a shorter question, for no more than a short answer"):
        video_qa.ask(clip, "long " * 200)


def test_answer_is_cut_to_the_room_there_is(video_qa, caplog):
    answer = video_qa.ask(None, "x" * 560, max_new_tokens=100)
    answer.text()
    assert answer.report.num_prompt_tokens + answer.report.num_new_tokens == 600
    assert "room for an answer of" in caplog.text


def test_empty_question_is_an_error_before_the_video_is_read(video_qa):
    with pytest.raises(StormError, match="the question is empty"):
        video_qa.ask("no-such.mp4", " ")


def test_system_message_with_a_placeholder(video_qa):
    with pytest.raises(StormError, match="the system message contains <video>"):
        video_qa.ask(None, "Who?", system="Look at <video>.")


def test_answer_that_spells_a_placeholder_joins_the_history_without_it(video_qa, clip):
    chat = video_qa.chat(clip)
    chat.ask("What?", max_new_tokens=2).text()
    chat.messages[-1] = answer_message(video_qa.processor, "a <video> and an <image>")
    assert chat.messages[-1]["content"][0]["text"] == "a  and an "
    assert chat.ask("Why?", max_new_tokens=2).text() is not None


def written(video_qa, video, **options):
    message = text_message(video_qa.processor, "user", "Which?", with_video=True)
    token_ids = prompt_token_ids(video_qa.processor, [message], video, **options)
    return re.sub(r"(<video>)+", "V", video_qa.processor.tokenizer.decode(token_ids))


def test_captions_stand_after_the_frames_that_begin_before_them(video_qa, clip):
    video = video_qa.encode(
        clip, num_frames=4, temporal_pool=2
    )  # frames at 0.6, 1.8, 3.1, 4.3 s in two groups
    plain = written(video_qa, video)
    captions = [(0.1, "early"), (2.0, "one"), (2.5, "two <video>"), (3.2, "late")]
    assert written(video_qa, video, captions=[]) == plain
    text = written(video_qa, video, captions=captions)
    assert re.sub(r"\[[\d.]+s\]", "", text).count("V\nearly\none\ntwo \nV\nlate\n") == 1
    assert text.startswith(plain[: plain.index("V")])
    assert video_qa.ask(video, "Which?", captions=captions, max_new_tokens=2).text() is not None


def test_an_answer_goes_on_from_its_start(video_qa, clip):
    video = video_qa.encode(clip, num_frames=4)
    assert (
        written(video_qa, video, answer_start="Best option:(") == written(video_qa, video) + "Best option:("
    )
