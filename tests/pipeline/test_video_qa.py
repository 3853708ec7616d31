"""Encoding in pieces, answers, and what is kept between questions: always against the model called directly."""

import threading

import pytest
import torch
from PIL import Image

from storm_vlm.errors import BudgetError, ModelError, StormError, VideoError
from storm_vlm.model import TokenCompression
from storm_vlm.pipeline import VideoQA, VideoTokens
from storm_vlm.pipeline.memory import estimate_memory
from tests.numerics import assert_matches
from tests.pipeline.conftest import make_parts
from tests.video.clips import draw_frame, write_clip


def direct_inputs(video_qa, clip, question, **options):
    """What a user of transformers would give to the model."""
    content = [{"type": "video", "path": str(clip)}, {"type": "text", "text": question}]
    return video_qa.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options,
    )  # fmt: skip


def direct_answer(video_qa, clip, question, *, max_new_tokens=12, **options):
    inputs = direct_inputs(video_qa, clip, question, **options)
    tokens = video_qa.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new_tokens = tokens[0, inputs["input_ids"].shape[1] :]
    return video_qa.processor.decode(new_tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_frames": 37},
        {"num_frames": 20, "temporal_pool": 4, "temporal_sample": 2, "spatial_pool": 4},
        {"fps": 3},
        {"token_budget": 24},
        {"start_seconds": 1.0, "end_seconds": 3.0, "num_frames": 6},
    ],
    ids=str,
)
def test_encoding_in_pieces_equals_the_model_on_the_whole_video(video_qa, clip, options):
    encoded = video_qa.encode(clip, **options)
    inputs = direct_inputs(video_qa, clip, "?", **options)
    with torch.no_grad():
        output = video_qa.model.get_video_features(
            inputs["pixel_values_videos"],
            inputs["video_grid_thw"],
            video_compression=inputs["video_compression"],
        )
    assert_matches("tokens", encoded.tokens.flatten(0, 2), output.pooler_output[0])
    assert encoded.patch_grid == tuple(inputs["video_grid_thw"][0].tolist())
    assert encoded.num_visual_tokens == (inputs["input_ids"] == video_qa.processor.video_token_id).sum()


def test_answer_equals_generate(video_qa, clip):
    answer = video_qa.ask(clip, "What?", max_new_tokens=12)
    pieces = list(answer)
    assert "".join(pieces).strip() == direct_answer(video_qa, clip, "What?")
    report = answer.report
    assert (report.num_frames, report.num_visual_tokens, report.num_uncompressed_tokens) == (8, 16, 32)
    assert report.num_new_tokens == 12
    assert report.num_prompt_tokens == direct_inputs(video_qa, clip, "What?")["input_ids"].shape[1]
    assert set(report.seconds) == {"read", "vision", "projector", "compression", "prefill", "decode"}
    assert "16 visual tokens (50% of uncompressed)" in report.line()


def test_second_question_reads_only_what_is_new_and_answers_the_same(video_qa, clip):
    video_qa.ask(clip, "What happens first?", max_new_tokens=12).text()
    calls = []
    video_qa.model.vision_tower.register_forward_hook(lambda *_: calls.append("vision"))
    lengths = []
    video_qa.model.language_model.register_forward_pre_hook(
        lambda _, __, inputs: lengths.append(inputs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    second = video_qa.ask(clip, "And then?", max_new_tokens=12)
    answer, report = second.text(), second.report
    assert calls == []
    assert report.num_cached_tokens > report.num_visual_tokens
    assert lengths[0] == report.num_prompt_tokens - report.num_cached_tokens
    assert answer == direct_answer(video_qa, clip, "And then?")


def test_questions_about_other_videos_do_not_share_keys(video_qa, clip, tmp_path):
    """The prompts are equal to the letter: same times, same placeholders, other pictures."""
    other = tmp_path / "other.mp4"
    write_clip(other, num_frames=50, fps=10, size=(96, 32))
    video_qa.ask(clip, "What?", max_new_tokens=4).text()
    answer = video_qa.ask(other, "What?", max_new_tokens=12)
    assert answer.text() == direct_answer(video_qa, other, "What?")
    assert answer.report.num_cached_tokens < answer.report.num_prompt_tokens - answer.report.num_visual_tokens


def test_chat_keeps_its_history_and_its_keys(video_qa, clip):
    chat = video_qa.chat(clip)
    first = chat.ask("What?", max_new_tokens=6)
    text = first.text()
    second = chat.ask("Why?", max_new_tokens=6)
    answer = second.text()
    fresh = VideoQA(video_qa.model, video_qa.processor)
    again = fresh.chat(fresh.encode(clip))
    again.messages = [*chat.messages[:2]]
    assert again.ask("Why?", max_new_tokens=6).text() == answer
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"][0]["text"] == text
    assert second.report.num_cached_tokens > first.report.num_prompt_tokens - 2


def test_question_without_a_video(video_qa):
    answer = video_qa.ask(None, "Who are you?", max_new_tokens=5)
    inputs = video_qa.processor.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    want = video_qa.model.generate(**inputs, max_new_tokens=5, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert answer.text() == video_qa.processor.decode(want, skip_special_tokens=True).strip()


def test_sampling_follows_the_seed(video_qa, clip):
    def sample():
        torch.manual_seed(3)
        return video_qa.ask(clip, "What?", max_new_tokens=12, temperature=2.0).text()

    assert sample() == sample()


def test_encoded_video_is_read_from_the_disk_by_another_process(video_qa, clip, tmp_path):
    encoded = video_qa.encode(clip)
    other = VideoQA(video_qa.model, video_qa.processor, cache_folder=tmp_path / "cache")
    again = other.encode(clip)
    assert again.is_from_cache
    assert torch.equal(again.tokens, encoded.tokens)
    assert (again.timestamps_seconds, again.provenance) == (encoded.timestamps_seconds, encoded.provenance)
    assert not other.encode(clip, num_frames=5).is_from_cache
    assert not other.encode(clip, temporal_pool=4).is_from_cache


def test_other_weights_are_another_entry(video_qa, clip, tmp_path):
    video_qa.encode(clip)
    model, processor = make_parts(seed=1)
    assert not VideoQA(model, processor, cache_folder=tmp_path / "cache").encode(clip).is_from_cache
    with torch.no_grad():
        video_qa.model.temporal_projector.input_projection.weight.add_(1)
    assert not video_qa.encode(clip).is_from_cache


@pytest.mark.parametrize("damage", ["truncate", "empty", "text", "bits"])
def test_damaged_cache_is_encoded_again(video_qa, clip, tmp_path, damage):
    encoded = video_qa.encode(clip)
    (entry,) = (tmp_path / "cache").iterdir()
    content = entry.read_bytes()
    damaged = {
        "truncate": content[: len(content) // 2],
        "empty": b"",
        "text": b"no tensors",
        "bits": content[:8] + b"\xff" * 20 + content[28:],
    }
    entry.write_bytes(damaged[damage])
    other = VideoQA(video_qa.model, video_qa.processor, cache_folder=tmp_path / "cache")
    again = other.encode(clip)
    assert not again.is_from_cache
    assert torch.equal(again.tokens, encoded.tokens)
    assert VideoTokens.load(entry).num_visual_tokens == encoded.num_visual_tokens


def test_crash_while_encoding_leaves_nothing_behind(video_qa, clip, tmp_path):
    def crash(part, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video_qa.encode(clip, progress=crash)
    assert not list((tmp_path / "cache").glob("*"))
    assert not video_qa.encode(clip).is_from_cache


def test_cache_drops_the_least_recently_used(video_qa, clip, tmp_path, monkeypatch):
    size = 12_000
    monkeypatch.setenv("STORM_CACHE_MAX_BYTES", str(size))
    bounded = VideoQA(video_qa.model, video_qa.processor, cache_folder=tmp_path / "small")
    for num_frames in range(2, 20):
        bounded.encode(clip, num_frames=num_frames)
    entries = list((tmp_path / "small").iterdir())
    assert 1 <= len(entries) < 18
    assert sum(path.stat().st_size for path in entries) <= size


def test_saved_tokens_give_the_same_answer(video_qa, clip, tmp_path):
    encoded = video_qa.encode(clip)
    encoded.save(tmp_path / "clip.safetensors")
    loaded = VideoTokens.load(tmp_path / "clip.safetensors")
    assert video_qa.ask(loaded, "What?", max_new_tokens=8).text() == direct_answer(
        video_qa, clip, "What?", max_new_tokens=8
    )
    assert loaded.compression == TokenCompression(temporal_pool=2)


def test_tokens_file_of_another_kind(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(StormError, match=r"x\.safetensors holds no encoded video"):
        VideoTokens.load(tmp_path / "x.safetensors")
    with pytest.raises(StormError, match="holds no encoded video"):
        VideoTokens.load(tmp_path / "missing.safetensors")


def test_answer_that_nobody_reads_to_the_end_stops(video_qa, clip):
    answer = iter(video_qa.ask(clip, "What?", max_new_tokens=300))
    next(answer)
    answer.close()
    assert all(thread.name != "storm-answer" for thread in threading.enumerate())
    assert video_qa.ask(clip, "What?", max_new_tokens=12).text() == direct_answer(video_qa, clip, "What?")


def test_error_while_answering_reaches_the_reader(video_qa, clip):
    encoded = video_qa.encode(clip)
    handle = video_qa.model.language_model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        video_qa.ask(encoded, "What?").text()
    handle.remove()
    assert video_qa.ask(encoded, "What?", max_new_tokens=12).text() == direct_answer(video_qa, clip, "What?")


def test_two_threads_get_their_own_answers(video_qa, clip):
    encoded = video_qa.encode(clip)
    questions = ["What?", "Where does it go?", "Why?"]
    answers = {}

    def work(question):
        answers[question] = video_qa.ask(encoded, question, max_new_tokens=10).text()

    threads = [threading.Thread(target=work, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for question in questions:
        assert answers[question] == direct_answer(video_qa, clip, question, max_new_tokens=10)


def test_progress_is_told(video_qa, clip):
    steps = []
    video_qa.encode(clip, num_frames=20, progress=lambda *step: steps.append(step))
    assert steps == [("frames", 8, 20), ("frames", 16, 20), ("frames", 20, 20)]


def test_report_waits_for_the_answer(video_qa, clip):
    answer = video_qa.ask(clip, "What?", max_new_tokens=3)
    with pytest.raises(RuntimeError, match="complete"):
        _ = answer.report


@pytest.mark.parametrize("question", ["", "   \n"])
def test_empty_question(video_qa, clip, question):
    with pytest.raises(StormError, match="the question is empty"):
        video_qa.ask(clip, question)


def test_question_with_a_placeholder(video_qa, clip):
    with pytest.raises(StormError, match="contains <video>"):
        video_qa.ask(clip, "What is <video>?")


def test_question_longer_than_the_context(video_qa, clip):
    with pytest.raises(
        BudgetError, match=r"the prompt has \d+ tokens \(16 of them visual\) and .* takes 600"
    ):
        video_qa.ask(clip, "long " * 200)


def test_pool_larger_than_the_video(video_qa, clip):
    with pytest.raises(
        BudgetError, match=r"temporal_pool=8 is larger than the 4 frames of .*clip\.mp4: choose at most 4"
    ):
        video_qa.encode(clip, num_frames=4, temporal_pool=8)
    assert video_qa.encode(clip, num_frames=1, temporal_pool=8).num_visual_tokens == 4


def test_spatial_pool_that_does_not_divide_is_an_error_before_the_video_is_read(video_qa):
    with pytest.raises(StormError, match="spatial_pool=9 averages 3x3 blocks"):
        video_qa.encode("no-such.mp4", spatial_pool=9)


def test_budget_below_one_frame(video_qa, clip):
    with pytest.raises(BudgetError, match="token_budget=3 is below the 4 tokens of a single frame"):
        video_qa.encode(clip, token_budget=3)


def test_more_frames_than_there_are(video_qa, clip):
    assert video_qa.encode(clip, num_frames=500).num_frames == 50


def test_memory_limit_is_one_error_that_says_what_fits(video_qa, clip):
    weights = sum(p.numel() * p.element_size() for p in video_qa.model.parameters())
    size, compression = (32, 32), TokenCompression(temporal_pool=2)
    needed = estimate_memory(video_qa.model, size, 20, compression).peak_bytes
    video_qa.max_memory_bytes = weights + needed
    with pytest.raises(
        BudgetError, match=r"50 frames need about .* GiB are free: (\d+) frames would fit"
    ) as error:
        video_qa.encode(clip, num_frames=50)
    fitting = int(str(error.value).split("free: ")[1].split()[0])
    assert fitting >= 20
    assert video_qa.encode(clip, num_frames=fitting).num_frames == fitting
    video_qa.max_memory_bytes = 1
    with pytest.raises(BudgetError, match="not even one frame would fit"):
        video_qa.encode(clip, num_frames=50, start_seconds=0.5)


def test_missing_video(video_qa):
    with pytest.raises(VideoError, match=r"no-such\.mp4"):
        video_qa.encode("no-such.mp4")


def test_models_that_cannot_be_loaded(tmp_path, model_folder):
    with pytest.raises(ModelError, match="cannot load the model"):
        VideoQA.from_pretrained(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="is a llama model, not a STORM model"):
        VideoQA.from_pretrained(tmp_path)
    with pytest.raises(StormError, match="device 'abacus' is not available"):
        VideoQA.from_pretrained(model_folder, device="abacus")
    with pytest.raises(StormError, match="dtype must be auto"):
        VideoQA.from_pretrained(model_folder, dtype="int8")


def test_bfloat16_runs(model_folder, clip):
    video_qa = VideoQA.from_pretrained(model_folder, dtype="bfloat16", use_cache=False)
    assert video_qa.encode(clip).tokens.dtype == torch.bfloat16
    assert video_qa.ask(clip, "What?", max_new_tokens=4).text() is not None


def test_the_rate_of_a_folder_is_a_part_of_what_is_known(video_qa, tmp_path):
    for number in range(6):
        Image.fromarray(draw_frame(number)).save(tmp_path / f"{number}.png")
    slow = video_qa.encode(tmp_path, num_frames=2, end_seconds=2)
    fast = video_qa.encode(tmp_path, num_frames=2, end_seconds=2, folder_fps=3)
    assert slow.timestamps_seconds == (0, 1)
    assert fast.timestamps_seconds == pytest.approx((1 / 3, 4 / 3))
    assert not fast.is_from_cache
