"""Model folders that are not whole: one line each."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from storm_vlm.errors import ModelError
from storm_vlm.pipeline.loading import load_model


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.temporal_projector.layers.0.mixer.in_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_a_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.temporal_projector.layers.0.mixer.in_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_the_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def break_the_config(folder):
    (folder / "config.json").write_text("{")


def want_no_layers(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_mamba_layers": 1', '"num_mamba_layers": "x"'))


def drop_the_processor(folder):
    for path in folder.glob("*processor*"):
        path.unlink()


def drop_the_tokenizer(folder):
    for path in folder.glob("token*"):
        path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        drop_a_weight, change_a_shape, cut_the_weights, break_the_config, want_no_layers, drop_the_processor,
        drop_the_tokenizer,
    ],
)  # fmt: skip
def test_damaged_folder_is_one_error(folder, damage):
    load_model(folder, dtype="float32")
    damage(folder)
    with pytest.raises(ModelError) as error:
        load_model(folder, dtype="float32")
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
