"""Loading and saving as a stranger does it: Auto classes, precision, attention, devices, initial values."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from storm_vlm.model import (
    StormConfig,
    StormForConditionalGeneration,
    StormImageProcessor,
    StormModel,
    StormProcessor,
    StormVideoProcessor,
)
from tests.model.tiny import ask, encode, make_image, make_model, make_video
from tests.numerics import assert_matches, errors

# Relative root mean square error of a whole model's scores against float32: four times what was measured.
MODEL_LIMITS = {torch.float64: 2.5e-6, torch.float32: 2.5e-6, torch.float16: 8e-3, torch.bfloat16: 6.5e-2}
CONVERSATIONS = [ask(make_video(5, 1), make_image(2), "what?"), ask("text"), ask(make_video(2, 3), "why?")]


@pytest.fixture(scope="module")
def tiny():
    return make_model(temporal_pool=2, projector={"num_mamba_layers": 2})


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    for part in tiny:
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def inputs(tiny):
    return encode(tiny[1], CONVERSATIONS)


def logits(model, inputs):
    """Scores of what is no padding."""
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def test_auto_classes(folder, tiny, inputs):
    assert isinstance(AutoConfig.from_pretrained(folder), StormConfig)
    assert isinstance(AutoProcessor.from_pretrained(folder), StormProcessor)
    assert isinstance(AutoImageProcessor.from_pretrained(folder), StormImageProcessor)
    assert isinstance(AutoVideoProcessor.from_pretrained(folder), StormVideoProcessor)
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto_class.from_pretrained(folder)
        assert isinstance(model, StormForConditionalGeneration)
        assert not model.training
        assert_matches("logits", logits(model, inputs), logits(tiny[0], inputs))
    base = AutoModel.from_pretrained(folder)
    assert isinstance(base, StormModel)
    with torch.no_grad():
        got = base(**inputs).last_hidden_state
        want = tiny[0].model(**inputs).last_hidden_state
    assert_matches("hidden states", got, want)


def test_the_config_round_trips(folder, tiny):
    config = tiny[0].config
    loaded = AutoConfig.from_pretrained(folder)
    saved_with_weights = {"architectures", "_name_or_path"}
    for name, value in config.to_dict().items():
        assert name in saved_with_weights or loaded.to_dict()[name] == value, name
    assert type(loaded.vision_config) is type(config.vision_config)
    assert type(loaded.text_config) is type(config.text_config)
    assert loaded.get_text_config() is loaded.text_config
    assert StormConfig(**config.to_dict()).to_dict() == config.to_dict()
    difference = json.loads(config.to_json_string(use_diff=True))
    assert StormConfig.from_dict(difference).to_dict() == config.to_dict()


def test_the_default_config_is_the_papers_model():
    config = StormConfig()
    assert config.vision_config.model_type == "siglip_vision_model"
    assert config.text_config.model_type == "qwen2"
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert 7e9 < sum(parameter.numel() for parameter in model.parameters()) < 9e9


@pytest.mark.parametrize("llm", ["qwen3", "llama"], ids=["tied", "untied"])
def test_saved_in_shards(llm, tmp_path):
    model, processor = make_model("clip", llm)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    is_tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert is_tied == (llm == "qwen3") == loaded.config.tie_word_embeddings
    inputs = encode(processor, CONVERSATIONS)
    assert_matches("logits", logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("llm", ["qwen3", "llama", "phi"])
def test_another_size_of_the_vocabulary(llm, tmp_path):
    model, processor = make_model("siglip", llm)
    inputs = encode(processor, CONVERSATIONS)
    want = logits(model, inputs)
    processor.tokenizer.add_tokens(["<click>", "<drag>"])
    size = max(len(processor.tokenizer), 307)
    model.resize_token_embeddings(size)
    assert model.config.text_config.vocab_size == size
    assert torch.equal(logits(model, inputs)[:, :300], want)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert torch.isfinite(loss)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.shape[0] == size
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (llm == "qwen3")
    assert_matches("logits", logits(loaded, inputs)[:, :300], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_precision(folder, tiny, inputs, dtype):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    got = logits(model, inputs)
    assert got.dtype == dtype
    assert errors(got, logits(tiny[0], inputs))[0] < MODEL_LIMITS[dtype]
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 3


def test_precision_is_kept_in_files(folder, tmp_path):
    AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_reaches_both_backbones(folder, tiny, inputs, attention):
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention)
    assert model.vision_tower.config._attn_implementation == attention
    assert model.language_model.config._attn_implementation == attention
    assert_matches("logits", logits(model, inputs), logits(tiny[0], inputs))


def test_attention_for_each_backbone(folder):
    attention = {"vision_config": "eager", "text_config": "sdpa"}
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention)
    assert model.vision_tower.config._attn_implementation == "eager"
    assert model.language_model.config._attn_implementation == "sdpa"


def test_devices_are_chosen(folder, tiny, inputs):
    model = AutoModelForImageTextToText.from_pretrained(folder, device_map="auto")
    assert_matches("logits", logits(model, inputs), logits(tiny[0], inputs))
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 3


def test_layers_are_never_split_over_devices(folder):
    from accelerate import infer_auto_device_map

    model = AutoModelForImageTextToText.from_pretrained(folder)
    whole = set(model._no_split_modules)
    assert {"TemporalLayer", "Qwen3DecoderLayer", "SiglipEncoderLayer"} <= whole
    device_map = infer_auto_device_map(
        model, max_memory={0: "150KB", "cpu": "1GB"}, no_split_module_classes=list(whole)
    )
    assert set(device_map.values()) == {0, "cpu"}
    for name, module in model.named_modules():
        if type(module).__name__ in whole:
            assert not [key for key in device_map if key.startswith(f"{name}.")], name


def test_a_model_in_pieces_on_disk(folder, tiny, inputs, tmp_path):
    """Weights that fit no device are read from disk when they are used."""
    device_map = {"model.vision_tower": "disk", "model.temporal_projector": "cpu",
                  "model.language_model": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert_matches("logits", logits(model, inputs), logits(tiny[0], inputs))


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
def test_no_memory_is_touched_on_the_meta_device(tiny, auto_class):
    with torch.device("meta"):
        model = auto_class.from_config(tiny[0].config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_new_weights_depend_on_the_seed(tiny):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(AutoModelForImageTextToText.from_config(tiny[0].config).state_dict())
    first, second, third = states
    for name, value in first.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, second[name]), name
    assert not torch.equal(
        first["model.temporal_projector.layers.0.mixer.in_proj.weight"],
        third["model.temporal_projector.layers.0.mixer.in_proj.weight"],
    )


def assert_initial_recurrence(mixer):
    states = torch.arange(1.0, 17.0).log()
    for suffix in ("", "_b"):
        assert torch.allclose(getattr(mixer, f"A{suffix}_log"), states.expand(64, 16))
        assert torch.equal(getattr(mixer, f"D{suffix}"), torch.ones(64))
        delta = torch.nn.functional.softplus(getattr(mixer, f"dt_proj{suffix}").bias)
        assert (delta > 0.9e-3).all()
        assert (delta < 1.1e-1).all()
        assert delta.unique().numel() > 32


def test_the_recurrence_begins_where_mamba_begins(tiny):
    model = AutoModelForImageTextToText.from_config(tiny[0].config)
    for layer in model.model.temporal_projector.layers:
        assert_initial_recurrence(layer.mixer)


def test_a_projector_that_a_checkpoint_lacks_is_initialised(tiny, tmp_path):
    model = tiny[0]
    state = {name: value for name, value in model.state_dict().items() if "temporal_projector" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    assert all("temporal_projector" in name for name in info["missing_keys"])
    for layer in loaded.model.temporal_projector.layers:
        assert_initial_recurrence(layer.mixer)
    for name, parameter in loaded.named_parameters():
        assert torch.isfinite(parameter).all(), name
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("from_file", [False, True])
def test_an_identity_at_the_start_stays_one(tiny, tmp_path, from_file):
    config = StormConfig.from_dict(tiny[0].config.to_dict())
    config.projector_config.zero_init_residual = True
    model = AutoModelForImageTextToText.from_config(config)
    if from_file:
        state = {
            name: value for name, value in model.state_dict().items() if "temporal_projector" not in name
        }
        model.save_pretrained(tmp_path, state_dict=state)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    projector = model.model.temporal_projector
    features = torch.randn(3, 4, 4, 24)
    assert torch.equal(projector([features])[0], projector.project(features))


def test_an_older_fields_absence_or_a_typo_does_not_pass_in_silence():
    with pytest.raises(Exception, match="downsample"):
        StormConfig(projector_config={"downsample": 5})
    with pytest.raises(Exception, match="temporal_pool"):
        StormConfig(temporal_pool=0)
