"""Encoded videos on disk: what was written or nothing, for the right video and the right model."""

import json
import logging
import os
import signal
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from storm_vlm.errors import ModelError, StormError
from storm_vlm.pipeline import VideoQA, VideoTokens
from storm_vlm.storage import atomic_file
from tests.video.clips import draw_frame, write_clip


@pytest.fixture
def saved(video_qa, clip, tmp_path):
    path = tmp_path / "saved.safetensors"
    video_qa.encode(clip, temporal_pool=3).save(path)
    return path


def fresh(video_qa, folder) -> VideoQA:
    """The same model in what could be another process."""
    return VideoQA(video_qa.model, video_qa.processor, cache_folder=folder)


def rewrite(path, **changes):
    """Changes the header of a saved video and leaves its tokens."""
    with safe_open(path, "pt") as file:
        tokens, metadata = file.get_tensor("tokens"), file.metadata()
    ((key, header),) = metadata.items()
    save_file({"tokens": tokens}, path, {key: json.dumps(json.loads(header) | changes)})


def test_saved_and_loaded_is_the_same(video_qa, clip, tmp_path):
    encoded = video_qa.encode(clip, num_frames=7, temporal_pool=2, spatial_pool=4, temporal_sample=2)
    encoded.save(tmp_path / "x.safetensors")
    loaded = VideoTokens.load(tmp_path / "x.safetensors")
    assert torch.equal(loaded.tokens, encoded.tokens)
    for name in ("timestamps_seconds", "patch_grid", "compression", "provenance", "num_uncompressed_tokens"):
        assert getattr(loaded, name) == getattr(encoded, name), name
    assert (loaded.num_frames, loaded.num_visual_tokens, loaded.fraction) == (7, 2, 2 / 28)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 99},
        {"patch_grid": [9, 4, 4]},
        {"timestamps_seconds": [0.5]},
        {"compression": {"temporal_pool": 5}},
        {"compression": {"temporal_pool": 0}},
        {"compression": None},
        {"provenance": {"source": "x"}},
        {"tokens_sha256": "0"},
    ],
    ids=str,
)
def test_header_that_does_not_fit_the_tokens(saved, changes):
    VideoTokens.load(saved)
    rewrite(saved, **changes)
    with pytest.raises(StormError, match=r"saved\.safetensors holds no encoded video"):
        VideoTokens.load(saved)


def test_a_flipped_bit_among_the_tokens_is_noticed(video_qa, clip, tmp_path, caplog):
    encoded = video_qa.encode(clip)
    (entry,) = (tmp_path / "cache").iterdir()
    content = bytearray(entry.read_bytes())
    content[-3] ^= 1
    entry.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = fresh(video_qa, tmp_path / "cache").encode(clip)
    assert "the cache is damaged" in caplog.text
    assert not again.is_from_cache
    assert torch.equal(again.tokens, encoded.tokens)


def test_killed_writer_leaves_no_entry(video_qa, clip, tmp_path):
    folder = tmp_path / "cache"
    video_qa.encode(clip)
    (entry,) = folder.iterdir()
    content = entry.read_bytes()
    entry.unlink()
    child = os.fork()
    if child == 0:
        with atomic_file(entry) as temporary:
            temporary.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (rest,) = folder.iterdir()
    assert not entry.exists()
    assert not fresh(video_qa, folder).encode(clip).is_from_cache
    assert fresh(video_qa, folder).encode(clip).is_from_cache
    assert rest.exists()  # it could be in the making
    os.utime(rest, (0, 0))
    fresh(video_qa, folder).encode(clip, num_frames=3)
    assert not rest.exists()


def test_used_entries_outlive_older_ones(video_qa, clip, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    video_qa.encode(clip, num_frames=10)
    (first,) = folder.iterdir()
    video_qa.encode(clip, num_frames=11)
    (second,) = set(folder.iterdir()) - {first}
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    assert fresh(video_qa, folder).encode(clip, num_frames=10).is_from_cache
    monkeypatch.setenv("STORM_CACHE_MAX_BYTES", str(int(2.5 * first.stat().st_size)))
    fresh(video_qa, folder).encode(clip, num_frames=9)
    assert first.exists()
    assert not second.exists()


def test_entry_larger_than_the_cache_drops_nothing(video_qa, clip, tmp_path, monkeypatch):
    video_qa.encode(clip, num_frames=1)
    (entry,) = (tmp_path / "cache").iterdir()
    monkeypatch.setenv("STORM_CACHE_MAX_BYTES", "2500")
    assert fresh(video_qa, tmp_path / "cache").encode(clip, num_frames=50).num_frames == 50
    assert list((tmp_path / "cache").iterdir()) == [entry]


def test_cache_size_that_is_no_number(video_qa, tmp_path, monkeypatch):
    monkeypatch.setenv("STORM_CACHE_MAX_BYTES", "2GB")
    with pytest.raises(StormError, match="STORM_CACHE_MAX_BYTES must be a number of bytes, got '2GB'"):
        fresh(video_qa, tmp_path)


def test_folder_that_cannot_be_written_is_no_error(video_qa, clip, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        encoded = fresh(video_qa, tmp_path / "file").encode(clip)
    assert encoded.num_frames == 8
    assert "was not cached" in caplog.text


def test_file_with_new_content_is_encoded_again(video_qa, tmp_path):
    path = tmp_path / "clip.mp4"
    write_clip(path, num_frames=10, fps=10, size=(48, 64))
    before = video_qa.encode(path)
    assert video_qa.encode(path) is before
    write_clip(
        path, num_frames=10, fps=10, size=(48, 64), pictures=[draw_frame(i + 90, (48, 64)) for i in range(10)]
    )
    after = video_qa.encode(path)
    assert not torch.equal(after.tokens, before.tokens)
    path.rename(tmp_path / "moved.mp4")
    assert video_qa.encode(tmp_path / "moved.mp4") is after


def test_other_normalisation_is_another_entry(video_qa, clip):
    before = video_qa.encode(clip)
    video_qa.processor.video_processor.image_mean = [0.1, 0.2, 0.3]
    assert not torch.equal(video_qa.encode(clip).tokens, before.tokens)


def test_urls_are_encoded_each_time(video_qa, tmp_path):
    for name, first in (("one", 0), ("two", 90)):
        pictures = [draw_frame(first + i, (48, 64)) for i in range(10)]
        write_clip(tmp_path / f"{name}.mp4", num_frames=10, fps=10, size=(48, 64), pictures=pictures)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        one, two = (video_qa.encode(f"{url}/{name}.mp4", allow_urls=True) for name in ("one", "two"))
        server.shutdown()
    assert one.provenance.content_sha256 is None
    assert not torch.equal(one.tokens, two.tokens)
    assert torch.equal(two.tokens, video_qa.encode(tmp_path / "two.mp4").tokens)


def test_model_that_computes_nan_caches_nothing(video_qa, clip, tmp_path):
    with torch.no_grad():
        video_qa.model.temporal_projector.input_projection.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"NaN or infinite visual tokens in float32"):
        video_qa.encode(clip)
    assert not (tmp_path / "cache").exists()


def test_tokens_of_another_model(video_qa, clip, caplog):
    encoded = video_qa.encode(clip)
    narrow = VideoTokens(
        **{
            name: getattr(encoded, name)[..., :8] if name == "tokens" else getattr(encoded, name)
            for name in encoded.__slots__
        }
    )
    with pytest.raises(StormError, match="tokens are 8 wide and this model takes 32"):
        video_qa.ask(narrow, "What?")
    with torch.no_grad():
        video_qa.model.temporal_projector.input_projection.weight.add_(1)
    with caplog.at_level(logging.WARNING):
        video_qa.ask(encoded, "What?")
    assert "was encoded with other weights" in caplog.text


@pytest.mark.parametrize("form", ["bytes", "str", "uri"])
def test_every_form_of_a_file_is_the_same_video(video_qa, clip, form):
    video = {"bytes": clip.read_bytes(), "str": str(clip), "uri": clip.as_uri()}[form]
    assert video_qa.encode(clip) is video_qa.encode(video)


def test_picture_is_a_video_of_one_frame(video_qa, tmp_path):
    from PIL import Image

    Image.fromarray(draw_frame(3)).save(tmp_path / "picture.png")
    encoded = video_qa.encode(tmp_path / "picture.png")
    assert (encoded.num_frames, encoded.num_visual_tokens, encoded.fraction) == (1, 4, 1.0)


def test_cut_file_has_the_frames_that_are_there(video_qa, tmp_path):
    path = tmp_path / "cut.ts"
    write_clip(path, num_frames=60, fps=10, size=(48, 64))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    encoded = video_qa.encode(path, num_frames=30)
    assert len(encoded.timestamps_seconds) == encoded.num_frames == encoded.patch_grid[0]
    assert video_qa.ask(encoded, "What?", max_new_tokens=2).text() is not None
