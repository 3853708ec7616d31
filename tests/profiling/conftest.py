"""A fixed profile whose figures are easy to work out by hand."""

import pytest

from storm_vlm.profiling import Measurement, ProfileReport, Setting, Skipped, parse_compression
from tests.pipeline.conftest import clip, model_folder, video_qa  # noqa: F401 (fixtures)

FLOPS = {"vision": 2_000_000_000, "projector": 10**9, "compression": 0, "prefill": 3 * 10**9, "token": 10**9}


def measurement(
    num_frames: int, compression: str, prefill: list[float], num_visual_tokens: int
) -> Measurement:
    """Three repeats in which prefill alone differs; the other parts take 1.1 seconds, 0.6 of them the model's."""
    return Measurement(
        setting=Setting(num_frames, parse_compression(compression)),
        num_visual_tokens=num_visual_tokens,
        num_uncompressed_tokens=256 * num_frames,
        num_prompt_tokens=num_visual_tokens + 40,
        kv_cache_bytes=num_visual_tokens * 1024,
        peak_over_idle_bytes=3 * 2**20,
        seconds={
            "decode": [0.4] * 3,
            "vision": [0.5] * 3,
            "projector": [0.09] * 3,
            "compression": [0.01] * 3,
            "prefill": prefill,
            "other": [0.1] * 3,
        },
        token_seconds=[0.03, 0.02, 0.01],
        flops=dict(FLOPS),
    )


@pytest.fixture
def report() -> ProfileReport:
    return ProfileReport(
        facts={"model": {"name": "A & B <tiny>"}, "machine": {"gpu": None, "threads": 2}},
        measurements=[
            measurement(256, "none", [2.4, 2.0, 2.9], 65536),
            measurement(256, "8", [0.4, 0.3, 0.5], 8192),
            measurement(256, "S.pool", [0.6, 0.6, 0.6], 16384),
            measurement(4, "none", [0.2, 0.2, 0.2], 1024),
            measurement(4, "8", [0.2, 0.2, 0.2], 256),
        ],
        skipped=[Skipped(Setting(512, parse_compression("none")), "it does not fit")],
    )
