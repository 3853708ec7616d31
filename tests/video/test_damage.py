"""Cut and damaged files: what can be read is read, the rest is left out and said once."""

import contextlib
import itertools
import logging
import random

import av
import numpy as np
import pytest

from storm_vlm.errors import VideoError
from storm_vlm.video import open_video, probe_video, read_video
from tests.video.clips import read_numbers, write_animation, write_clip

IN_FRONT = {"movflags": "faststart"}


@pytest.fixture
def cut(make_clip, tmp_path):
    """Returns a function that cuts a clip of 100 frames to a part of its bytes."""

    def make(part, name="a.mp4", **settings):
        path, _ = make_clip(name, num_frames=100, **settings)
        data = path.read_bytes()
        (tmp_path / f"cut_{name}").write_bytes(data[: int(len(data) * part)])
        return tmp_path / f"cut_{name}"

    return make


def test_mp4_without_its_index_is_an_error(cut):
    with pytest.raises(VideoError, match="cannot be opened as a video"):
        open_video(cut(0.5))


def test_cut_mp4_gives_the_frames_up_to_the_cut(cut, make_clip, caplog):
    path = cut(0.6, container_options=IN_FRONT)
    whole = read_video(make_clip("a.mp4", num_frames=100, container_options=IN_FRONT)[0], num_frames=20)
    with caplog.at_level(logging.WARNING), open_video(path) as reader:
        video = reader.read(num_frames=20)
        reader.read(num_frames=20)
    assert 8 <= len(video) < 16
    assert len(set(read_numbers(video.frames))) == len(video)
    assert np.array_equal(video.frames, whole.frames[: len(video)])
    assert video.metadata.duration_seconds == 4.0
    left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(left_out) == 1
    assert str(path) in left_out[0]
    assert "of 20 times" in left_out[0]


def test_no_frame_within_reach_of_the_cut_is_an_error(cut):
    path = cut(0.6, container_options=IN_FRONT)
    with pytest.raises(VideoError, match=r"decoded up to [12]\.\d+ s only, of a declared 4\.000 s"):
        read_video(path, num_frames=3, start_seconds=3.0)


def test_targets_far_behind_the_cut_cost_no_second_search(cut):
    path = cut(0.6, container_options=IN_FRONT)
    with open_video(path) as reader:
        got = list(reader.iter_chunks([3.9, 3.5, 0.5, 3.8, 0.1], chunk_frames=1))
    assert [read_numbers(chunk.frames)[0] for chunk in got] == [12, 2]


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.flv", "a.avi"])
def test_other_containers_are_read_up_to_the_cut(name, cut):
    settings = {"codec": "mpeg4"} if name == "a.avi" else {}
    video = read_video(cut(0.5, name, **settings), num_frames=10)
    numbers = read_numbers(video.frames)
    assert numbers == sorted(set(numbers))
    assert 3 <= len(numbers) <= 10
    assert numbers[-1] < 75


def test_a_cut_mkv_has_the_duration_of_what_is_there(cut, caplog):
    with caplog.at_level(logging.WARNING):
        metadata = probe_video(cut(0.5, "a.mkv"))
    assert 1.0 < metadata.duration_seconds < 3.0
    assert "declares 4.00 s" in caplog.text


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_damage_in_the_middle_is_passed_over(name, make_clip, tmp_path, caplog):
    path, _ = make_clip(name, num_frames=100, container_options=IN_FRONT if name == "a.mp4" else None)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = random.Random(0).randbytes(3000)
    (tmp_path / name).write_bytes(data)
    video = read_video(tmp_path / name, num_frames=20)
    numbers = read_numbers(video.frames)
    assert len(video) == 20
    assert numbers[:7] == [2, 7, 12, 17, 22, 27, 32]
    assert numbers[-4:] == [82, 87, 92, 97]


def test_damaged_first_frames_do_not_shift_the_times(make_clip, tmp_path):
    path, _ = make_clip("a.mp4", num_frames=60, gop=12)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in itertools.islice(container.demux(video=0), 12):
            data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    (tmp_path / "a.mp4").write_bytes(data)
    video = read_video(tmp_path / "a.mp4", num_frames=10)
    late = list(zip(read_numbers(video.frames), video.timestamps_seconds, strict=True))[3:]
    assert [number for number, _ in late] == [21, 27, 33, 39, 45, 51, 57]
    assert [time for _, time in late] == pytest.approx([number * 0.04 for number, _ in late])


def test_header_only_is_an_error(tmp_path):
    write_clip(tmp_path / "a.mp4", num_frames=20, container_options=IN_FRONT)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: data.index(b"mdat") + 4])
    with pytest.raises(VideoError, match=r"b\.mp4"):
        read_video(tmp_path / "b.mp4", num_frames=2)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.gif", "a.webp", "a.png"])
def test_random_damage_never_gives_another_error(name, make_clip, tmp_path):
    if name in ("a.gif", "a.webp", "a.png"):
        write_animation(tmp_path / name, num_frames=3)
        data = (tmp_path / name).read_bytes()
    else:
        data = make_clip(name, num_frames=12)[0].read_bytes()
    generator = random.Random(1)
    for _ in range(40):
        damaged = bytearray(data)
        for _ in range(generator.choice([1, 4, 30])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        source = bytes(damaged[: generator.choice([len(damaged), generator.randrange(20, len(damaged))])])
        with contextlib.suppress(VideoError):
            video = read_video(source, num_frames=4, resize=(24, 40))
            assert video.frames.shape == (len(video), 24, 40, 3)
