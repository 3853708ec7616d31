"""The grid of settings: what is refused before any work, and what counts as too little memory."""

import pytest
import torch

from storm_vlm.errors import StormError
from storm_vlm.profiling import ProfileSettings, parse_compression, profile
from storm_vlm.profiling.run import _is_out_of_memory


def test_a_compression_that_cannot_be_is_refused_before_any_work(video_qa, clip):
    """The model has 2x2 tokens a frame, which blocks of 3x3 do not divide."""
    settings = ProfileSettings((4,), (parse_compression("none"), parse_compression("S.pool9")))
    calls = []
    with pytest.raises(StormError, match="spatial_pool=9"):
        profile(video_qa, clip, settings, model_name="tiny", report_progress=lambda *call: calls.append(call))
    assert calls == []


def test_progress(video_qa, clip):
    """Two settings, one of which is skipped, of one request to warm up and two that are timed."""
    settings = ProfileSettings((60, 4), (parse_compression("none"),), num_repeats=2, num_new_tokens=1)
    calls, skipped = [], []
    report = profile(
        video_qa,
        clip,
        settings,
        model_name="tiny",
        video_name="a clip",
        report_progress=lambda *call: calls.append(call),
        report_skipped=skipped.append,
    )
    assert calls == [("requests", 4, 6), ("requests", 5, 6), ("requests", 6, 6)]
    assert report.skipped == skipped
    assert len(report.measurements) == len(skipped) == 1
    assert report.facts["video"]["name"] == "a clip"
    assert report.facts["settings"]["compressions"] == ["none"]


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert _is_out_of_memory(caught.value)
    assert _is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not _is_out_of_memory(RuntimeError("shapes do not fit"))
