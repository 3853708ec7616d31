"""Recipes: every committed one is read, flags override, and each mistake is named."""

from pathlib import Path

import pytest
import yaml

from storm_vlm.errors import RecipeError
from storm_vlm.training import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
STAGES = sorted(path for path in RECIPES.glob("*.yaml") if not path.stem.endswith("mixture"))


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_committed_recipes_are_read(path):
    read = read_recipe(path)
    assert read.data.mixture.parent.is_relative_to(RECIPES)


def test_the_papers_stages():
    """What PAPER's table of stages says: trained parts, frames, pooling."""
    align, sft, long = (read_recipe(RECIPES / f"{name}.yaml") for name in ("align", "sft", "long"))
    assert align.learning_rates.vision_tower is align.learning_rates.language_model is None
    assert align.learning_rates.temporal_projector is not None
    for stage, num_frames in ((sft, 32), (long, 128)):
        rates = stage.learning_rates
        assert None not in (rates.vision_tower, rates.temporal_projector, rates.language_model)
        assert (stage.video.num_frames, stage.video.temporal_pool) == (num_frames, 4)
    assert long.video.temporal_sample == 2


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_accepts_its_files(path):
    from accelerate.commands.config import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]


def test_overrides(write_recipe, tmp_path):
    read = read_recipe(
        write_recipe(),
        ["schedule.max_steps=9", "learning_rates.vision_tower=1e-6", "lora.rank=3", "data.mixture=other.json",
         "output.report_to=[trackio]", "learning_rates.temporal_projector=null"],
    )  # fmt: skip
    assert read.schedule.max_steps == 9
    assert read.learning_rates.vision_tower == 1e-6
    assert read.learning_rates.temporal_projector is None
    assert read.lora.rank == 3
    assert read.data.mixture == Path("other.json")
    assert read.output.report_to == ("trackio",)


def test_a_mixture_is_relative_to_its_recipe(write_recipe, tmp_path):
    assert read_recipe(write_recipe(data={"mixture": "mix.yaml"})).data.mixture == tmp_path / "mix.yaml"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"schedule": {"max_stepz": 3}}, r"run\.yaml: unknown setting schedule\.max_stepz, known: num_epochs"),
        ({"sched": {}}, r"unknown setting sched,"),
        ({"schedule": {"max_steps": "many"}}, r"schedule\.max_steps: .*'many'"),
        ({"schedule": {"max_steps": 0}}, r"schedule\.max_steps: expected a number above 0"),
        ({"schedule": {"bf16": 1}}, r"schedule\.bf16"),
        ({"schedule": {"batch_size": None}}, r"schedule\.batch_size"),
        ({"schedule": 3}, r"schedule: expected settings"),
        ({"learning_rates": {"temporal_projector": "fast"}}, r"learning_rates\.temporal_projector: .*'fast'"),
        ({"learning_rates": {"temporal_projector": None, "language_model": None}}, r"learning_rates: .*at least one"),
        ({"learning_rates": {"language_model": None}, "lora": {}}, r"learning_rates\.language_model"),
        ({"output": {"adapter": True}}, r"output\.adapter"),
        ({"output": {"report_to": "tensorboard"}}, r"output\.report_to: expected a list"),
        ({"video": {"frame_separator": "tab"}}, r"video\.frame_separator: .*'tab'"),
        ({"model": {"vision": "x"}}, r"model\.llm"),
        ({"model": {"projector": {}, "llm": "x", "vision": "y"}}, r"model\.path"),
        ({"data": {"max_bad_samples": -1}}, r"data\.max_bad_samples"),
    ],
)  # fmt: skip
def test_mistakes_are_named(write_recipe, groups, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(write_recipe(**groups))


def test_a_missing_setting_is_named(write_recipe, tmp_path):
    content = yaml.safe_load(write_recipe().read_text())
    del content["data"]["mixture"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=r"data\.mixture: this setting is needed"):
        read_recipe(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [("max_steps", "expected key=value"), ("schedule.x=1", r"unknown setting schedule\.x"), ("data.mixture.x=1", "no settings of its own")],
)  # fmt: skip
def test_wrong_overrides(write_recipe, override, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(write_recipe(), [override])


@pytest.mark.parametrize("text", ["[", "3"])
def test_wrong_files(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml: "):
        read_recipe(tmp_path / "r.yaml")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read: No such file or directory$"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match=rf"{tmp_path.name}: cannot be read: Is a directory$"):
        read_recipe(tmp_path)
