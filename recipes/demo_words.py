"""Teaches a projector to write what videos show as the language model reads it: before the demo's stage on videos.

    python recipes/demo_words.py --out runs/demo-words [--videos 3000] [--steps 5000]

The scripts of the synthetic world say what each frame shows: a thing, which way it moves or in which corner it stays or
what it has changed to, a word on the screen. The nine visual tokens of a group of frames learn to choose the tokens of
these words, in this order, from the vocabulary of the language model, which then finds text where it has learned to read
text (`vocabulary_readout` of the projector's config). It does not run itself. To bring the words to their places, from
wherever the thing is, the Mamba layers learn with them.

It needs `storm setup-demo` and the videos of `storm world generate --out recipes/data/world`.
"""

import argparse
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from storm_vlm.data.workers import worker_context
from storm_vlm.data.world import Script, tell
from storm_vlm.data.world.telling import Kind
from storm_vlm.errors import StormError
from storm_vlm.model import ComposeOptions, StormForConditionalGeneration, StormProcessor, TokenCompression
from storm_vlm.model.adapter import save_adapter_settings, save_projector
from storm_vlm.model.default_model import compose_default_parts
from storm_vlm.video import read_video

WORLD = Path("recipes/data/world/train")
NUM_FRAMES, COMPRESSION = 32, TokenCompression(temporal_pool=2, spatial_pool=4)
OPTIONS = ComposeOptions(
    {"vocabulary_readout": True},
    temporal_pool=2,
    spatial_pool=4,
    num_frames=NUM_FRAMES,
    frame_separator="timestamp",
)
# Tokens of a group: of the thing's name, up to the last place, of what it does, none, of the word on the screen.
PLACES: dict[Kind, range] = {"name": range(4), "action": range(4, 6), "word": range(7, 9)}
NUM_PLACES = 9
HELD_OUT, BATCH_SIZE = 64, 4
LEARNING_RATE, WEIGHT_DECAY, WARM_UP_STEPS = 1e-3, 0.01, 50
# Weight of places without a word: they are many, and soon known.
EMPTY_WEIGHT = 0.3
NUM_DRAWN = 4096


@dataclass(frozen=True, slots=True)
class Videos:
    """Videos and what they say.

    Attributes:
        features: Patch features, ``(num_videos, t, h, w, c)``, bfloat16.
        token_ids: The tokens that each group of frames says, ``(num_videos, g, 9)``.
    """

    features: torch.Tensor
    token_ids: torch.Tensor


def spell(frames: list[dict[Kind, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens of a group of frames, each kind of word in its places; what is left of them says a new line.

    Of each kind the word of most frames counts, and of the earlier ones where as many say another.
    """
    (empty,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    token_ids = [empty] * NUM_PLACES
    for kind, places in PLACES.items():
        words = Counter(frame[kind] for frame in frames if kind in frame).most_common(1)
        if words:
            spelled = tokenizer(f" {words[0][0]}", add_special_tokens=False)["input_ids"][: len(places)]
            first = places.stop - len(spelled) if kind == "name" else places.start
            token_ids[first : first + len(spelled)] = spelled
    return token_ids


class Frames(Dataset[tuple[torch.Tensor, tuple[float, ...]]]):
    """Pixels of each video's frames and their times."""

    def __init__(self, scripts: list[Script], processor: StormProcessor) -> None:
        self.scripts, self.video_processor = scripts, processor.video_processor

    def __len__(self) -> int:
        return len(self.scripts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, tuple[float, ...]]:
        file = WORLD / "videos" / f"{self.scripts[index].index:06d}.mp4"
        video = read_video(file, num_frames=NUM_FRAMES, resize=self.video_processor.decode_size)
        return self.video_processor.to_pixel_values(video.frames), video.timestamps_seconds


def read_videos(
    scripts: list[Script], model: StormForConditionalGeneration, processor: StormProcessor
) -> Videos:
    """Reads videos with their scripts and encodes them."""
    loader = DataLoader(
        Frames(scripts, processor),
        batch_size=None,
        num_workers=1,
        multiprocessing_context=worker_context(1),
    )
    group_size = COMPRESSION.temporal_pool
    token_ids = torch.empty(len(scripts), NUM_FRAMES // group_size, NUM_PLACES, dtype=torch.long)
    features = torch.empty(0)
    for number, (pixels, times) in enumerate(track(loader, "videos", total=len(scripts))):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            encoded = model.model.encode_patches(pixels).bfloat16()
        if number == 0:
            features = encoded.new_empty(len(scripts), *encoded.shape)
        features[number] = encoded
        told = [tell(scripts[number], seconds) for seconds in times]
        groups = [told[first : first + group_size] for first in range(0, NUM_FRAMES, group_size)]
        token_ids[number] = torch.tensor([spell(group, processor.tokenizer) for group in groups])
    return Videos(features, token_ids)


class Choosing:
    """The scores with which visual tokens choose from the vocabulary, and their loss.

    Shapes: ``b`` videos, ``g`` groups of frames, ``v`` tokens of the vocabulary.
    """

    def __init__(self, model: StormForConditionalGeneration, token_ids: torch.Tensor, empty: int) -> None:
        self.projector = model.temporal_projector
        self.embeddings = model.get_input_embeddings().weight.detach()
        self.said = token_ids.unique()
        is_said = torch.isin(torch.arange(len(self.embeddings)), self.said)
        self.never_said = (~is_said).nonzero().squeeze(1)
        self.weights = torch.ones(len(self.said) + NUM_DRAWN)
        self.weights[torch.searchsorted(self.said, empty)] = EMPTY_WEIGHT

    def scores(self, features: torch.Tensor, candidates: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Returns the scores of the vocabulary or of some of its tokens, ``(b, g, 9, v)``: see `vocabulary_readout`."""
        with torch.autocast("cpu", torch.bfloat16):
            videos = self.projector(list(features.float()))
            tokens = torch.stack([COMPRESSION(video) for video in videos]).flatten(2, 3)
            embeddings = self.embeddings[candidates] / math.sqrt(self.embeddings.shape[1])
            return functional.linear(tokens, embeddings).float()

    def loss(self, features: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Returns the cross entropy; of the tokens that no video says some are drawn, and stand for all of them."""
        drawn = self.never_said[torch.randint(len(self.never_said), (NUM_DRAWN,))]
        scores = self.scores(features, torch.cat([self.said, drawn]))
        scores[..., len(self.said) :] += math.log(len(self.never_said) / NUM_DRAWN)
        targets = torch.searchsorted(self.said, token_ids)
        return functional.cross_entropy(scores.flatten(0, 2), targets.flatten(), self.weights)


def right_shares(written: torch.Tensor, token_ids: torch.Tensor, empty: int) -> dict[str, float]:
    """Returns for each kind of word the share of its tokens that are right."""
    is_right, is_said = written == token_ids, token_ids != empty
    return {
        kind: float(is_right[..., list(places)][is_said[..., list(places)]].float().mean())
        for kind, places in PLACES.items()
    }


def main() -> None:
    """Trains, and writes the projector as an adapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=5000)
    arguments = parser.parse_args()
    console = Console()
    torch.manual_seed(0)
    files = sorted((WORLD / "scripts").glob("*.json"))[: arguments.videos]
    if len(files) <= HELD_OUT:
        parser.error(f"--videos: expected more than the {HELD_OUT} that are held out, found {len(files)}")
    scripts = [Script.from_dict(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    try:
        model, processor = compose_default_parts(OPTIONS)
    except StormError as error:
        parser.error(str(error))
    model.requires_grad_(False)
    projector = model.temporal_projector.requires_grad_(True)
    videos = read_videos(scripts, model, processor)
    (empty,) = processor.tokenizer("\n", add_special_tokens=False)["input_ids"]
    choosing = Choosing(model, videos.token_ids, empty)
    held_out, num_trained = torch.arange(len(files) - HELD_OUT, len(files)), len(files) - HELD_OUT
    optimizer = torch.optim.AdamW(projector.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP_STEPS, arguments.steps)
    for step in range(1, arguments.steps + 1):
        chosen = torch.randint(num_trained, (BATCH_SIZE,))
        loss = choosing.loss(videos.features[chosen], videos.token_ids[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            parts = held_out.split(BATCH_SIZE)
            with torch.no_grad():
                written = torch.cat([choosing.scores(videos.features[part]).argmax(-1) for part in parts])
            right = right_shares(written, videos.token_ids[held_out], empty)
            told = ", ".join(f"{kind} {share:.3f}" for kind, share in right.items())
            console.print(f"step {step}: loss {loss.item():.3f}, right on held-out videos: {told}")
    save_projector(projector.state_dict(), arguments.out)
    save_adapter_settings(model.config, processor, arguments.out)


if __name__ == "__main__":
    main()
