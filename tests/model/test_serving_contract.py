"""What serving engines and pipelines rely on: names, base classes, one tensor for each video, exact counts.

Source: vLLM 0.33, model_executor/models/transformers (its Transformers backend).
"""

import importlib.util
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AttentionInterface, AutoModel, pipeline
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.video_utils import VideoMetadata

from tests.model.tiny import ask, encode, make_image, make_model, make_video
from tests.numerics import assert_matches
from tests.video.clips import write_clip


@pytest.fixture(scope="module")
def tiny():
    return make_model(temporal_pool=2, num_frames=4)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    for part in tiny:
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(path, num_frames=20, fps=10, size=(48, 64))
    return path


def test_the_base_model_is_built_empty_and_owns_the_encoders(tiny):
    config = tiny[0].config
    assert config.get_text_config() is config.text_config
    with torch.device("meta"):
        base = AutoModel.from_config(config, dtype=torch.bfloat16)
    assert {"vision_tower", "temporal_projector", "language_model"} == {
        name for name, _ in base.named_children()
    }
    assert all(parameter.device.type == "meta" for parameter in base.parameters())
    assert base.get_input_embeddings() is base.language_model.get_input_embeddings()


def test_names_of_the_weights_follow_from_the_base_model(tiny):
    model = tiny[0]
    base = {f"model.{name}" for name in model.model.state_dict()}
    assert set(model.state_dict()) == base | {"lm_head.weight"}
    assert model.base_model_prefix == "model"
    assert model.base_model is model.model
    assert model.language_model is model.model.language_model
    assert model.vision_tower is model.model.vision_tower


def test_attention_is_replaced_by_name(tiny, monkeypatch):
    model, processor = tiny
    assert model._supports_attention_backend
    calls = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        calls.append(type(module).__name__)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "engine", attention)
    inputs = encode(processor, [ask(make_video(3), "what?")])
    with torch.no_grad():
        want = model(**inputs).logits
        model.set_attn_implementation("engine")
        got = model(**inputs).logits
    model.set_attn_implementation("sdpa")
    assert {"Qwen3Attention", "SiglipAttention"} == set(calls)
    assert got.shape == want.shape


@pytest.mark.parametrize("owner", ["base", "whole"])
def test_features_are_one_tensor_for_each_picture(tiny, owner):
    model, processor = tiny
    model = model.model if owner == "base" else model
    inputs = encode(processor, [ask(make_video(5), make_image(), make_video(2), "x")])
    visual = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        videos = model.get_video_features(
            **{name: value for name, value in visual.items() if "video" in name}, return_dict=True
        ).pooler_output
        images = model.get_image_features(
            **{name: value for name, value in visual.items() if "video" not in name}, return_dict=True
        ).pooler_output
    assert [tuple(tokens.shape) for tokens in videos] == [(12, 32), (4, 32)]
    assert [tuple(tokens.shape) for tokens in images] == [(4, 32)]


def test_text_and_features_may_be_joined_outside_the_model(tiny):
    """As an engine does: it puts the visual tokens into the embeddings itself and gives only those."""
    model, processor = tiny
    inputs = encode(processor, [ask(make_video(5), make_image(), "what?")])
    ids = inputs["input_ids"]
    with torch.no_grad():
        want = model(**inputs)
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == model.config.video_token_id] = want.video_hidden_states
        embeds[ids == model.config.image_token_id] = want.image_hidden_states
        got = model(inputs_embeds=embeds, position_ids=torch.arange(ids.shape[1])[None], use_cache=False)
        assert_matches("logits", got.logits, want.logits)
        base = model.model(inputs_embeds=embeds, return_dict=False)
        assert_matches("hidden states", model.lm_head(base[0]), want.logits)


def test_what_the_processor_must_have(tiny):
    processor = tiny[1]
    assert processor.tokenizer.convert_ids_to_tokens(processor.image_token_id) == processor.image_token
    assert processor.tokenizer.convert_ids_to_tokens(processor.video_token_id) == processor.video_token
    assert processor.image_token_id == tiny[0].config.image_token_id
    assert processor.video_token_id == tiny[0].config.video_token_id
    inputs = encode(processor, [ask(make_video(5), make_image(), "x")])
    text = {"input_ids", "attention_mask"}
    visual = {*processor.image_processor.model_input_names, *processor.video_processor.model_input_names}
    assert inputs.keys() == text | visual
    assert visual <= set(processor.model_input_names)


def test_each_placeholder_is_replaced_by_the_processors_own_text(tiny, monkeypatch):
    """Engines call the two replacing methods and find each replacement again in the prompt."""
    processor = tiny[1]
    replaced = []
    for name in ("replace_image_token", "replace_video_token"):
        original = getattr(processor, name)

        def record(*args, original=original, **kwargs):
            replaced.append(original(*args, **kwargs))
            return replaced[-1]

        monkeypatch.setattr(processor, name, record)
    inputs = processor(text="a <video> b <image>", videos=[make_video(3)], images=[make_image()])
    assert sorted(replaced) == ["<image>" * 4, ("<video>" * 4 + "\n") * 2]
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert all(replacement in text for replacement in replaced)


def test_an_engines_largest_video_is_accepted(tiny):
    """Profiling gives frames that are chosen already, with metadata that know no frame rate."""
    model, processor = tiny
    metadata = [
        VideoMetadata(total_num_frames=6, fps=None, frames_indices=list(range(6)), video_backend="engine")
    ]
    inputs = processor(
        text="<video>", videos=[make_video(6, size=(64, 48))], video_metadata=metadata, do_sample_frames=False,
        return_tensors="pt", return_mm_token_type_ids=True,
    )  # fmt: skip
    count = processor._get_num_multimodal_tokens(video_sizes=[(6, 64, 48)]).num_video_tokens[0]
    assert (inputs["input_ids"] == processor.video_token_id).sum() == count
    assert (torch.as_tensor(inputs["mm_token_type_ids"]) == 2).sum() == count
    del inputs["mm_token_type_ids"]
    with torch.no_grad():
        assert len(model(**inputs).video_hidden_states) == count


def test_metadata_come_back_when_asked(tiny, clip):
    inputs = tiny[1](text="<video>", videos=[str(clip)], return_metadata=True)
    (metadata,) = inputs["video_metadata"]
    assert metadata.total_num_frames == 20
    assert metadata.fps == pytest.approx(10)
    assert len(metadata.frames_indices) == 4


def test_layers_of_the_projector_are_of_the_kinds_that_engines_replace(tiny):
    leaves = {
        type(module) for module in tiny[0].model.temporal_projector.modules() if not list(module.children())
    }
    assert leaves <= {nn.Linear, nn.LayerNorm, nn.Conv1d, nn.GELU, nn.Identity, nn.ModuleList}


def test_a_pipeline_about_pictures(folder):
    pipe = pipeline("image-text-to-text", model=str(folder))
    picture = Image.fromarray(make_image(size=(40, 60)))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]}
    ]
    (answer,) = pipe(text=messages, max_new_tokens=3, return_full_text=False)
    assert isinstance(answer["generated_text"], str)


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="transformers' pipeline needs torchvision"
)
def test_a_pipeline_about_videos(folder, clip):
    pipe = pipeline("any-to-any", model=str(folder))
    messages = [
        {"role": "user", "content": [{"type": "video", "path": str(clip)}, {"type": "text", "text": "what?"}]}
    ]
    (answer,) = pipe(text=messages, max_new_tokens=3, return_full_text=False)
    assert isinstance(answer["generated_text"], str)


def test_torchvision_is_never_imported(folder):
    script = f"""
import sys
sys.modules["torchvision"] = None
import storm_vlm
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained({str(folder)!r})
AutoModelForImageTextToText.from_pretrained({str(folder)!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
