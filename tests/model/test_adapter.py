"""The name of a model that is composed with an adapter."""

from pathlib import Path

from storm_vlm.model.adapter import adapter_hash


def test_weights_and_settings_name_an_adapter_and_its_card_does_not(tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "storm_adapter.json", "README.md"):
        (tmp_path / name).write_text("one", encoding="utf-8")
    first = adapter_hash(tmp_path)
    (tmp_path / "README.md").write_text("two", encoding="utf-8")
    assert adapter_hash(tmp_path) == first
    for name in ("adapter_model.safetensors", "storm_adapter.json"):
        (tmp_path / name).write_text("two", encoding="utf-8")
        assert adapter_hash(tmp_path) != first
        first = adapter_hash(tmp_path)
