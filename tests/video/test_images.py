"""Pictures, animations and folders of pictures read as videos."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from storm_vlm.errors import VideoError
from storm_vlm.video import open_video, probe_video, read_video
from tests.video.clips import draw_frame, read_number, read_numbers, write_animation


def save(path, number=0, **options):
    Image.fromarray(draw_frame(number)).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations_have_their_own_times(name, tmp_path):
    write_animation(tmp_path / name, 5, [100, 300, 50, 50, 500])
    video = read_video(tmp_path / name)
    assert read_numbers(video.frames) == [0, 1, 2, 3, 4]
    assert video.timestamps_seconds == pytest.approx((0.0, 0.1, 0.4, 0.45, 0.5))
    assert video.metadata.duration_seconds == pytest.approx(1.0)
    assert video.metadata.num_frames == 5
    assert read_numbers(read_video(tmp_path / name, num_frames=2).frames) == [1, 4]


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_animations_go_back_and_forth(name, tmp_path):
    write_animation(tmp_path / name, 8)
    whole = read_video(tmp_path / name)
    with open_video((tmp_path / name).read_bytes()) as reader:
        (chunk,) = reader.iter_chunks([0.65, 0.05, 0.35, 0.0, 0.7])
    assert np.array_equal(chunk.frames, whole.frames[[6, 0, 3, 0, 7]])


def test_gif_frames_without_delay_take_a_tenth_of_a_second(tmp_path):
    write_animation(tmp_path / "a.gif", 4, 0)
    assert probe_video(tmp_path / "a.gif").duration_seconds == pytest.approx(0.4)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_a_still_image_is_one_frame(suffix, tmp_path):
    path = save(tmp_path / f"a.{suffix}", 77)
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        video = read_video(source, num_frames=8)
        assert read_numbers(video.frames) == [77]
        assert video.timestamps_seconds == (0.0,)
        assert video.metadata.num_frames == 1


def test_an_image_with_another_suffix_is_known_by_its_content(tmp_path):
    assert len(read_video(save(tmp_path / "a.mp4", format="PNG"))) == 1


def test_a_folder_is_sorted_as_people_count(tmp_path):
    for number in (1, 2, 10, 9, 100):
        save(tmp_path / f"frame{number}.png", number)
    save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("no picture")
    video = read_video(tmp_path)
    assert read_numbers(video.frames) == [1, 2, 9, 10, 100]
    assert video.timestamps_seconds == (0.0, 1.0, 2.0, 3.0, 4.0)
    with open_video(tmp_path, folder_fps=10, start_seconds=0.2) as reader:
        assert reader.metadata.duration_seconds == pytest.approx(0.5)
        assert read_numbers(reader.read().frames) == [9, 10, 100]


def test_a_folder_of_mixed_sizes_needs_resize(tmp_path):
    save(tmp_path / "1.png", 1)
    Image.fromarray(draw_frame(2, (60, 120))).save(tmp_path / "2.png")
    with pytest.raises(VideoError, match=r"2\.png is 120x60, expected 160x96.*resize"):
        read_video(tmp_path)
    assert read_numbers(read_video(tmp_path, resize=(48, 80)).frames) == [1, 2]


def test_a_broken_picture_in_a_folder_is_named(tmp_path):
    save(tmp_path / "1.png", 1)
    save(tmp_path / "2.png", 2)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:500])
    with pytest.raises(VideoError, match=r"2\.png"):
        read_video(tmp_path)
    (tmp_path / "2.png").write_text("no picture at all")
    with pytest.raises(VideoError, match=r"not a picture"):
        read_video(tmp_path)


@pytest.mark.parametrize("folder_fps", [0, -1, float("nan")])
def test_folder_fps_must_be_a_rate(folder_fps, tmp_path):
    save(tmp_path / "1.png")
    with pytest.raises(VideoError, match="folder_fps"):
        open_video(tmp_path, folder_fps=folder_fps)


def test_exif_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.png", 5, exif=exif)
    video = read_video(tmp_path / "a.png")
    assert (video.metadata.height, video.metadata.width) == (160, 96)
    assert read_number(np.rot90(video.frames[0])) == 5


def test_transparency_is_shown_on_white(tmp_path):
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (read_video(tmp_path / "a.png").frames == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "I;16"])
def test_other_modes_become_rgb(mode, tmp_path):
    gray = np.tile(np.linspace(0, 255, 160).astype(np.uint8), (96, 1))
    image = (
        Image.fromarray(gray.astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(gray).convert(mode)
    )
    image.save(tmp_path / "a.tiff")
    (frame,) = read_video(tmp_path / "a.tiff").frames
    assert frame.shape == (96, 160, 3)
    assert frame[:, :20].mean() < 60
    assert frame[:, -20:].mean() > 200


def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path):
    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (7000, 60000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        png = b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(bytes(1000)))
        with pytest.raises(VideoError, match="pixels"):
            open_video(png)


def test_a_cut_animation_is_an_error_that_names_it(tmp_path):
    write_animation(tmp_path / "a.gif", 5)
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "b.gif").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match=r"b\.gif"):
        read_video(tmp_path / "b.gif", num_frames=5)
