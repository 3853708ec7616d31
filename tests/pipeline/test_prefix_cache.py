"""Keys and values kept between questions: the same scores as without, and none where they would be wrong."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, SiglipVisionConfig, SiglipVisionModel

from storm_vlm.model import ComposeOptions, VisionTower, compose_model
from storm_vlm.pipeline import VideoQA, VideoTokens
from tests.numerics import assert_matches
from tests.pipeline.conftest import byte_tokenizer
from tests.pipeline.test_video_qa import direct_answer


def record_scores(video_qa) -> list[torch.Tensor]:
    """Collects the scores of the last position of every step."""
    scores = []
    video_qa.model.register_forward_hook(lambda _, __, output: scores.append(output.logits[0, -1]))
    return scores


def test_scores_are_those_of_a_cold_run(video_qa, clip):
    encoded = video_qa.encode(clip)
    scores = record_scores(video_qa)
    video_qa.ask(encoded, "What happens first in this clip?", max_new_tokens=9).text()
    scores.clear()
    warm_answer = video_qa.ask(encoded, "What happens next?", max_new_tokens=9)
    warm_text, warm = warm_answer.text(), torch.stack(scores)
    assert warm_answer.report.num_cached_tokens > encoded.num_visual_tokens
    scores.clear()
    cold = VideoQA(video_qa.model, video_qa.processor).ask(encoded, "What happens next?", max_new_tokens=9)
    assert cold.text() == warm_text
    assert cold.report.num_cached_tokens == 0
    assert_matches("scores", warm, torch.stack(scores))


def test_each_turn_of_a_long_chat_answers_as_if_cold(video_qa, clip):
    encoded = video_qa.encode(clip, num_frames=4)
    chat = video_qa.chat(encoded, system="Be brief.")
    for turn in range(4):
        cold = VideoQA(video_qa.model, video_qa.processor).chat(encoded)
        cold.messages = list(chat.messages)
        question = f"Question {turn}?"
        want = cold.ask(question, max_new_tokens=5).text()
        answer = chat.ask(question, max_new_tokens=5)
        assert answer.text() == want
        assert (answer.report.num_cached_tokens > encoded.num_visual_tokens) == (turn > 0)
    assert len(chat.messages) == 1 + 2 * 4


def test_repeated_question_reads_one_token(video_qa, clip):
    video_qa.ask(clip, "What?", max_new_tokens=3).text()
    again = video_qa.ask(clip, "What?", max_new_tokens=3)
    again.text()
    assert again.report.num_cached_tokens == again.report.num_prompt_tokens - 1


def test_text_between_two_questions_about_a_video(video_qa, clip):
    video_qa.ask(clip, "What?", max_new_tokens=3).text()
    video_qa.ask(None, "Who?", max_new_tokens=3).text()
    assert video_qa.ask(clip, "What?", max_new_tokens=12).text() == direct_answer(video_qa, clip, "What?")


def test_tokens_that_were_loaded_twice_share_keys(video_qa, clip, tmp_path):
    video_qa.encode(clip).save(tmp_path / "x.safetensors")
    one, two = (VideoTokens.load(tmp_path / "x.safetensors") for _ in range(2))
    video_qa.ask(one, "What?", max_new_tokens=2).text()
    answer = video_qa.ask(two, "What?", max_new_tokens=2)
    answer.text()
    assert answer.report.num_cached_tokens == answer.report.num_prompt_tokens - 1


def test_changed_weights_make_new_keys(video_qa, clip):
    video_qa.ask(clip, "What?", max_new_tokens=2).text()
    with torch.no_grad():
        video_qa.model.language_model.layers[0].self_attn.k_proj.weight.mul_(-1)
    answer = video_qa.ask(clip, "What?", max_new_tokens=12)
    assert answer.text() == direct_answer(video_qa, clip, "What?")
    assert answer.report.num_cached_tokens == 0


def test_given_up_answer_leaves_no_wrong_keys(video_qa, clip):
    for _ in video_qa.ask(clip, "What?", max_new_tokens=100):
        break
    assert video_qa.ask(clip, "Why?", max_new_tokens=12).text() == direct_answer(video_qa, clip, "Why?")


@pytest.fixture
def sliding_qa() -> VideoQA:
    """A language model whose cache forgets all but the last 16 tokens."""
    tokenizer = byte_tokenizer()
    language_model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer) + 2, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=600,
            sliding_window=16, eos_token_id=None, bos_token_id=None, pad_token_id=None,
        )
    ).eval()  # fmt: skip
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            image_size=32, patch_size=8, vision_use_head=False,
        )
    ).eval()  # fmt: skip
    vision = VisionTower(tower, (32, 32), (0.5,) * 3, (0.5,) * 3)
    return VideoQA(*compose_model(vision, language_model, tokenizer, ComposeOptions(num_frames=8)))


def test_cache_that_forgets_is_not_cut(sliding_qa, clip):
    sliding_qa.ask(clip, "What happens first in this clip?", max_new_tokens=12).text()
    answer = sliding_qa.ask(clip, "And then?", max_new_tokens=12)
    assert answer.text() == direct_answer(sliding_qa, clip, "And then?")
    assert answer.report.num_cached_tokens == 0
