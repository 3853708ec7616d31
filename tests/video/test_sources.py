"""What may be named as a video, what may not, and how refusals read."""

import io
import os
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from storm_vlm.errors import VideoError
from storm_vlm.video import _container as container
from storm_vlm.video import content_hash, open_video, read_video
from tests.video.clips import write_audio, write_clip


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which this machine serves it to itself."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def refusal(source: object, **options: object) -> str:
    with pytest.raises(VideoError) as caught:
        open_video(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_empty(tmp_path):
    (tmp_path / "empty.mp4").touch()
    assert "missing.mp4: no such file" in refusal(tmp_path / "missing.mp4")
    assert "empty.mp4: the file is empty" in refusal(tmp_path / "empty.mp4")
    assert "empty" in refusal(b"")
    assert "empty" in refusal(io.BytesIO())
    assert "the folder has no pictures" in refusal(tmp_path)
    assert "int is no video" in refusal(3)


def test_text_named_as_video(tmp_path):
    (tmp_path / "a.mp4").write_text("Dear diary,\n" * 100)
    message = refusal(tmp_path / "a.mp4")
    assert "a.mp4: cannot be opened as a video" in message
    assert "expected" in message


def test_sound_only(tmp_path):
    write_audio(tmp_path / "a.mp4")
    assert "holds only audio, expected a video stream" in refusal(tmp_path / "a.mp4")


def test_errors_keep_their_cause(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\x00" * 1000)
    with pytest.raises(VideoError) as caught:
        open_video(tmp_path / "a.mp4")
    assert caught.value.__cause__ is not None


def test_unseekable_and_text_file_objects(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with (tmp_path / "a.txt").open() as file:
        assert "binary" in refusal(file)
    reading, writing = os.pipe()
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert "cannot seek" in refusal(pipe)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "not a regular file" in refusal(tmp_path / "pipe.mp4")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(clip, tmp_path):
    path = tmp_path / "secret.mp4"
    path.write_bytes(clip.read_bytes())
    path.chmod(0)
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize(
    "protocol", ["concat:", "subfile,,start,0,end,0,,:", "file,crypto:", "cache:", "async:"]
)
def test_libav_protocols_are_plain_names(protocol, clip):
    assert "no such file" in refusal(f"{protocol}{clip}")


@pytest.mark.parametrize(
    "url", ["ftp://host/a.mp4", "gopher://host/a", "tcp://host:1", "udp://host:1", "pipe://0"]
)
def test_other_protocols_are_refused(url):
    assert "protocol" in refusal(url, allow_urls=True)


@pytest.mark.parametrize("scheme", ["http", "https", "rtsp", "HTTP"])
def test_urls_must_be_allowed_and_secrets_are_not_shown(scheme):
    message = refusal(f"{scheme}://user:password@host.invalid/a.mp4?token=secret")
    assert "allow_urls=True" in message
    assert "host.invalid/a.mp4" in message
    assert "password" not in message
    assert "secret" not in message


PLAYLISTS = {
    "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.0,\n{url}\n#EXT-X-ENDLIST\n",
    "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.0,\n{url}\n#EXT-X-ENDLIST\n",
    "concat.mp4": "ffconcat version 1.0\nfile '{path}'\n",
    "dash.mpd": '<?xml version="1.0"?><MPD type="static" mediaPresentationDuration="PT2S"><Period><AdaptationSet>'
    '<Representation id="0" mimeType="video/mp4"><BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period>'
    "</MPD>",
    "camera.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
@pytest.mark.parametrize("as_bytes", [False, True], ids=["path", "bytes"])
def test_local_playlists_open_nothing(name, as_bytes, tmp_path):
    write_clip(tmp_path / "inner.ts", num_frames=5)
    inner = tmp_path / "inner.ts"
    playlist = tmp_path / name
    playlist.write_text(PLAYLISTS[name].format(url=inner.as_uri(), path=inner))
    source = playlist.read_bytes() if as_bytes else playlist
    assert "cannot be opened as a video" in refusal(source)
    assert "cannot be opened as a video" in refusal(source, allow_urls=True)


def test_reading_over_http_equals_reading_the_file(served):
    folder, address = served
    write_clip(folder / "a.mp4", num_frames=20)
    got = read_video(f"{address}/a.mp4?x=1", num_frames=5, allow_urls=True)
    assert np.array_equal(got.frames, read_video(folder / "a.mp4", num_frames=5).frames)
    assert got.metadata.source == f"{address}/a.mp4"


def test_a_stream_without_duration_is_endless(served):
    folder, address = served
    write_clip(folder / "a.mkv", num_frames=20, container_options={"live": "1"})
    with open_video(f"{address}/a.mkv", allow_urls=True) as reader:
        assert reader.is_endless
        assert reader.metadata.duration_seconds == float("inf")
        with pytest.raises(VideoError, match="end_seconds"):
            reader.plan(fps=5)
        (chunk,) = reader.iter_chunks((i * 0.1 for i in range(10**9)), chunk_frames=100)
    assert chunk.timestamps_seconds == pytest.approx([0.0, 0.08, 0.2, 0.28, 0.4, 0.48, 0.6, 0.68, 0.76])


def test_a_live_source_cannot_go_back(served):
    folder, address = served
    write_clip(folder / "a.mkv", num_frames=20, container_options={"live": "1"})
    with open_video(f"{address}/a.mkv", allow_urls=True, end_seconds=0.5) as reader:
        assert len(reader.plan(fps=10)) == 5
        with pytest.raises(VideoError, match="cannot go back"):
            list(reader.iter_chunks([0.5, 0.1]))


def test_a_remote_playlist_cannot_name_local_files(served, tmp_path_factory):
    folder, address = served
    secret = tmp_path_factory.mktemp("private") / "secret.ts"
    write_clip(secret, num_frames=50)
    write_clip(folder / "part.ts", num_frames=50)
    for name, inner in (("bad.m3u8", secret.as_uri()), ("worse.m3u8", str(secret)), ("good.m3u8", "part.ts")):
        (folder / name).write_text(PLAYLISTS["hls.m3u8"].format(url=inner))
    assert len(read_video(f"{address}/good.m3u8", num_frames=2, allow_urls=True)) == 2
    refusal(f"{address}/bad.m3u8", allow_urls=True)
    refusal(f"{address}/worse.m3u8", allow_urls=True)


def test_a_missing_page_is_named(served):
    _, address = served
    assert f"{address}/none.mp4: cannot be opened" in refusal(f"{address}/none.mp4", allow_urls=True)


@pytest.mark.parametrize("scheme", ["http", "rtsp"])
def test_a_silent_server_times_out(scheme, monkeypatch):
    monkeypatch.setattr(container, "OPEN_TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        refusal(f"{scheme}://127.0.0.1:{server.getsockname()[1]}/a.mp4", allow_urls=True)


def test_hash_depends_on_content_only(clip, tmp_path):
    copy = tmp_path / "copy.bin"
    copy.write_bytes(clip.read_bytes())
    key = content_hash(clip)
    assert len(key) == 64
    with clip.open("rb") as file:
        file.seek(10)
        assert content_hash(file) == key
        assert file.tell() == 10
    assert content_hash(copy) == content_hash(clip.read_bytes()) == content_hash(clip.as_uri()) == key
    copy.write_bytes(clip.read_bytes()[:-1])
    assert content_hash(copy) != key


def test_hash_of_a_folder_covers_names_and_contents(tmp_path):
    keys = set()
    for index, files in enumerate([{"a": b"1", "b": b"2"}, {"a": b"12", "b": b""}, {"a": b"2", "b": b"1"}]):
        folder = tmp_path / str(index)
        folder.mkdir()
        for name, data in files.items():
            (folder / f"{name}.png").write_bytes(data)
        keys.add(content_hash(folder))
    assert len(keys) == 3


def test_hash_of_a_url_is_an_error():
    with pytest.raises(VideoError, match="no content hash"):
        content_hash("https://host.invalid/a.mp4")
    with pytest.raises(VideoError, match="no such file"):
        content_hash("nothing.mp4")
