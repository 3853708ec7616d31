"""Models of the paper's shape, made without memory where that is enough."""

import pytest
import torch

from storm_vlm.errors import BudgetError, StormError
from storm_vlm.profiling import paper_shape, shapes
from storm_vlm.profiling.shapes import _configs, _make_parts


@pytest.mark.parametrize(
    ("divisor", "vision", "text"),
    [
        (1, (1152, 4304, 16), (3584, 18944, 28, 4)),
        (2, (576, 2152, 8), (1792, 9472, 14, 2)),
        (4, (288, 1076, 4), (896, 4736, 7, 1)),
        (8, (144, 538, 2), (448, 2368, 4, 1)),
    ],
)
def test_widths(divisor, vision, text):
    tower, language_model = _configs(divisor)
    assert (tower.hidden_size, tower.intermediate_size, tower.num_attention_heads) == vision
    found = (language_model.hidden_size, language_model.intermediate_size, language_model.num_attention_heads)
    assert (*found, language_model.num_key_value_heads) == text
    assert [config.num_hidden_layers for config in (tower, language_model)] == [27, 28]
    assert (tower.image_size, tower.patch_size) == (448, 14)
    assert language_model.hidden_size % language_model.num_attention_heads == 0


def test_the_paper_has_its_parameters():
    """Qwen2-7B has 7.6 billion weights, SigLIP so400m 0.4 billion."""
    tower, language_model = _make_parts(*_configs(1), torch.device("meta"), torch.bfloat16)
    assert sum(weight.numel() for weight in language_model.parameters()) == 7_615_616_512
    assert 0.41e9 < sum(weight.numel() for weight in tower.parameters()) < 0.42e9
    assert next(tower.parameters()).dtype == torch.bfloat16


def test_unknown_width():
    with pytest.raises(StormError, match="paper shape '1/3' is unknown: choose a width of 1, 1/2, 1/4, 1/8"):
        paper_shape("1/3", device="cpu")


def test_weights_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(shapes, "free_bytes_on", lambda device: 2**30)
    with pytest.raises(BudgetError, match=r"take 15.0 GiB and 1.0 GiB are free"):
        paper_shape("1", device="cpu", dtype="bfloat16")


@pytest.mark.slow
def test_a_narrow_one_runs():
    model, processor = paper_shape("1/8", device="cpu", dtype="float32")
    inputs = processor(text="<image> What?", images=torch.zeros(3, 448, 448), return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 256
    assert model(**inputs).logits.shape[-1] == 152064
