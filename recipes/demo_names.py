"""Teaches a projector to write the names of things as the language model does: before the demo's stage on videos.

    python recipes/demo_names.py --adapter runs/demo-align/adapter --out runs/demo-names [--pictures 14000] [--steps 350]

A visual token in the place of a thing is drawn to the mean embedding of its name's tokens, all others to that of a full
stop; the language model itself does not run. Pictures are shown as videos of eight, four frames each, so that the Mamba
layers learn to keep moments apart. A projector trained through a few layers of the language model begins with tokens two
orders of magnitude larger than embeddings, whose meaning later layers cannot change: it is brought to their size first.

It needs `storm setup-demo` and the pictures of `storm world generate --out recipes/data/world`.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from storm_vlm.model import StormForConditionalGeneration, StormProcessor, TokenCompression
from storm_vlm.model.adapter import load_projector, save_adapter_settings, save_projector
from storm_vlm.model.default_model import compose_default_parts

PICTURES = Path("recipes/data/world/train/pictures.json")
CAPTION = re.compile(r"^(?:An?|Some|The)?\s*(.*?) (?:in the|at the|on the) (.*?)\.(?: The screen|$)")
COMPRESSION = TokenCompression(temporal_pool=4, spatial_pool=4)  # 3x3 tokens a group
GROUPS, VIDEOS = 8, 3
HELD_OUT = 512
LEARNING_RATE, WARM_UP_STEPS = 5e-4, 20
# Weights of the terms of the loss, and how sharply names are told apart by the angle between them.
SIZE_WEIGHT, EMPTY_WEIGHT, SHARPNESS = 0.3, 0.1, 20.0


@dataclass(frozen=True, slots=True)
class Things:
    """Pictures of things.

    Attributes:
        features: Patch features, ``(num_pictures, h, w, c)``, bfloat16.
        names: Number of each picture's name, ``(num_pictures,)``.
        cells: Place of each thing in the grid of tokens, row by row, ``(num_pictures,)``.
        vocabulary: The names.
    """

    features: torch.Tensor
    names: torch.Tensor
    cells: torch.Tensor
    vocabulary: list[str]


def read_things(num_pictures: int, model: StormForConditionalGeneration, processor: StormProcessor) -> Things:
    """Reads pictures with their captions and encodes them."""
    rows = json.loads(PICTURES.read_text(encoding="utf-8"))
    chosen = np.random.default_rng(0).permutation(len(rows))[:num_pictures]
    found = [(rows[i], CAPTION.match(rows[i]["conversations"][1]["value"])) for i in chosen]
    things = [(row["image"], match[1].lower(), _cell(match[2])) for row, match in found if match]
    vocabulary = sorted({name for _, name, _ in things})
    features = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in track(range(0, len(things), 64), "pictures"):
            files = [PICTURES.parent / file for file, _, _ in things[start : start + 64]]
            frames = np.stack([np.array(Image.open(file).convert("RGB")) for file in files])
            pixels = processor.video_processor.to_pixel_values(frames)
            features.append(model.model.encode_patches(pixels).bfloat16())
    return Things(
        torch.cat(features),
        torch.tensor([vocabulary.index(name) for _, name, _ in things]),
        torch.tensor([cell for _, _, cell in things]),
        vocabulary,
    )


def _cell(place: str) -> int:
    row = 0 if "top" in place else 2 if "bottom" in place else 1
    column = 0 if "left" in place else 2 if "right" in place else 1
    return 3 * row + column


class Naming:
    """The loss of a projector's tokens against embeddings.

    Shapes: ``b`` videos, ``g`` groups, ``d`` the language model's width.
    """

    def __init__(
        self, things: Things, model: StormForConditionalGeneration, processor: StormProcessor
    ) -> None:
        self.things, self.projector = things, model.temporal_projector
        embeddings, tokenizer = model.get_input_embeddings().weight.detach(), processor.tokenizer

        def embed(text: str) -> torch.Tensor:
            return embeddings[tokenizer(text, add_special_tokens=False)["input_ids"]].mean(0)

        self.names = torch.stack([embed(f" {name}") for name in things.vocabulary])
        self.empty = embed(".")
        self.size = self.names.square().mean().sqrt()

    def tokens(self, pictures: torch.Tensor) -> torch.Tensor:
        """Returns the tokens of videos of ``g`` pictures each, ``(b, g, 9, d)``."""
        features = self.things.features[pictures].float().unflatten(0, (-1, GROUPS))
        videos = features.repeat_interleave(COMPRESSION.temporal_pool, dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = self.projector(list(videos))
        return torch.stack([COMPRESSION(video) for video in tokens]).flatten(2, 3).float()

    @torch.no_grad()
    def rescale(self) -> float:
        """Brings the tokens to the size of embeddings; returns how many times larger they were."""
        ratio = float(self.tokens(torch.arange(4 * GROUPS)).square().mean().sqrt() / self.size)
        for name, parameter in self.projector.named_parameters():
            if name.startswith("input_projection") or name.endswith("out_proj.weight"):
                parameter /= ratio
        return ratio

    def loss(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss and the share of tokens in a thing's place that are nearest to its name."""
        tokens = self.tokens(pictures)
        cells = self.things.cells[pictures].view(tokens.shape[:2])
        names = self.things.names[pictures].view(tokens.shape[:2])
        place = cells[..., None, None].expand(-1, -1, 1, tokens.shape[-1])
        things = tokens.gather(2, place)[:, :, 0]
        mean = self.names.mean(0)
        scores = (
            SHARPNESS
            * functional.normalize(things - mean, dim=-1)
            @ functional.normalize(self.names - mean, dim=-1).T
        )
        loss = functional.cross_entropy(scores.flatten(0, 1), names.flatten())
        loss = loss + SIZE_WEIGHT * ((things - self.names[names]) / self.size).square().mean()
        loss = loss + EMPTY_WEIGHT * ((tokens - self.empty) / self.size).square().mean()
        return loss, (scores.argmax(-1) == names).float().mean()


def batches(num_pictures: int, steps: int) -> Iterator[torch.Tensor]:
    """Yields random pictures, as many as a step takes."""
    for _ in range(steps):
        yield torch.randint(num_pictures - HELD_OUT, (VIDEOS * GROUPS,))


def main() -> None:
    """Trains, and writes the projector as an adapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, required=True, help="whose projector to begin with")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=14000)
    parser.add_argument("--steps", type=int, default=350)
    arguments = parser.parse_args()
    console = Console()
    torch.manual_seed(0)
    model, processor = compose_default_parts()
    load_projector(model, arguments.adapter)
    naming = Naming(read_things(arguments.pictures, model, processor), model, processor)
    num_pictures = len(naming.things.names)
    if num_pictures <= HELD_OUT:
        parser.error(f"--pictures: expected more than the {HELD_OUT} that are held out, got {num_pictures}")
    held_out = torch.arange(num_pictures - HELD_OUT, num_pictures)[: 6 * GROUPS]
    console.print(f"tokens were {naming.rescale():.0f} times as large as embeddings")
    optimizer = torch.optim.AdamW(
        naming.projector.requires_grad_(True).parameters(), LEARNING_RATE, weight_decay=0
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP_STEPS, arguments.steps)
    for step, pictures in enumerate(batches(num_pictures, arguments.steps), 1):
        loss, _ = naming.loss(pictures)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(naming.projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            with torch.no_grad():
                _, accuracy = naming.loss(held_out)
            console.print(
                f"step {step}: loss {loss.item():.3f}, names right on held-out pictures {accuracy:.3f}"
            )
    save_projector(naming.projector.state_dict(), arguments.out)
    save_adapter_settings(model.config, processor, arguments.out)


if __name__ == "__main__":
    main()
