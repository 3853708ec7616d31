"""Compressions under the paper's names, and settings that make no sense."""

import pytest

from storm_vlm.errors import StormError
from storm_vlm.model import TokenCompression
from storm_vlm.profiling import ProfileSettings, compression_name, parse_compression
from storm_vlm.profiling.settings import compression_factor


@pytest.mark.parametrize(
    ("text", "steps", "name", "factor"),
    [
        ("none", (1, 1, 1), "none", 1),
        ("1", (1, 1, 1), "none", 1),
        ("2", (1, 1, 2), "T.sample2", 2),
        ("4", (4, 1, 1), "T.pool4", 4),
        ("8", (4, 1, 2), "T.pool4+T.sample2", 8),
        ("16", (4, 4, 1), "T.pool4+S.pool4", 16),
        ("32", (4, 4, 2), "T.pool4+S.pool4+T.sample2", 32),
        ("T.pool", (4, 1, 1), "T.pool4", 4),
        ("s.pool9", (1, 9, 1), "S.pool9", 9),
        ("T.sample+S.pool", (1, 4, 2), "S.pool4+T.sample2", 8),
        ("T.pool8+T.sample3", (8, 1, 3), "T.pool8+T.sample3", 24),
    ],
)
def test_names(text, steps, name, factor):
    compression = parse_compression(text)
    assert compression == TokenCompression(*steps)
    assert compression_name(compression) == name
    assert parse_compression(name) == compression
    assert compression_factor(compression) == factor


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "'3' is unknown"),
        ("", "'' is unknown"),
        ("S.sample", "'S.sample' is unknown"),
        ("T.pool+", "is unknown"),
        ("T.pool+t.pool8", "has t.pool twice"),
        ("S.pool3", "perfect square"),
        ("T.sample0", "temporal_sample must be a positive integer"),
    ],
)
def test_what_is_no_compression(text, message):
    with pytest.raises(StormError, match=message):
        parse_compression(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": ()}, "num_frames must not be empty"),
        ({"num_frames": (8, 0)}, "num_frames must be at least 1, got 0"),
        ({"compressions": ()}, "compressions must not be empty"),
        ({"num_repeats": 0}, "num_repeats must be at least 1"),
        ({"num_warm_ups": 0}, "num_warm_ups must be at least 1"),
        ({"num_new_tokens": 0}, "num_new_tokens must be at least 1"),
    ],
)
def test_settings_are_checked(changes, message):
    usual = {"num_frames": (8,), "compressions": (TokenCompression(),)}
    with pytest.raises(StormError, match=message):
        ProfileSettings(**usual | changes)
