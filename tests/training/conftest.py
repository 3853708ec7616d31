"""A tiny saved model, a corpus of real files, and recipes for both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from storm_vlm.model.compose import save_model
from storm_vlm.training import Recipe, read_recipe
from tests.data.corpus import write_corpus
from tests.model.tiny import make_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.random.fork_rng():
        save_model(*make_model(temporal_pool=2, num_frames=4), folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def write_recipe(tiny_folder, corpus, tmp_path) -> Callable[..., Path]:
    """Writes a recipe for four steps over the corpus; options replace or add settings of its groups."""

    def write(name: str = "run", **groups: Any) -> Path:
        content: dict[str, Any] = {
            "model": {"path": str(tiny_folder)},
            "data": {"mixture": str(corpus), "num_workers": 0},
            "video": {"num_frames": 4, "temporal_pool": 2},
            "learning_rates": {"temporal_projector": 1e-2, "language_model": 1e-3},
            "schedule": {"batch_size": 2, "num_epochs": 2, "max_steps": 4, "warmup_ratio": 0.0},
            "output": {"folder": str(tmp_path / name), "logging_steps": 1, "save_steps": 2, "report_to": []},
        }
        for group, settings in groups.items():
            content[group] = (
                settings if not isinstance(settings, dict) else {**content.get(group, {}), **settings}
            )
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def recipe(write_recipe) -> Callable[..., Recipe]:
    def read(name: str = "run", **groups: Any) -> Recipe:
        return read_recipe(write_recipe(name, **groups))

    return read
