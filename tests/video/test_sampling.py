"""Which times are chosen."""

import math

import pytest

from storm_vlm.errors import VideoError
from storm_vlm.video import open_video, read_video
from tests.video.clips import read_numbers


def test_num_frames_are_midpoints_of_equal_segments(clip):
    with open_video(clip) as reader:
        assert reader.plan(num_frames=4) == pytest.approx((0.25, 0.75, 1.25, 1.75))
        assert reader.plan(num_frames=1) == pytest.approx((1.0,))


def test_fps_steps_from_the_start_of_the_window(clip):
    with open_video(clip, start_seconds=0.5, end_seconds=1.75) as reader:
        assert reader.plan(fps=2) == pytest.approx((0.5, 1.0, 1.5))
        assert reader.plan(fps=0.1) == (0.5,)


def test_fps_is_capped_at_num_frames_spread_evenly(clip):
    with open_video(clip) as reader:
        assert reader.plan(num_frames=4, fps=10) == reader.plan(num_frames=4)
        assert reader.plan(num_frames=40, fps=2) == reader.plan(fps=2)


@pytest.mark.parametrize(
    "request_", [{"num_frames": 50}, {"num_frames": 1000}, {"fps": 25}, {"fps": 1000.0}, {}], ids=str
)
@pytest.mark.parametrize("settings", [{}, {"vfr": True}], ids=["cfr", "vfr"])
def test_never_more_than_the_video_has(request_, settings, make_clip):
    path, times = make_clip("a.mkv", num_frames=50, **settings)
    if "fps" in request_ and settings:
        request_ = {"fps": 1000.0}
    video = read_video(path, **request_)
    assert read_numbers(video.frames) == list(range(50))
    assert video.timestamps_seconds == pytest.approx(times)


@pytest.mark.parametrize("num_frames", [1, 7, 12, 13, 25, 49, 50])
def test_constant_rate_gives_distinct_frames(num_frames, clip):
    numbers = read_numbers(read_video(clip, num_frames=num_frames).frames)
    assert len(numbers) == len(set(numbers)) == num_frames
    assert numbers == sorted(numbers)


def test_window_without_any_frame_start_gives_the_frame_on_screen(clip):
    video = read_video(clip, num_frames=3, start_seconds=1.01, end_seconds=1.03)
    assert read_numbers(video.frames) == [25]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": -3}, "num_frames is -3"),
        ({"num_frames": 2.5}, "num_frames is 2.5"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": -1.0}, "fps is -1"),
        ({"fps": math.nan}, "fps is nan"),
        ({"fps": math.inf}, "fps is inf"),
        ({"start_seconds": 1.0, "end_seconds": 1.0}, "end_seconds is 1.0"),
        ({"start_seconds": 1.5, "end_seconds": 0.5}, "end_seconds is 0.5"),
        ({"start_seconds": -1.0}, "start_seconds is -1"),
        ({"start_seconds": math.nan}, "start_seconds is nan"),
        ({"end_seconds": math.nan}, "end_seconds is nan"),
        ({"start_seconds": 2.5}, "the video ends at 2.000 s"),
        ({"resize": (0, 10)}, "resize is"),
    ],
    ids=str,
)
def test_meaningless_requests_are_errors(arguments, message, clip):
    with pytest.raises(VideoError, match=message) as caught:
        read_video(clip, **arguments)
    assert str(clip) in str(caught.value)
    assert "\n" not in str(caught.value)
