"""Any container, codec and pixel format gives the right frames at the right times, sought or in sequence."""

import bisect
import io
import random

import av
import numpy as np
import pytest

from storm_vlm.errors import VideoError
from storm_vlm.video import _decoding as decoding
from storm_vlm.video import open_video, probe_video, read_video
from tests.video.clips import draw_frame, read_number, read_numbers, write_clip

FORMATS = {
    "mp4": ("a.mp4", {}),
    "b-frames": ("a.mp4", {"b_frames": 3}),
    "no-b-frames": ("a.mp4", {"b_frames": 0}),
    "fragmented": ("a.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "intra-refresh": ("a.mp4", {"codec_options": {"intra-refresh": "1"}}),
    "vfr-mp4": ("a.mp4", {"vfr": True, "b_frames": 3}),
    "vfr-mkv": ("a.mkv", {"vfr": True}),
    "late-start-mkv": ("a.mkv", {"start_seconds": 5.28}),
    "late-start-ts": ("a.ts", {"start_seconds": 1000.52}),
    "audio": ("a.mkv", {"audio": True, "vfr": True}),
    "open-gop-mp4": ("a.mp4", {"open_gop": True, "b_frames": 3}),
    "open-gop-mkv": ("a.mkv", {"open_gop": True, "b_frames": 3}),
    "open-gop-ts": ("a.ts", {"open_gop": True, "b_frames": 3}),
    "hevc-open-gop": ("a.mp4", {"codec": "libx265", "open_gop": True, "b_frames": 3}),
    "no-duration": ("a.mkv", {"container_options": {"live": "1"}}),
    "one-keyframe": ("a.mkv", {"gop": 1000}),
    "flv": ("a.flv", {}),
    "avi": ("a.avi", {"codec": "mpeg4"}),
    "avi-b-pyramid": ("a.avi", {"b_frames": 3}),
    "mpeg-ps": ("a.mpg", {"codec": "mpeg2video"}),
    "asf": ("a.asf", {"b_frames": 3}),
    "raw-h264": ("a.h264", {}),
    "raw-mjpeg": ("a.mjpeg", {"codec": "mjpeg", "pixel_format": "yuvj420p"}),
    "vp9": ("a.webm", {"codec": "libvpx-vp9", "codec_options": {"deadline": "realtime", "cpu-used": "8"}}),
    "av1": ("a.mkv", {"codec": "libsvtav1", "codec_options": {"preset": "12"}}),
}


needs_rotation = pytest.mark.skipif(
    not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write a display matrix"
)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_reads_frames_at_their_times(name, make_clip):
    file_name, settings = FORMATS[name]
    path, times = make_clip(file_name, num_frames=70, **settings)
    video = read_video(path)
    assert read_numbers(video.frames) == list(range(70))
    assert video.timestamps_seconds == pytest.approx(times, abs=1e-3)
    assert video.metadata.num_frames == 70
    assert video.metadata.duration_seconds == pytest.approx(times[-1] + 0.04, abs=0.1)
    rate = video.metadata.average_fps
    assert video.frame_indices == tuple(round(time * rate) for time in video.timestamps_seconds)


@pytest.mark.parametrize("name", FORMATS)
def test_seeking_equals_sequential_decoding_bit_for_bit(name, make_clip):
    file_name, settings = FORMATS[name]
    path, _ = make_clip(file_name, num_frames=70, **settings)
    whole = read_video(path)
    generator = random.Random(0)
    duration = whole.metadata.duration_seconds
    targets = [generator.uniform(0, duration * 0.999) for _ in range(25)]
    targets += sorted(generator.uniform(0, duration * 0.999) for _ in range(10))
    with open_video(path) as reader:
        got = list(reader.iter_chunks(targets, chunk_frames=1))
    for target, chunk in zip(targets, got, strict=True):
        expected = max(0, bisect.bisect_right(whole.timestamps_seconds, target + 1e-6) - 1)
        assert chunk.timestamps_seconds[0] == whole.timestamps_seconds[expected]
        assert np.array_equal(chunk.frames[0], whole.frames[expected])


@pytest.mark.parametrize("name", ["mp4", "vfr-mkv", "open-gop-ts", "hevc-open-gop", "vp9"])
def test_whole_reading_equals_plain_pyav(name, make_clip):
    file_name, settings = FORMATS[name]
    path, _ = make_clip(file_name, num_frames=70, **settings)
    with av.open(str(path)) as container:
        plain = [
            frame.to_ndarray(format="rgb24", interpolation="BICUBIC") for frame in container.decode(video=0)
        ]
    assert np.array_equal(read_video(path).frames, np.stack(plain))


def test_open_groups_of_pictures_are_really_open(make_clip):
    path, _ = make_clip("a.mp4", num_frames=70, open_gop=True, b_frames=3)
    with av.open(str(path)) as container:
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    keyframes = [i for i, (_, is_keyframe) in enumerate(packets) if is_keyframe]
    assert len(keyframes) > 3
    assert any(packets[i + 1][0] < packets[i][0] for i in keyframes[:-1])


@pytest.mark.parametrize("name", ["mp4", "open-gop-ts", "vfr-mkv", "hevc-open-gop"])
def test_files_too_large_to_count_are_read_alike(name, make_clip, monkeypatch):
    file_name, settings = FORMATS[name]
    path, times = make_clip(file_name, num_frames=70, **settings)
    counted = read_video(path, num_frames=13)
    monkeypatch.setattr(decoding, "SCANNED_BYTES", 0)
    estimated = read_video(path, num_frames=13)
    assert estimated.timestamps_seconds == counted.timestamps_seconds
    assert np.array_equal(estimated.frames, counted.frames)
    assert estimated.metadata.duration_seconds == pytest.approx(times[-1] + 0.04, abs=0.1)


def test_own_timestamps_lead_back_to_the_same_frames(make_clip):
    path, _ = make_clip("a.mkv", num_frames=70, fps=30000 / 1001)
    whole = read_video(path)
    with open_video(path) as reader:
        (again,) = reader.iter_chunks(whole.timestamps_seconds, chunk_frames=100)
    assert again.timestamps_seconds == whole.timestamps_seconds
    assert read_numbers(again.frames) == list(range(70))


@pytest.mark.parametrize(
    "pixel_format",
    ["yuv420p10le", "yuv444p", "yuv422p", "gray", "yuvj420p"],
)
def test_pixel_formats_become_rgb(pixel_format, tmp_path):
    write_clip(tmp_path / "a.mp4", num_frames=5, pixel_format=pixel_format)
    video = read_video(tmp_path / "a.mp4")
    assert video.frames.dtype == np.uint8
    assert read_numbers(video.frames) == list(range(5))


@pytest.mark.parametrize(
    ("file_name", "codec", "pixel_format"),
    [("a.mkv", "ffv1", "yuva420p"), ("a.mov", "png", "rgba"), ("a.mkv", "ffv1", "gray16le")],
)
def test_alpha_and_deep_formats_become_rgb(file_name, codec, pixel_format, tmp_path):
    write_clip(tmp_path / file_name, num_frames=5, codec=codec, pixel_format=pixel_format)
    video = read_video(tmp_path / file_name)
    assert video.frames.shape == (5, 96, 160, 3)
    assert read_numbers(video.frames) == list(range(5))


def test_lossless_rgb_keeps_its_values(tmp_path):
    write_clip(tmp_path / "a.mkv", num_frames=3, codec="ffv1", pixel_format="bgr0")
    expected = np.stack([draw_frame(number) for number in range(3)])
    assert np.array_equal(read_video(tmp_path / "a.mkv").frames, expected)


@pytest.mark.parametrize("size", [(121, 161), (97, 161), (48, 66)], ids=str)
def test_odd_sizes(size, tmp_path):
    write_clip(tmp_path / "a.mp4", num_frames=5, size=size, pixel_format="yuv444p")
    video = read_video(tmp_path / "a.mp4")
    assert video.frames.shape == (5, *size, 3)
    assert (video.metadata.height, video.metadata.width) == size
    assert read_numbers(video.frames) == list(range(5))


@needs_rotation
@pytest.mark.parametrize(("rotation", "clockwise"), [(0, 0), (90, 270), (180, 180), (-90, 90)])
def test_rotation_is_applied(rotation, clockwise, make_clip):
    path, _ = make_clip("a.mp4", num_frames=6, rotation=rotation)
    upright = read_video(make_clip("a.mp4", num_frames=6)[0]).frames
    video = read_video(path)
    assert video.metadata.rotation_degrees == clockwise
    assert (video.metadata.height, video.metadata.width) == video.frames.shape[1:3]
    assert np.array_equal(video.frames, np.rot90(upright, k=rotation // 90, axes=(1, 2)))


@needs_rotation
def test_resize_is_the_shown_size(make_clip):
    path, _ = make_clip("a.mp4", num_frames=6, rotation=90)
    video = read_video(path, resize=(80, 48))
    assert video.frames.shape == (6, 80, 48, 3)
    assert read_numbers(np.rot90(video.frames, k=-1, axes=(1, 2))) == list(range(6))


@pytest.mark.parametrize("num_frames", [1, 2])
@pytest.mark.parametrize("file_name", ["a.mp4", "a.mkv", "a.ts"])
def test_very_short_videos(file_name, num_frames, make_clip):
    path, _ = make_clip(file_name, num_frames=num_frames)
    video = read_video(path, num_frames=8)
    assert read_numbers(video.frames) == list(range(num_frames))
    assert video.timestamps_seconds[0] == 0.0


def test_longer_audio_does_not_stretch_the_video(make_clip):
    path, _ = make_clip("a.mkv", num_frames=25, audio=True, audio_seconds=4.0)
    assert probe_video(path).duration_seconds == pytest.approx(1.0)
    assert len(read_video(path, num_frames=10)) == 10


def test_bytes_and_file_objects_read_like_the_path(clip):
    expected = read_video(clip, num_frames=5)
    data = clip.read_bytes()
    with clip.open("rb") as file:
        for source in (data, io.BytesIO(data), file, str(clip), clip.as_uri()):
            got = read_video(source, num_frames=5)
            assert np.array_equal(got.frames, expected.frames)
            assert got.timestamps_seconds == expected.timestamps_seconds
        assert not file.closed


def test_window_limits_frames_and_keeps_times(clip):
    video = read_video(clip, num_frames=5, start_seconds=1.0, end_seconds=1.4)
    assert read_numbers(video.frames) == [26, 28, 30, 32, 34]
    assert video.timestamps_seconds[0] == pytest.approx(1.04)
    late = read_video(clip, start_seconds=1.9, end_seconds=100.0)
    assert read_numbers(late.frames) == [48, 49]


def test_the_frame_is_the_last_one_shown(make_clip):
    path, times = make_clip("a.mp4", num_frames=20, vfr=True)
    with open_video(path) as reader:
        got = list(reader.iter_chunks([-1.0, times[4] - 0.001, times[4], times[5] - 0.001], chunk_frames=1))
    assert [read_number(chunk.frames[0]) for chunk in got] == [0, 3, 4, 4]


def test_metadata_of_a_plain_clip(clip):
    metadata = probe_video(clip)
    assert (metadata.width, metadata.height, metadata.num_frames) == (160, 96, 50)
    assert (metadata.average_fps, metadata.duration_seconds) == (25.0, 2.0)
    assert (metadata.codec_name, metadata.rotation_degrees, metadata.source) == ("h264", 0, str(clip))


def test_colours_of_tagged_video(tmp_path):
    colours = [(200, 30, 40), (30, 180, 60), (40, 60, 210)]
    pictures = [np.full((96, 160, 3), colour, np.uint8) for colour in colours]
    write_clip(tmp_path / "a.mp4", num_frames=3, pictures=pictures, gop=1)
    got = read_video(tmp_path / "a.mp4").frames.mean(axis=(1, 2))
    assert np.abs(got - np.array(colours)).max() < 6


def test_a_video_above_max_pixels_is_refused(clip):
    with pytest.raises(VideoError, match=r"160x96, expected at most 10000 pixels.*max_pixels"):
        open_video(clip, max_pixels=10000)
