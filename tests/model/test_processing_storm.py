"""The processor: what messages become, counted and spelled out, over every form that pictures and videos come in."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin

from storm_vlm.errors import BudgetError, StormError, VideoError
from storm_vlm.model import StormImageProcessor, StormProcessor, StormVideoProcessor
from storm_vlm.model.chat_template import multimodal_chat_template
from tests.model.tiny import ask, byte_tokenizer, encode, make_image, make_model, make_video
from tests.video.clips import write_clip


@pytest.fixture(scope="module")
def processor():
    """Frames of 32 pixels are 4x4 patches and 2x2 tokens; two frames are pooled into a group."""
    return make_model(temporal_pool=2, num_frames=8)[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """50 frames in 5 seconds, 48x64 pixels."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(path, num_frames=50, fps=10, size=(48, 64))
    return path


def make_processor(**options) -> StormProcessor:
    return make_model(num_frames=8, **options)[1]


def text_of(processor, inputs, row=0):
    """The text that the language model sees, with runs of placeholders as ``<video>x4``."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    text = processor.tokenizer.decode(ids)
    for token in ("<image>", "<video>"):
        for count in range(text.count(token), 1, -1):
            text = text.replace(token * count, f"{token}x{count}")
    return text


def test_items_come_in_their_order(processor):
    inputs = encode(
        processor, [ask("first", make_image(1), "then", make_video(3), make_image(2), "and what?")]
    )
    assert text_of(processor, inputs) == (
        "<user>first<image>x4\nthen<video>x4\n<video>x4\n\n<image>x4\nand what?<assistant>"
    )
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    assert inputs["pixel_values_videos"].shape == (3, 3, 32, 32)
    assert inputs["video_grid_thw"].tolist() == [[3, 4, 4]]
    assert inputs["video_compression"].tolist() == [[2, 1, 1]]
    assert inputs["image_compression"].tolist() == [[1, 1, 1]] * 2


def test_messages_of_plain_text_and_a_conversation(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "hi"}]},
        *ask(make_video(2), "what?"),
    ]
    inputs = encode(processor, [messages])
    assert text_of(processor, inputs) == (
        "<system>Be brief.<user>hello<assistant>hi</s><user><video>x4\n\nwhat?<assistant>"
    )


@pytest.mark.skipif(
    not hasattr(ProcessorMixin, "_adjust_assistant_masks_indices"),
    reason="this version of transformers masks the text before the placeholders are in it",
)
def test_masks_of_the_answers(processor):
    inputs = processor.apply_chat_template(
        [ask(make_video(2), "what?", answer="a red car")],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    mask = torch.as_tensor(inputs["assistant_masks"][0]).bool()
    assert processor.tokenizer.decode(inputs["input_ids"][0][mask]) == "a red car</s>"


def test_a_tokenizer_without_a_template_gets_a_plain_one():
    tokenizer = byte_tokenizer(chat_template=None)
    tokenizer.pad_token = "</s>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    text = StormProcessor(
        StormImageProcessor(),
        tokenizer,
        StormVideoProcessor(),
        chat_template=multimodal_chat_template(tokenizer),
    ).apply_chat_template(ask(make_video(1), "what?"), add_generation_prompt=True, tokenize=False)
    assert text == "User: <video>\nwhat?\nAssistant:"


def test_unknown_items_are_an_error(processor):
    messages = [{"role": "user", "content": [{"type": "audio", "audio": "x.wav"}]}]
    with pytest.raises(Exception, match="of type text, image or video, got audio"):
        processor.apply_chat_template(messages, tokenize=False)


def test_placeholders_are_one_token_wherever_they_stand(processor):
    ids = processor.tokenizer("a<video>b <image>.")["input_ids"]
    assert ids.count(processor.video_token_id) == 1
    assert ids.count(processor.image_token_id) == 1
    assert len(ids) == 6


def test_placeholders_without_the_chat_template(processor):
    inputs = processor(text="see <video> and <image>", videos=[make_video(2)], images=[make_image()])
    assert inputs["input_ids"][0].count(processor.video_token_id) == 4
    assert inputs["input_ids"][0].count(processor.image_token_id) == 4


@pytest.mark.parametrize("text", ["none", "<video> <video>"])
def test_videos_and_their_placeholders_must_agree(processor, text):
    with pytest.raises(ValueError, match="video"):
        processor(text=text, videos=[make_video(2)])


def test_text_alone_has_no_pixels(processor):
    inputs = encode(processor, [ask("just text"), ask("and more of it")])
    assert inputs.keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(processor, side):
    inputs = encode(processor, [ask("ab"), ask("abcd")], padding_side=side)
    assert inputs["attention_mask"].sum(1).tolist() == [
        inputs["input_ids"].shape[1] - 2,
        inputs["input_ids"].shape[1],
    ]
    padded = inputs["attention_mask"][0] == 0
    assert padded[:2].all() if side == "left" else padded[-2:].all()


def test_types_of_tokens_for_those_who_ask(processor):
    inputs = encode(processor, [ask(make_video(2), make_image(), "x")], return_mm_token_type_ids=True)
    types, ids = torch.as_tensor(inputs["mm_token_type_ids"]), inputs["input_ids"]
    assert torch.equal(types == 1, ids == processor.image_token_id)
    assert torch.equal(types == 2, ids == processor.video_token_id)


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("none", "<user><video>x12\nwhat?<assistant>"),
        ("newline", "<user><video>x4\n<video>x4\n<video>x4\n\nwhat?<assistant>"),
        ("timestamp", "<user>[0.0s]<video>x4[0.8s]<video>x4[1.6s]<video>x4\nwhat?<assistant>"),
    ],
)
def test_separators(separator, expected):
    """5 frames at 2.5 per second in groups of 2: at 0, 0.8 and 1.6 seconds."""
    processor = make_processor(temporal_pool=2, frame_separator=separator)
    inputs = encode(
        processor, [ask(make_video(5), "what?")], video_metadata=[{"total_num_frames": 5, "fps": 2.5}]
    )
    assert text_of(processor, inputs) == expected


def test_times_are_those_of_the_first_frame_of_each_kept_group(clip):
    processor = make_processor(temporal_pool=2, temporal_sample=2)
    inputs = encode(processor, [ask(clip, "x")], num_frames=10)
    # Ten segments of half a second; groups of two frames, every second of them: frames 0, 4 and 8.
    times = [f"[{0.5 * frame + 0.25:.1f}s]" for frame in (0, 4, 8)]
    text = text_of(processor, inputs)
    got = [float(part.split("s]")[0]) for part in text.split("[")[1:]]
    want = [float(time[1:-2]) for time in times]
    assert len(got) == 3
    assert np.allclose(got, want, atol=0.11), text


def test_every_form_of_a_video_gives_the_same(processor, tmp_path):
    frames = make_video(3, size=(32, 32))
    pictures = [Image.fromarray(frame) for frame in frames]
    paths = []
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    forms = {
        "array": frames,
        "channels first": frames.transpose(0, 3, 1, 2),
        "tensor": torch.from_numpy(frames),
        "floats": frames.astype(np.float32),
        "arrays": list(frames),
        "pictures": pictures,
        "paths": paths,
    }
    want = encode(processor, [ask(frames, "x")])
    for name, form in forms.items():
        got = encode(processor, [ask(form, "x")])
        assert torch.equal(got["input_ids"], want["input_ids"]), name
        assert torch.equal(got["pixel_values_videos"], want["pixel_values_videos"]), name


def test_files(processor, clip):
    inputs = encode(processor, [ask(clip, "x")])
    assert inputs["video_grid_thw"].tolist() == [[8, 4, 4]]
    assert text_of(processor, inputs).count("s]<video>x4") == 4


def test_the_keys_of_a_chat_item(processor, clip):
    want = encode(processor, [ask(clip, "x")])
    for key in ("video", "path", "url"):
        messages = [
            {"role": "user", "content": [{"type": "video", key: str(clip)}, {"type": "text", "text": "x"}]}
        ]
        got = encode(processor, [messages])
        assert torch.equal(got["pixel_values_videos"], want["pixel_values_videos"]), key
        assert torch.equal(got["input_ids"], want["input_ids"]), key


def test_a_batch_of_everything(processor, clip):
    batch = [ask(clip, "x"), ask("text"), ask(make_video(3), make_image(), make_video(1), "y")]
    together = encode(processor, batch)
    assert together["video_grid_thw"][:, 0].tolist() == [8, 3, 1]
    for row, conversation in enumerate(batch):
        alone = encode(processor, [conversation])
        assert text_of(processor, together, row) == text_of(processor, alone)


def test_videos_of_every_form_in_one_batch(processor, clip):
    frames = make_video(3)
    pictures = [Image.fromarray(frame) for frame in frames]
    inputs = encode(processor, [ask(clip, "x"), ask(pictures, "x"), ask(frames, "x"), ask(list(frames), "x")])
    assert inputs["video_grid_thw"][:, 0].tolist() == [8, 3, 3, 3]
    _, *same = inputs["pixel_values_videos"].split([8, 3, 3, 3])
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[1], same[2])


def test_frames_of_several_sizes_are_an_error(processor):
    with pytest.raises(ValueError, match=r"shape|one size"):
        encode(processor, [ask([make_image(size=(8, 8)), make_image(size=(9, 9))], "x")])


def test_a_budget_counts_frames_of_the_size_asked(processor, clip):
    options = {"size": {"height": 64, "width": 64}, "token_budget": 64}
    inputs = encode(processor, [ask(clip, "x")], **options)
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 64


def test_a_video_of_one_frame(processor):
    assert encode(processor, [ask(make_video(1), "x")])["video_grid_thw"].tolist() == [[1, 4, 4]]


def test_no_frames_are_an_error(processor):
    with pytest.raises(ValueError, match="at least one frame, got 0"):
        processor(text="<video>", videos=[make_video(2)[:0]])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pixels_that_are_no_numbers_are_an_error(processor, value):
    frames = make_video(2).astype(np.float32)
    frames[1, 3, 3, 0] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        processor(text="<video>", videos=[frames])
    with pytest.raises(ValueError, match="NaN or infinite"):
        processor(text="<image>", images=[frames[1]])


def test_a_missing_file_is_a_video_error(processor, tmp_path):
    with pytest.raises(VideoError, match="nowhere"):
        processor(text="<video>", videos=[str(tmp_path / "nowhere.mp4")])


@pytest.mark.parametrize("size", [(31, 57), (480, 17), (8, 8)])
def test_frames_of_any_size_are_resized(processor, size):
    inputs = encode(processor, [ask(make_video(2, size=size), make_image(size=size), "x")])
    assert inputs["pixel_values_videos"].shape == (2, 3, 32, 32)
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_pictures_of_any_mode(processor, mode):
    picture = Image.fromarray(make_image()).convert("RGB").convert(mode)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "x"}]}
    ]
    assert encode(processor, [messages])["pixel_values"].shape == (1, 3, 32, 32)
    frames = [picture, picture]
    assert encode(processor, [ask(frames, "x")])["pixel_values_videos"].shape == (2, 3, 32, 32)


def test_normalisation_is_that_of_the_encoder(processor):
    frames = np.zeros((1, 32, 32, 3), np.uint8)
    frames[..., 0] = 255
    pixels = encode(processor, [ask(frames, "x")])["pixel_values_videos"]
    assert torch.equal(pixels[0, 0], torch.ones(32, 32))
    assert torch.equal(pixels[0, 1], -torch.ones(32, 32))


@pytest.mark.parametrize(
    ("options", "num_frames"),
    [
        ({}, 8),
        ({"num_frames": 5}, 5),
        ({"num_frames": 1}, 1),
        ({"num_frames": 400}, 50),
        ({"fps": 2}, 10),
        ({"fps": 2, "num_frames": 4}, 4),
        ({"fps": 2, "num_frames": 40}, 10),
        ({"fps": 1000}, 50),
        ({"do_sample_frames": False}, 50),
        ({"start_seconds": 1.0, "end_seconds": 2.0, "fps": 5}, 5),
    ],
    ids=str,
)
def test_frames_of_a_file(processor, clip, options, num_frames):
    inputs = encode(processor, [ask(clip, "x")], **options)
    assert inputs["video_grid_thw"][0, 0] == num_frames


@pytest.mark.parametrize(
    ("options", "num_frames"),
    [
        ({}, 20),
        ({"num_frames": 5}, 5),
        ({"num_frames": 50}, 20),
        ({"fps": 1, "video_metadata": [{"total_num_frames": 20, "fps": 4}]}, 5),
        ({"fps": 1, "num_frames": 3, "video_metadata": [{"total_num_frames": 20, "fps": 4}]}, 3),
        ({"do_sample_frames": False, "video_metadata": [{"total_num_frames": 20, "fps": None}]}, 20),
        ({"do_sample_frames": True}, 8),
    ],
    ids=str,
)
def test_frames_of_an_array(processor, options, num_frames):
    inputs = encode(processor, [ask(make_video(20), "x")], **options)
    assert inputs["video_grid_thw"][0, 0] == num_frames


def test_chosen_frames_are_spread_over_the_array(processor):
    video = make_video(20)
    inputs = encode(processor, [ask(video, "x")], num_frames=4)
    want = encode(processor, [ask(video[[2, 7, 12, 17]], "x")])
    assert torch.equal(inputs["pixel_values_videos"], want["pixel_values_videos"])


def test_fps_needs_the_frame_rate(processor):
    with pytest.raises(ValueError, match="without a known frame rate"):
        encode(processor, [ask(make_video(4), "x")], fps=1)


@pytest.mark.parametrize("budget", [4, 13, 40, 1000])
def test_a_budget_is_kept_and_used(processor, clip, budget):
    inputs = encode(processor, [ask(clip, "x")], token_budget=budget)
    num_tokens = int((inputs["input_ids"] == processor.video_token_id).sum())
    # Groups of two frames have four tokens; the clip has 50 frames.
    assert num_tokens == min(budget // 4, 25) * 4
    assert inputs["video_grid_thw"][0, 0] == min(budget // 4, 25) * 2


def test_a_budget_with_frames_chooses_the_sampling(processor, clip):
    inputs = encode(processor, [ask(clip, "x")], token_budget=16, num_frames=40)
    assert inputs["video_grid_thw"][0, 0] == 40
    assert inputs["video_compression"].tolist() == [[2, 1, 5]]
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 16


def test_a_budget_below_a_frame_is_an_error(processor, clip):
    with pytest.raises(BudgetError, match="token_budget=3"):
        encode(processor, [ask(clip, "x")], token_budget=3)


@pytest.mark.parametrize(
    ("options", "num_tokens"),
    [
        ({"temporal_sample": 2}, 2 * 4),
        ({"temporal_pool": 1}, 8 * 4),
        ({"temporal_pool": 3, "spatial_pool": 4}, 3),
        ({"temporal_pool": 100}, 4),
    ],
    ids=str,
)
def test_compression_for_a_call_changes_both_counts(clip, options, num_tokens):
    model, processor = make_model(temporal_pool=2, num_frames=8)
    inputs = encode(processor, [ask(clip, "x")], **options)
    assert (inputs["input_ids"] == processor.video_token_id).sum() == num_tokens
    with torch.no_grad():
        assert len(model(**inputs).video_hidden_states) == num_tokens


@pytest.mark.parametrize("options", [{"temporal_poool": 2}, {"videos_kwargs": {"nonsense": 1}}], ids=str)
def test_unknown_options_are_errors(processor, options):
    with pytest.raises((TypeError, ValueError), match=r"temporal_poool|nonsense"):
        processor(text="<video>", videos=[make_video(2)], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal_pool": 0}, "temporal_pool must be a positive integer"),
        ({"spatial_pool": 3}, "spatial_pool must be a perfect square"),
        ({"spatial_pool": 9}, "spatial_pool=9 averages 3x3 blocks"),
        ({"num_frames": 0}, "num_frames"),
        ({"fps": 0}, "fps"),
        ({"token_budget": 0}, "token_budget"),
        ({"size": {"height": 4, "width": 32}}, "below the vision encoder's patch size"),
    ],
    ids=str,
)
def test_values_that_cannot_be_are_errors(processor, clip, options, message):
    with pytest.raises(StormError, match=message):
        encode(processor, [ask(clip, "x")], **options)


def test_another_frame_size_for_a_call():
    model, processor = make_model()
    inputs = encode(processor, [ask(make_video(2), make_image(), "x")], size={"height": 48, "width": 16})
    assert inputs["pixel_values_videos"].shape == (2, 3, 48, 16)
    assert inputs["video_grid_thw"].tolist() == [[2, 6, 2]]
    with torch.no_grad():
        assert len(model(**inputs).image_hidden_states) == 3


def test_frames_that_are_not_square_throughout():
    processor = make_processor()
    other = StormVideoProcessor(size={"height": 64, "width": 32}, patch_size=8)
    parts = StormProcessor(processor.image_processor, processor.tokenizer, other)
    assert other(make_video(2))["pixel_values_videos"].shape == (2, 3, 64, 32)
    assert len(parts(text="<video>", videos=[make_video(2)])["input_ids"][0]) == 2 * (4 * 2) + 2


def test_unresized_frames_must_have_whole_patches(processor):
    frames = make_video(2, size=(4, 40))
    with pytest.raises(StormError, match="below the vision encoder's patch size"):
        processor(text="<video>", videos=[frames], do_resize=False)


@pytest.mark.parametrize("separator", ["none", "newline", "timestamp"])
def test_counts_that_serving_asks_for_are_the_real_ones(separator):
    processor = make_processor(temporal_pool=2, spatial_pool=4, frame_separator=separator)
    sizes = [(5, 40, 60), (1, 32, 32), (8, 100, 20)]
    counts = processor._get_num_multimodal_tokens(image_sizes=[(40, 60), (5, 5)], video_sizes=sizes)
    for (num_frames, height, width), count in zip(sizes, counts.num_video_tokens, strict=True):
        inputs = encode(processor, [ask(make_video(num_frames, size=(height, width)), "x")])
        assert (inputs["input_ids"] == processor.video_token_id).sum() == count
    assert counts.num_image_tokens == [1, 1]
    assert counts.num_image_patches == [1, 1]
    more = processor._get_num_multimodal_tokens(video_sizes=sizes, temporal_pool=1)
    assert more.num_video_tokens == [5, 1, 8]


def test_saved_and_loaded_it_is_the_same(tmp_path, clip):
    processor = make_processor(temporal_pool=2, spatial_pool=4, temporal_sample=2, frame_separator="newline")
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, StormProcessor)
    assert isinstance(loaded.image_processor, StormImageProcessor)
    assert isinstance(loaded.video_processor, StormVideoProcessor)
    assert loaded.frame_separator == "newline"
    assert loaded.chat_template == processor.chat_template
    assert loaded.video_processor.to_dict() == processor.video_processor.to_dict()
    batch = [ask(clip, make_image(), "x"), ask("y")]
    want, got = encode(processor, batch), encode(loaded, batch)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_the_tokenizer_alone_knows_the_placeholders(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<video>") == processor.video_token_id
    assert tokenizer.decode(tokenizer("a<video>b")["input_ids"], skip_special_tokens=True) == "ab"


def test_a_tokenizer_without_the_placeholders_is_an_error():
    with pytest.raises(ValueError, match="has no token '<image>'"):
        StormProcessor(StormImageProcessor(), byte_tokenizer(), StormVideoProcessor())


def test_answers_are_decoded(processor):
    ids = processor.tokenizer(["one", "two"])["input_ids"]
    assert processor.batch_decode(ids) == ["one", "two"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "one"
