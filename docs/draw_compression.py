"""Draws what each token compression leaves of a film, for docs/concepts.md.

    python docs/draw_compression.py          # writes docs/pictures/compression.png

The film is made here: a ball crosses the picture and turns from blue to red. `TokenCompression` compresses its pixels as
it does a model's tokens.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from storm_vlm.model import TokenCompression

PICTURE = Path(__file__).parent / "pictures" / "compression.png"
NUM_FRAMES, SIDE, RADIUS = 8, 48, 6
ROWS = {
    "none": TokenCompression(),
    "temporal_pool=4": TokenCompression(temporal_pool=4),
    "spatial_pool=16": TokenCompression(spatial_pool=16),
    "temporal_sample=2": TokenCompression(temporal_sample=2),
    "temporal_pool=4,\ntemporal_sample=2": TokenCompression(temporal_pool=4, temporal_sample=2),
    "temporal_pool=4,\nspatial_pool=16": TokenCompression(temporal_pool=4, spatial_pool=16),
}


def make_film() -> torch.Tensor:
    """Returns frames in 0..1, ``(t, h, w, 3)``."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    frames = torch.full((NUM_FRAMES, SIDE, SIDE, 3), 0.93)
    for t in range(NUM_FRAMES):
        share = t / (NUM_FRAMES - 1)
        x = RADIUS + 1 + share * (SIDE - 2 * RADIUS - 3)
        ball = (columns - x) ** 2 + (rows - SIDE / 2) ** 2 < RADIUS**2
        frames[t][ball] = torch.tensor([0.15 + 0.75 * share, 0.2, 0.9 - 0.75 * share])
    return frames


def draw() -> Figure:
    """Draws a row of pictures for each compression, each where its frames were."""
    film = make_film()
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    panels = figure.subplots(len(ROWS), NUM_FRAMES)
    for line, (name, compression) in zip(panels, ROWS.items(), strict=True):
        left = compression(film)
        share = left[..., 0].numel() / film[..., 0].numel()
        line[0].text(
            -0.15, 0.5, f"{name}\n{100 * share:g}%", transform=line[0].transAxes, ha="right", va="center"
        )
        for axes in line:
            axes.axis("off")
        for group, picture in enumerate(left):
            axes = line[group * compression.frames_per_group]
            axes.imshow(picture.numpy(), vmin=0, vmax=1, interpolation="nearest")
    for t, axes in enumerate(panels[0]):
        axes.set_title(f"frame {t}", fontsize=9)
    return figure


def main() -> None:
    """Writes the picture."""
    PICTURE.parent.mkdir(exist_ok=True)
    draw().savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
