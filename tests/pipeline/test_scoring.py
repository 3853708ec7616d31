"""Log-likelihoods of answers against the model's own scores for each whole text, read alone and in one piece."""

import pytest
import torch

from storm_vlm.errors import BudgetError, StormError
from storm_vlm.pipeline import Prompt
from storm_vlm.pipeline.prompt import prompt_token_ids, question_messages

ANSWERS = ("a cat", "a catfish", "no")


def reference(video_qa, prompt, answer, *, with_end=True):
    model, processor, video = video_qa.model, video_qa.processor, prompt.video
    messages = question_messages(
        processor, prompt.question, system=prompt.system, with_video=video is not None
    )
    ids = prompt_token_ids(
        processor, messages, video, captions=prompt.captions, answer_start=prompt.answer_start
    )
    written = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    written += [processor.tokenizer.eos_token_id] * with_end
    features = {} if video is None else {"video_features": video.tokens.flatten(0, 2)}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + written]), **features).logits[0].double()
    scores = logits.log_softmax(-1)
    return sum(float(scores[len(ids) + place - 1, token]) for place, token in enumerate(written))


@pytest.mark.parametrize("with_end", [True, False])
def test_scores_are_those_of_each_text_alone(video_qa, clip, with_end):
    video = video_qa.encode(clip)
    prompts = [
        Prompt(video, "Which?"),
        Prompt(video, "Which of them?", system="Be brief.", captions=[(0.5, "hm")], answer_start="It is ("),
        Prompt(None, "Which?"),
    ]
    for prompt in (
        *prompts,
        prompts[0],
    ):  # at the end with what the first one left, and another one behind it
        expected = [reference(video_qa, prompt, answer, with_end=with_end) for answer in ANSWERS]
        assert len({round(value, 2) for value in expected}) == len(ANSWERS)
        got = video_qa.score_answers(prompt, ANSWERS, with_end=with_end)
        assert got == pytest.approx(expected, abs=1e-3)
        again = video_qa.score_answers(prompt, ANSWERS[::-1], with_end=with_end)
        assert again[::-1] == pytest.approx(expected, abs=1e-3)
        assert video_qa.score_answers(prompt, ANSWERS[:1], with_end=with_end) == pytest.approx(
            expected[:1], abs=1e-3
        )


def test_layers_with_windows_read_whole_prompts(video_qa, clip, monkeypatch):
    monkeypatch.setattr("storm_vlm.pipeline.batch.can_be_cut", lambda cache: False)
    prompt = Prompt(video_qa.encode(clip), "Which?")
    expected = [reference(video_qa, prompt, answer) for answer in ANSWERS]
    assert video_qa.score_answers(prompt, ANSWERS) == pytest.approx(expected, abs=1e-3)


def test_scoring_leaves_questions_as_they_were(video_qa, clip):
    video = video_qa.encode(clip)
    before = video_qa.ask(video, "Why?", max_new_tokens=8).text()
    video_qa.score_answers(Prompt(video, "Why?"), ANSWERS)
    assert video_qa.ask(video, "Why?", max_new_tokens=8).text() == before
    assert video_qa.ask_batch([Prompt(video, "Why?")], max_new_tokens=8) == [before]


def test_what_cannot_be_scored_is_an_error(video_qa, clip):
    prompt = Prompt(video_qa.encode(clip), "Which?")
    for answers in ([], ["a", ""]):
        with pytest.raises(StormError, match="expected answers to score, none of them empty"):
            video_qa.score_answers(prompt, answers)
    with pytest.raises(BudgetError, match="600"):
        video_qa.score_answers(prompt, ["yes", "no " * 200])
    video_qa.processor.tokenizer.eos_token = None
    with pytest.raises(StormError, match="no token that ends an answer"):
        video_qa.score_answers(prompt, ANSWERS)
