"""What is measured: numbers of frames, token compressions under the paper's names, and how often."""

import re
from dataclasses import dataclass

from storm_vlm.errors import StormError
from storm_vlm.model import TokenCompression

# The paper's compressions by how many times fewer tokens they leave (STORM, Tables 2, 5 and 13).
_BY_FACTOR = {
    1: TokenCompression(),
    2: TokenCompression(temporal_sample=2),
    4: TokenCompression(temporal_pool=4),
    8: TokenCompression(temporal_pool=4, temporal_sample=2),
    16: TokenCompression(temporal_pool=4, spatial_pool=4),
    32: TokenCompression(temporal_pool=4, spatial_pool=4, temporal_sample=2),
}
# Steps by the paper's names: the field they set, and the paper's value for it.
_STEPS = {"t.pool": ("temporal_pool", 4), "s.pool": ("spatial_pool", 4), "t.sample": ("temporal_sample", 2)}
_STEP = r"(t\.pool|s\.pool|t\.sample)\d*"
_PATTERN = rf"none|\d+|{_STEP}(\+{_STEP})*"


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """What is measured, and how often.

    Attributes:
        num_frames: Numbers of frames.
        compressions: Token compressions; each is measured with each number of frames.
        num_repeats: Requests that are timed.
        num_warm_ups: Requests before them that are not; FLOPs are counted in the first.
        num_new_tokens: Tokens written after the first one, for the time of one.

    Raises:
        StormError: A number is too small, or there is nothing to measure.
    """

    num_frames: tuple[int, ...]
    compressions: tuple[TokenCompression, ...]
    num_repeats: int = 3
    num_warm_ups: int = 1
    num_new_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("num_frames", "compressions"):
            if not getattr(self, name):
                raise StormError(f"{name} must not be empty: there is nothing to measure")
        if (fewest := min(self.num_frames)) < 1:
            raise StormError(f"num_frames must be at least 1, got {fewest}")
        for name in ("num_repeats", "num_warm_ups", "num_new_tokens"):
            if getattr(self, name) < 1:
                raise StormError(f"{name} must be at least 1, got {getattr(self, name)}")


def parse_compression(text: str) -> TokenCompression:
    """Reads a token compression as the paper writes it.

    Args:
        text: ``none``; how many times fewer tokens are left, by the paper's means: 2, 4, 8, 16 or 32; or steps joined
            by ``+``, each with a number or the paper's: ``T.pool+T.sample``, ``T.pool8``, ``S.pool4+T.sample2``.

    Returns:
        The compression; one that no model could do is a StormError too.

    Raises:
        StormError: It is no compression.
    """
    if not re.fullmatch(_PATTERN, text, re.IGNORECASE) or (text.isdecimal() and int(text) not in _BY_FACTOR):
        factors = ", ".join(map(str, list(_BY_FACTOR)[1:]))
        raise StormError(
            f"compression {text!r} is unknown: choose none, {factors}, or steps such as T.pool4, S.pool4, T.sample2 "
            f"joined by +"
        )
    if text.lower() == "none":
        return TokenCompression()
    if text.isdecimal():
        return _BY_FACTOR[int(text)]
    chosen: dict[str, int] = {}
    for step in text.lower().split("+"):
        name = step.rstrip("0123456789")
        field, usual = _STEPS[name]
        if field in chosen:
            raise StormError(f"compression {text!r} has {name} twice")
        chosen[field] = int(step[len(name) :] or usual)
    return TokenCompression(**chosen)


def compression_name(compression: TokenCompression) -> str:
    """Returns the name that `parse_compression` reads: ``none`` or steps such as ``T.pool4+T.sample2``."""
    steps = [
        f"{name[0].upper()}{name[1:]}{value}"
        for name, (field, _) in _STEPS.items()
        if (value := getattr(compression, field)) > 1
    ]
    return "+".join(steps) or "none"


def compression_factor(compression: TokenCompression) -> int:
    """Returns how many times fewer tokens are left, for whole groups of frames."""
    return compression.frames_per_group * compression.spatial_pool
