"""Composing: from saved folders of every kind, and one clear line for what cannot be composed."""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from storm_vlm.errors import ModelError
from storm_vlm.model import ComposeOptions, compose, compose_model
from storm_vlm.model.compose import load_vision_tower
from tests.model.tiny import (
    VISION_FAMILIES,
    ask,
    byte_tokenizer,
    causal_lm,
    encode,
    make_image,
    make_model,
    make_video,
    vision_tower,
)
from tests.numerics import assert_matches

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 99,
}
MEAN, STD = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A language model's folder, as it lies on a hub: no padding token, no chat template."""
    folder = tmp_path_factory.mktemp("llm")
    causal_lm("llama").save_pretrained(folder)
    byte_tokenizer(chat_template=None).save_pretrained(folder)
    return folder


def save_vision(folder, kind):
    """Saves an encoder as its authors publish it, with the text tower that CLIP and SigLIP come with."""
    if kind in ("siglip", "clip"):
        config_class, model_class = {"siglip": (SiglipConfig, SiglipModel), "clip": (CLIPConfig, CLIPModel)}[
            kind
        ]
        vision = (
            {**VISION_FAMILIES[kind][1], "vision_use_head": True}
            if kind == "siglip"
            else VISION_FAMILIES[kind][1]
        )
        model = model_class(config_class(text_config=TEXT, vision_config=vision))
    else:
        model = vision_tower(kind).model
    model.save_pretrained(folder)
    size = {"shortest_edge": 36} if kind == "clip" else {"height": 32, "width": 32}
    crop = {"crop_size": {"height": 32, "width": 32}} if kind == "clip" else {}
    processor_class = CLIPImageProcessorPil if kind == "clip" else SiglipImageProcessorPil
    processor_class(size=size, image_mean=MEAN, image_std=STD, **crop).save_pretrained(folder)
    return model


def assert_nothing_is_left(folder):
    assert not [path.name for path in folder.iterdir() if path.name not in ("vision", "llm")]


@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2", "efficientnet_lite"])
def test_from_folders(tmp_path, llm, kind):
    original = save_vision(tmp_path / "vision", kind)
    out = compose(tmp_path / "vision", llm, tmp_path / "out", options=ComposeOptions(temporal_pool=2))
    model, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert processor.image_processor.size == {"height": 32, "width": 32}
    assert list(processor.video_processor.image_mean) == MEAN
    assert list(processor.image_processor.image_std) == STD
    assert processor.tokenizer.pad_token == "</s>"
    pixels = torch.randn(1, 3, 32, 32)
    tower = getattr(original, "vision_model", original).eval()
    with torch.no_grad():
        want = tower(pixel_values=pixels).last_hidden_state
        assert_matches("encoder", model.vision_tower(pixel_values=pixels).last_hidden_state, want)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        want = LlamaForCausalLM.from_pretrained(llm)(input_ids=ids).logits
        assert_matches("language model", model(input_ids=ids).logits, want)
    inputs = encode(processor, [ask(make_video(3), make_image(), "what?"), ask("text")])
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[0] == 2
    assert "text_model" not in dict(model.named_modules())


def test_another_frame_size(tmp_path, llm):
    save_vision(tmp_path / "vision", "siglip")
    out = compose(tmp_path / "vision", llm, tmp_path / "out", image_size=(48, 64))
    model, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    inputs = encode(processor, [ask(make_video(3), "what?")])
    assert inputs["video_grid_thw"].tolist() == [[3, 6, 8]]
    with torch.no_grad():
        assert len(model(**inputs).video_hidden_states) == 3 * 3 * 4


def test_an_output_that_exists_is_left_alone(tmp_path, llm):
    save_vision(tmp_path / "vision", "siglip")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="already exists"):
        compose(tmp_path / "vision", llm, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    compose(tmp_path / "vision", llm, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "mine.txt").exists()


@pytest.mark.parametrize("broken", ["vision", "llm"])
@pytest.mark.parametrize("how", ["unknown id", "missing folder", "empty folder", "no json", "no weights"])
def test_parts_that_cannot_be_loaded(tmp_path, llm, broken, how):
    save_vision(tmp_path / "vision", "siglip")
    parts = {"vision": tmp_path / "vision", "llm": llm}
    bad = tmp_path / "llm"
    if how == "unknown id":
        bad = "nobody/no-such-model"
    elif how != "missing folder":
        bad.mkdir()
    if how == "no json":
        (bad / "config.json").write_text("{")
    if how == "no weights":
        (bad / "config.json").write_text((parts[broken] / "config.json").read_text())
    with pytest.raises(ModelError) as error:
        compose(**parts | {broken: bad}, out=tmp_path / "out")
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)
    assert_nothing_is_left(tmp_path)


def test_a_part_in_the_others_place(tmp_path, llm):
    save_vision(tmp_path / "vision", "dinov2")
    with pytest.raises(ModelError) as error:
        compose(tmp_path / "vision", tmp_path / "vision", tmp_path / "out")
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError) as error:
        compose(llm, llm, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert_nothing_is_left(tmp_path)


def test_choices_that_do_not_fit_are_one_line_and_leave_nothing(tmp_path, llm):
    save_vision(tmp_path / "vision", "siglip")
    for options, message in (
        (ComposeOptions(spatial_pool=9), "spatial_pool=9"),
        (ComposeOptions(projector={"downsample": 3}), "downsample"),
        (ComposeOptions(projector={"d_stat": 3}), "d_stat"),
        (ComposeOptions(frame_separator="dash"), "frame_separator"),
        (ComposeOptions(vision_feature_layer=-9), "vision_feature_layer"),
    ):
        with pytest.raises(ModelError, match=message) as error:
            compose(tmp_path / "vision", llm, tmp_path / "out", options=options)
        assert "\n" not in str(error.value)
        assert_nothing_is_left(tmp_path)


class CappedLlama(LlamaForCausalLM):
    """A language model whose scores are more than a linear function of its last hidden state."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.tanh() * 0.1
        return output


def test_a_head_that_is_not_linear_is_refused():
    language_model = CappedLlama(causal_lm("llama").config).eval()
    with pytest.raises(
        ModelError, match="CappedLlama cannot be composed: its head is not a plain linear layer"
    ):
        compose_model(vision_tower(), language_model, byte_tokenizer(), ComposeOptions())


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_scaled_scores_survive_saving(tmp_path, family):
    language_model = causal_lm(family)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        want = language_model(input_ids=ids).logits
        model, _ = compose_model(vision_tower(), language_model, byte_tokenizer(), ComposeOptions())
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert_matches(family, loaded(input_ids=ids).logits, want)


@pytest.mark.parametrize(("vocab_size", "rows"), [(300, 300), (261, 261), (259, 261)])
def test_rows_are_added_only_where_there_are_none_to_spare(vocab_size, rows):
    """The tokenizer has 259 tokens and gets two placeholders."""
    language_model = causal_lm("llama", vocab_size=vocab_size)
    before = language_model.get_input_embeddings().weight.detach().clone()
    model, processor = compose_model(vision_tower(), language_model, byte_tokenizer(), ComposeOptions())
    assert len(processor.tokenizer) == 261
    assert model.get_input_embeddings().weight.shape[0] == rows == model.config.text_config.vocab_size
    assert model.lm_head.weight.shape[0] == rows
    assert torch.equal(model.get_input_embeddings().weight[:259], before[:259])


def test_an_identity_at_the_start():
    model, processor = make_model(projector={"zero_init_residual": True, "num_mamba_layers": 2})
    baseline, _ = make_model(projector={"num_mamba_layers": 0})
    inputs = encode(processor, [ask(make_video(4), "what?")])
    with torch.no_grad():
        assert not model.model.temporal_projector.layers[0].mixer.out_proj.weight.any()
        baseline.model.temporal_projector.input_projection.load_state_dict(
            model.model.temporal_projector.input_projection.state_dict()
        )
        assert_matches("logits", model(**inputs).logits, baseline(**inputs).logits)


def test_the_projector_depends_on_the_seed_alone():
    states = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        model = make_model(seed=seed)[0]
        states.append(model.model.temporal_projector.input_projection.weight)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_layer_before_the_last():
    model, processor = make_model("clip", vision_feature_layer=-2)
    inputs = encode(processor, [ask(make_video(2), "what?")])
    with torch.no_grad():
        got = model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"]
        ).last_hidden_state
        states = model.vision_tower(inputs["pixel_values_videos"], output_hidden_states=True).hidden_states
    assert_matches("features", got.flatten(1, 2), states[-2][:, 1:])


def test_the_parts_keep_their_precision():
    language_model = causal_lm("llama").to(torch.bfloat16)
    model, processor = compose_model(vision_tower(), language_model, byte_tokenizer(), ComposeOptions())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    inputs = encode(processor, [ask(make_video(2), "what?")])
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_a_folder_that_has_no_preprocessing(tmp_path, llm):
    vision_tower("dinov2").model.save_pretrained(tmp_path / "vision")
    with pytest.raises(ModelError, match="vision") as error:
        load_vision_tower(tmp_path / "vision")
    assert "\n" not in str(error.value)


def test_composing_twice_gives_the_same_weights():
    """Also where the vocabulary has no room for the placeholders: an adapter fits every composition."""
    from tests.model.tiny import byte_tokenizer, causal_lm, vision_tower

    models = []
    for seed in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tower, language_model = vision_tower(), causal_lm(vocab_size=260)
            torch.manual_seed(seed)
            models.append(compose_model(tower, language_model, byte_tokenizer(), ComposeOptions())[0])
    first, second = (model.state_dict() for model in models)
    assert models[0].get_input_embeddings().weight.shape[0] > 260
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
