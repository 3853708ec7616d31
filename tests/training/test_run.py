"""Whole runs on a tiny model and real files: what is trained, what is written, what a resumed run comes to."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from storm_vlm.data import StormCollator, TrainingDataset
from storm_vlm.errors import DataError, ModelError, RecipeError
from storm_vlm.model.adapter import adapter_options, apply_adapter, keep_first_layers
from storm_vlm.model.compose import ComposeOptions
from storm_vlm.training import plan_training, train
from storm_vlm.training.model import make_model
from storm_vlm.training.parts import base_model, round_frozen_layers
from storm_vlm.training.run import _prepare
from tests.data.corpus import llava, write_json, write_questions
from tests.model.tiny import make_model as tiny_model


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def changed_parts(before, after):
    parts = ("vision_tower", "temporal_projector", "language_model")
    return {
        part
        for part in parts
        for name in before
        if part in name and not torch.equal(before[name], after[name])
    }


def log_of(recipe):
    state = json.loads((recipe.output.folder / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize(
    "rates",
    [
        {"temporal_projector": 1e-2, "language_model": None},
        {"temporal_projector": 1e-2, "language_model": 1e-3},
        {"temporal_projector": 1e-2, "language_model": 1e-3, "vision_tower": 1e-3},
    ],
    ids=["align", "projector and language model", "all"],
)
def test_only_parts_with_a_learning_rate_change(recipe, tiny_folder, rates):
    read = recipe(learning_rates=rates)
    result = train(read, use_cpu=True)
    assert result.num_steps == 4
    after = weights(read.output.folder / "model")
    assert changed_parts(weights(tiny_folder), after) == {part for part, rate in rates.items() if rate}


def test_learning_reduces_the_loss(recipe):
    read = recipe(schedule={"max_steps": 30, "num_epochs": 10, "batch_size": 4}, output={"save_steps": 100})
    train(read, use_cpu=True)
    losses = [entry["loss"] for entry in log_of(read)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_log_and_curve(recipe):
    read = recipe(output={"report_to": ["tensorboard"]})
    result = train(read, use_cpu=True)
    assert Image.open(result.curve).size == (960, 540)
    assert list(read.output.folder.rglob("events.out.tfevents*"))
    for entry in log_of(read):
        assert entry["samples_per_second"] > 0
        assert entry["tokens_per_second"] > entry["samples_per_second"]
        assert 0 <= entry["data_wait_share"] <= 1
        assert entry["peak_memory_bytes"] > 2**20
        assert entry["num_bad_samples"] == 0


def test_video_settings_are_saved(recipe):
    read = recipe(
        video={
            "num_frames": 6,
            "temporal_pool": 3,
            "spatial_pool": 4,
            "temporal_sample": 2,
            "frame_separator": "none",
        }
    )
    train(read, use_cpu=True)
    processor = AutoProcessor.from_pretrained(read.output.folder / "model")
    config = AutoModelForImageTextToText.from_pretrained(read.output.folder / "model").config
    assert (config.temporal_pool, config.spatial_pool, config.temporal_sample) == (3, 4, 2)
    video = processor.video_processor
    assert (video.num_frames, video.temporal_pool, video.spatial_pool, video.temporal_sample) == (6, 3, 4, 2)
    assert processor.image_processor.spatial_pool == 4
    assert processor.frame_separator == "none"
    assert config.projector_config.is_trained


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["all weights", "lora"])
def test_resumed_run_is_the_uninterrupted_run(recipe, lora):
    """Stopped in the middle of an epoch, with dropout, workers and accumulation: every bit is the same."""
    schedule = {"gradient_accumulation_steps": 2, "batch_size": 1, "max_steps": 6, "num_epochs": 2}
    options = {"schedule": schedule, "lora": lora and {**lora, "dropout": 0.1}}
    whole = recipe("whole", **options)
    train(whole, use_cpu=True)
    halfway = recipe("resumed", **options)
    (halfway.output.folder).mkdir()
    (whole.output.folder / "checkpoint-4").rename(halfway.output.folder / "checkpoint-4")
    other = recipe("resumed", **options, data={"num_workers": 2})
    train(other, use_cpu=True)
    want, got = weights(whole.output.folder / "model"), weights(halfway.output.folder / "model")
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    assert [entry["loss"] for entry in log_of(halfway)] == [entry["loss"] for entry in log_of(whole)]


def test_a_cut_checkpoint_is_passed_over(recipe):
    read = recipe()
    train(read, use_cpu=True)
    want = weights(read.output.folder / "model")
    (read.output.folder / "checkpoint-4" / "trainer_state.json").unlink()
    assert train(read, use_cpu=True).num_steps == 4
    for name, tensor in weights(read.output.folder / "model").items():
        assert torch.equal(tensor, want[name]), name


def test_another_recipe_does_not_go_on(recipe):
    train(recipe(), use_cpu=True)
    with pytest.raises(RecipeError, match=r"begun with another schedule\.seed"):
        train(recipe(schedule={"seed": 5}), use_cpu=True)
    with pytest.raises(RecipeError, match="has checkpoints"):
        train(recipe(), resume=False, use_cpu=True)


def test_an_output_folder_that_cannot_be_used(recipe):
    read = recipe()
    train(read, use_cpu=True)
    for content in ("", "3", "[1]"):
        (read.output.folder / "recipe.json").write_text(content)
        with pytest.raises(RecipeError, match=r"recipe\.json: is not what `storm train` wrote"):
            train(read, use_cpu=True)
    shutil.rmtree(read.output.folder)
    read.output.folder.touch()
    with pytest.raises(RecipeError, match=r"output\.folder: expected a folder, .* is a file"):
        train(read, use_cpu=True)


def test_bad_samples_stop_the_run_with_one_error(recipe, tmp_path):
    rows = [llava(str(i), "<video>\nq", "x", video=f"{i}.mp4") for i in range(20)]
    bad = write_json(tmp_path / "bad.json", rows)
    with pytest.raises(
        DataError, match=r"^\d bad samples are more than max_bad_samples=3; .*bad_samples-0\.jsonl$"
    ):
        train(recipe(data={"mixture": str(bad), "max_bad_samples": 3, "num_workers": 2}), use_cpu=True)


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["projector", "lora"])
def test_adapter_put_onto_the_base_is_the_merged_model(recipe, tiny_folder, lora):
    rates = {"temporal_projector": 1e-2, "language_model": 1e-2 if lora else None}
    read = recipe(
        learning_rates=rates,
        lora=lora,
        video={"temporal_sample": 2},
        output={"adapter": True, "merged": True},
    )
    result = train(read, use_cpu=True)
    model_folder, adapter_folder = read.output.folder / "model", read.output.folder / "adapter"
    assert set(result.folders) == {model_folder, adapter_folder}
    want = weights(model_folder)
    base = AutoModelForImageTextToText.from_pretrained(tiny_folder)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    processor = AutoProcessor.from_pretrained(tiny_folder)
    got = apply_adapter(base, processor, adapter_folder)
    expected = {"temporal_projector", "language_model"} if lora else {"temporal_projector"}
    assert changed_parts(before, want) == expected
    for name, tensor in got.state_dict().items():
        assert torch.equal(tensor, want[name]), name
    assert got.config.compression.temporal_sample == processor.video_processor.temporal_sample == 2
    assert got.config.projector_config.is_trained
    assert adapter_options(adapter_folder, ComposeOptions(seed=7)).temporal_pool == 2
    names = {file.name for file in adapter_folder.iterdir()} - {"storm_adapter.json"}
    assert names == (
        {"adapter_config.json", "adapter_model.safetensors"} if lora else {"temporal_projector.safetensors"}
    )
    assert not list(model_folder.glob("*.bin"))
    assert str(tiny_folder) not in "".join(file.read_text() for file in adapter_folder.glob("*.json"))
    size = sum(file.stat().st_size for file in adapter_folder.glob("*.safetensors"))
    assert size < sum(file.stat().st_size for file in model_folder.glob("*.safetensors"))


def test_lora_and_checkpointing_and_bf16(recipe):
    read = recipe(lora={"rank": 2}, schedule={"bf16": True, "gradient_checkpointing": True})
    result = train(read, use_cpu=True)
    assert result.final_loss < 10


def test_token_budget(recipe):
    read = recipe(data={"token_budget": 120}, schedule={"batch_size": None})
    assert train(read, use_cpu=True).num_steps == 4


def test_plan(recipe, tiny_folder):
    plan = plan_training(recipe(learning_rates={"temporal_projector": 1e-2, "language_model": None}))
    parts = {part.name: part for part in plan.parts}
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder)
    assert parts["temporal_projector"].num_trained == sum(
        p.numel() for p in model.temporal_projector.parameters()
    )
    assert parts["language_model"].num_trained == parts["vision_tower"].num_trained == 0
    assert sum(part.num_parameters for part in plan.parts) == sum(p.numel() for p in model.parameters())
    assert (plan.num_records, plan.num_steps, plan.num_batches) == (10, 4, 4)
    assert plan.tokens_per_step > plan.median_tokens_per_sample
    with_lora = plan_training(recipe(lora={"rank": 2}))
    linears = [
        module for name, module in model.language_model.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    want = sum(2 * (linear.in_features + linear.out_features) for linear in linears)
    assert {part.name: part.num_trained for part in with_lora.parts} == {
        "vision_tower": 0, "temporal_projector": parts["temporal_projector"].num_trained, "language_model": want,
    }  # fmt: skip


def train_one_layer(recipe, lora):
    first = recipe(
        "first",
        learning_rates={"temporal_projector": 1e-2, "language_model": 1e-2 if lora else None},
        lora=lora,
        model={"num_llm_layers": 1},
        output={"merged": True, "adapter": True},
    )
    train(first, use_cpu=True)
    return first.output.folder


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_an_adapter_goes_on_in_more_layers_with_a_higher_rank(recipe, lora):
    adapter = train_one_layer(recipe, lora) / "adapter"
    second = recipe(
        "second",
        learning_rates={"temporal_projector": 1e-3, "language_model": 1e-3},
        lora={"rank": 3, "alpha": 6} if lora else None,
        model={"adapter_from": str(adapter)},
    )
    model = base_model(_prepare(second, 1).model)
    saved = load_file(adapter / ("adapter_model.safetensors" if lora else "temporal_projector.safetensors"))
    projector = getattr(model.temporal_projector, "modules_to_save", {"default": model.temporal_projector})
    for name, tensor in projector["default"].state_dict().items():
        (found,) = [value for key, value in saved.items() if key.endswith(name)]
        assert torch.equal(found, tensor), name
    assert len(model.language_model.layers) == 2
    if lora:
        for layer, number in ((model.language_model.layers[0], 0), (model.language_model.layers[1], None)):
            up = layer.mlp.up_proj
            product = up.lora_B["default"].weight @ up.lora_A["default"].weight
            want = torch.zeros_like(product)
            if number is not None:
                name = f"layers.{number}.mlp.up_proj.lora_"
                (b,), (a,) = ([t for key, t in saved.items() if f"{name}{part}" in key] for part in "BA")
                want = b @ a
                assert want.any()
            torch.testing.assert_close(product, want)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (None, "has LoRA weights: the recipe needs lora"),
        ({"rank": 2, "alpha": 2}, r"lora\.alpha: expected 2 times the rank"),
        ({"rank": 1, "alpha": 2}, r"model\.adapter_from: .*lora_[AB].* does not fit the model"),
    ],
)
def test_lora_that_cannot_go_on(recipe, lora, message):
    adapter = train_one_layer(recipe, {"rank": 2, "alpha": 4}) / "adapter"
    second = recipe(
        "second",
        learning_rates={"temporal_projector": 1e-3, "language_model": 1e-3},
        lora=lora,
        model={"adapter_from": str(adapter)},
    )
    with pytest.raises(RecipeError, match=message):
        train(second, use_cpu=True)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_model_with_fewer_layers_is_saved_as_such(recipe, tiny_folder, lora):
    folder = train_one_layer(recipe, lora)
    merged = AutoModelForImageTextToText.from_pretrained(folder / "model")
    assert len(merged.language_model.layers) == merged.config.text_config.num_hidden_layers == 1
    base = AutoModelForImageTextToText.from_pretrained(tiny_folder)
    got = apply_adapter(base, AutoProcessor.from_pretrained(tiny_folder), folder / "adapter")
    want = merged.state_dict()
    assert got.state_dict().keys() == want.keys()
    for name, tensor in got.state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-6, atol=1e-7)


def test_an_adapter_for_a_model_without_a_list_of_layers():
    model, _ = tiny_model(llm="gpt2")
    keep_first_layers(model, 2)
    assert model.config.text_config.num_hidden_layers == 2
    with pytest.raises(ModelError, match="1 layers asked for, the language model has no list of layers"):
        keep_first_layers(model, 1)


def test_an_adapter_that_cannot_be_read(recipe):
    adapter = train_one_layer(recipe, {"rank": 2, "alpha": 4}) / "adapter"
    (adapter / "adapter_config.json").write_text("{")
    second = recipe("second", lora={"rank": 2, "alpha": 4}, model={"adapter_from": str(adapter)})
    with pytest.raises(RecipeError, match=r"model\.adapter_from: .* cannot be read"):
        train(second, use_cpu=True)


def test_only_as_many_layers_as_there_are(recipe, tmp_path):
    short = recipe(model={"num_llm_layers": 1})
    model, _ = make_model(short)
    assert len(model.language_model.layers) == model.config.text_config.num_hidden_layers == 1
    with pytest.raises(RecipeError, match=r"num_llm_layers: 3 layers asked for, the language model has 2"):
        make_model(recipe(model={"num_llm_layers": 3}))
    with pytest.raises(ModelError, match="projector of"):
        make_model(replace(short, model=replace(short.model, adapter_from=tmp_path)))


def test_conversations_side_by_side(recipe, corpus):
    mixture = str(write_questions(corpus.parent))
    read = recipe(data={"mixture": mixture, "conversations_per_example": 4}, lora={"rank": 2})
    assert plan_training(read).num_records == 5
    assert train(read, use_cpu=True).num_bad_samples == 0
    assert all(entry["tokens_per_second"] > 0 for entry in log_of(read))
    other = replace(
        recipe("other", data={"mixture": mixture, "conversations_per_example": 4}),
        model=replace(read.model, attn_implementation="flex_attention"),
    )
    with pytest.raises(RecipeError, match="needs sdpa or eager attention, not flex_attention"):
        train(other, use_cpu=True)


def test_frozen_layers_in_half_precision_change_nothing(recipe):
    """Autocast rounds them anyway: loss and gradients are the same bits."""
    parts = _prepare(recipe(lora={"rank": 2}), 1)
    batch = StormCollator(parts.processor)([TrainingDataset(parts.mixture, parts.processor)[0]])
    batch.pop("bad_samples")

    def step():
        parts.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = parts.model(**batch).loss
        loss.backward()
        return [loss, *(p.grad.clone() for p in parts.model.parameters() if p.grad is not None)]

    before = step()
    round_frozen_layers(parts.model)
    layer = base_model(parts.model).language_model.layers[0].mlp.up_proj
    assert layer.get_base_layer().weight.dtype == torch.bfloat16
    assert all(map(torch.equal, step(), before))
    assert len(before) > 10


def assert_projector_of(model, adapter):
    saved = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in model.temporal_projector.state_dict().items():
        assert torch.equal(tensor, saved[f"base_model.model.model.temporal_projector.{name}"]), name


def test_a_projector_alone(recipe):
    adapter = train_one_layer(recipe, {"rank": 2, "alpha": 4}) / "adapter"
    second = recipe("second", model={"projector_from": str(adapter)})
    assert_projector_of(make_model(second)[0], adapter)
    assert not any("lora" in name for name, _ in _prepare(second, 1).model.named_parameters())


def test_an_adapter_with_the_projector_of_another(recipe):
    lora = {"rank": 2, "alpha": 4}
    first = train_one_layer(recipe, lora) / "adapter"
    options = {"lora": lora, "model": {"adapter_from": str(first), "num_llm_layers": 1}}
    rates = {"temporal_projector": 1e-3, "language_model": 1e-3}
    read = recipe("second", learning_rates=rates, **options)
    train(read, use_cpu=True)
    second = read.output.folder / "adapter"
    options["model"]["projector_from"] = str(second)
    third = recipe("third", learning_rates={"language_model": 1e-3}, **options)
    assert_projector_of(make_model(third)[0], second)
    got = get_peft_model_state_dict(_prepare(third, 1).model)
    saved = load_file(first / "adapter_model.safetensors")
    names = [name for name in saved if "lora_" in name]
    assert names
    for name in names:
        assert torch.equal(got[name], saved[name]), name


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["projector", "lora"])
def test_an_adapter_in_half_precision(recipe, tiny_folder, lora):
    read = recipe(
        learning_rates={"temporal_projector": 1e-2, "language_model": 1e-2 if lora else None},
        lora=lora,
        output={"adapter": True, "adapter_dtype": "float16"},
    )
    train(read, use_cpu=True)
    (file,) = (read.output.folder / "adapter").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    base = AutoModelForImageTextToText.from_pretrained(tiny_folder)
    got = apply_adapter(base, AutoProcessor.from_pretrained(tiny_folder), read.output.folder / "adapter")
    for name, tensor in weights(read.output.folder / "model").items():
        found = got.state_dict()[name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, tensor, rtol=0 if lora else 1e-3, atol=0 if lora else 1e-6)
