"""Reading in chunks: the same frames, bounded memory, nothing left open."""

import gc
import itertools
import math
import weakref
from pathlib import Path

import numpy as np
import pytest

from storm_vlm.errors import VideoError
from storm_vlm.video import open_video, probe_video, read_video
from tests.video.clips import draw_frame, read_numbers, write_animation

FILE_DESCRIPTORS = Path("/proc/self/fd")


def count_open_files() -> int:
    gc.collect()
    return len(list(FILE_DESCRIPTORS.iterdir()))


@pytest.mark.parametrize("chunk_frames", [1, 3, 16, 50, 1000])
def test_chunks_together_are_the_whole(chunk_frames, clip):
    whole = read_video(clip)
    with open_video(clip) as reader:
        chunks = list(reader.iter_chunks(reader.plan(), chunk_frames=chunk_frames))
    assert all(len(chunk) == min(chunk_frames, 50) for chunk in chunks[:-1])
    assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), whole.frames)
    assert tuple(itertools.chain(*(chunk.timestamps_seconds for chunk in chunks))) == whole.timestamps_seconds


def test_resize_in_chunks(clip):
    with open_video(clip) as reader:
        (chunk,) = reader.iter_chunks([0.0, 1.0], resize=(224, 336))
    assert chunk.frames.shape == (2, 224, 336, 3)
    assert read_numbers(chunk.frames) == [0, 25]


def test_a_chunk_is_released_before_the_next_is_made(clip):
    with open_video(clip) as reader:
        chunks = reader.iter_chunks(reader.plan(), chunk_frames=10)
        first = weakref.ref(next(chunks).frames)
        next(chunks)
        assert first() is None


def test_a_chunk_does_not_change_later(clip):
    with open_video(clip) as reader:
        chunks = reader.iter_chunks(reader.plan(), chunk_frames=10)
        first = next(chunks).frames
        copy = first.copy()
        list(chunks)
    assert np.array_equal(first, copy)


def test_targets_in_any_order_and_repeated(clip):
    with open_video(clip) as reader:
        (chunk,) = reader.iter_chunks(iter([1.0, 0.2, 0.2, 1.9, 0.0]))
    assert read_numbers(chunk.frames) == [25, 5, 5, 47, 0]


@pytest.mark.skipif(not FILE_DESCRIPTORS.is_dir(), reason="needs /proc/self/fd")
def test_no_file_stays_open(clip, tmp_path):
    animation, broken, folder = tmp_path / "a.gif", tmp_path / "broken.mp4", tmp_path / "folder"
    write_animation(animation)
    broken.write_bytes(clip.read_bytes()[:4000])
    folder.mkdir()
    (folder / "1.png").write_bytes(b"\x89PNG no picture")
    read_video(clip, num_frames=2)
    before = count_open_files()
    for source in (clip, animation):
        probe_video(source)
        with open_video(source) as reader:
            next(reader.iter_chunks(reader.plan(), chunk_frames=1))
        abandoned = open_video(source)
        next(abandoned.iter_chunks(abandoned.plan(), chunk_frames=1))
        del abandoned
        with pytest.raises(VideoError):
            open_video(source, start_seconds=100.0)
        with pytest.raises(VideoError):
            open_video(source, max_pixels=10)
    for source in (broken, folder):
        with pytest.raises(VideoError):
            open_video(source)
    del reader
    assert count_open_files() == before


def test_a_closed_reader_says_so(clip):
    reader = open_video(clip)
    chunks = reader.iter_chunks(reader.plan(), chunk_frames=5)
    next(chunks)
    reader.close()
    reader.close()
    for use in (reader.plan, reader.read, lambda: next(chunks), lambda: reader.iter_chunks([0.0])):
        with pytest.raises(VideoError, match="closed"):
            use()


@pytest.mark.parametrize("bad", [{"chunk_frames": 0}, {"resize": (10,)}, {"resize": (-1, 10)}], ids=str)
def test_meaningless_chunks_are_errors_at_the_call(bad, clip):
    with open_video(clip) as reader, pytest.raises(VideoError, match=next(iter(bad))):
        reader.iter_chunks([0.0], **bad)


def test_targets_that_are_no_times_are_errors(clip):
    with open_video(clip) as reader, pytest.raises(VideoError, match="nan"):
        list(reader.iter_chunks([0.0, math.nan]))


def test_two_readers_of_one_file_do_not_disturb_each_other(clip):
    with open_video(clip) as one, open_video(clip) as two:
        pairs = zip(one.iter_chunks(one.plan(), 1), two.iter_chunks(reversed(two.plan()), 1), strict=True)
        numbers = [(read_numbers(a.frames)[0], read_numbers(b.frames)[0]) for a, b in pairs]
    assert numbers == [(i, 49 - i) for i in range(50)]


def test_the_burnt_number_can_be_read():
    assert read_numbers(np.stack([draw_frame(n, (64, 120)) for n in (0, 1, 2047, 4095)])) == [
        0,
        1,
        2047,
        4095,
    ]
