"""The paper's own figures, to stand beside those that are measured.

Source: STORM (arXiv 2503.04130), Table 13: one A100-80G, SigLIP at 448 pixels and Qwen2-7B.
"""

from dataclasses import dataclass

MACHINE = "one A100-80G, SigLIP at 448 pixels and Qwen2-7B"


@dataclass(frozen=True, slots=True)
class PaperLatency:
    """Latency of the paper's model, in milliseconds; the total is the sum of the three parts.

    Attributes:
        total: From pixels to the first token.
        language_model: Prefill.
        vision: Vision encoder.
        projector: Temporal projector.
    """

    total: int
    language_model: int
    vision: int
    projector: int


# By number of frames and how many times fewer tokens the compression leaves.
TABLE_13: dict[tuple[int, int], PaperLatency] = {
    (8, 1): PaperLatency(271, 175, 85, 11),
    (32, 1): PaperLatency(934, 623, 269, 41),
    (64, 1): PaperLatency(1910, 1310, 515, 82),
    (128, 1): PaperLatency(4270, 3090, 1020, 163),
    (256, 1): PaperLatency(10340, 7960, 2030, 348),
    (512, 1): PaperLatency(28620, 23710, 4090, 812),
    (32, 4): PaperLatency(487, 176, 270, 41),
    (128, 4): PaperLatency(1800, 622, 1010, 163),
    (256, 4): PaperLatency(3680, 1310, 2020, 349),
    (512, 4): PaperLatency(7950, 3080, 4060, 812),
    (64, 8): PaperLatency(772, 175, 515, 83),
    (128, 8): PaperLatency(1500, 323, 1020, 163),
    (256, 8): PaperLatency(3000, 623, 2030, 349),
    (512, 8): PaperLatency(6200, 1310, 4070, 815),
}
