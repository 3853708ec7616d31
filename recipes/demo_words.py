"""Teaches a projector to write what videos show as the language model reads it: before the demo's stage on videos.

    python recipes/demo_words.py --out runs/demo-words [--videos 3000] [--steps 5000]
    python recipes/demo_words.py --out runs/demo-near-words --categories --projector-from runs/demo-other-2/adapter \
        --worlds recipes/data/world-words recipes/data/world-sorts recipes/data/world-sorts-styles --videos 1200 --steps 2500 \
        --learning-rate 5e-4

The scripts of the synthetic world say what each frame shows: a thing, which way it moves or in which corner it stays or
what it has changed to, a word on the screen. The nine visual tokens of a group of frames learn to choose the tokens of
these words, in this order, from the vocabulary of the language model, which then finds text where it has learned to read
text (`vocabulary_readout` of the projector's config). It does not run itself. To bring the words to their places, from
wherever the thing is, the Mamba layers learn with them.

With ``--categories`` a token also learns to say what sort of thing it is: animal, food, ... Of one in three of the things of
``storm world generate --things other`` it learns this alone: from these the language model learns, afterwards, what to make
of things that the projector has no name for.

It needs `storm setup-demo` and the videos of `storm world generate`.
"""

import argparse
import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.progress import track
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from storm_vlm.data.workers import worker_context
from storm_vlm.data.world import Script, tell
from storm_vlm.data.world.telling import Kind
from storm_vlm.data.world.things import load_things
from storm_vlm.errors import StormError
from storm_vlm.model import ComposeOptions, StormForConditionalGeneration, StormProcessor, TokenCompression
from storm_vlm.model.adapter import load_projector, save_adapter_settings, save_projector
from storm_vlm.model.default_model import compose_default_parts
from storm_vlm.model.modeling_storm import IGNORED_LABEL
from storm_vlm.video import read_video

NUM_FRAMES, COMPRESSION = 32, TokenCompression(temporal_pool=2, spatial_pool=4)
OPTIONS = ComposeOptions(
    {"vocabulary_readout": True},
    temporal_pool=2,
    spatial_pool=4,
    num_frames=NUM_FRAMES,
    frame_separator="timestamp",
)
# Tokens of a group of frames: of the thing's name, up to the last place, of what it does, of its category, of the word on the
# screen.
PLACES = {"name": range(4), "action": range(4, 6), "category": range(6, 7), "word": range(7, 9)}
NUM_PLACES = 9
HELD_OUT, BATCH_SIZE = 64, 4
WEIGHT_DECAY, WARM_UP_STEPS = 0.01, 50
# Weight of places without a word: they are many, and soon known.
EMPTY_WEIGHT = 0.3
NUM_DRAWN = 4096
# Of the things that are not the usual ones.
UNNAMED_ONE_IN = 3


@dataclass(frozen=True, slots=True)
class Videos:
    """Videos and what they say.

    Attributes:
        features: Patch features, ``(num_videos, t, h, w, c)``, bfloat16.
        token_ids: The tokens that each group of frames says, ``(num_videos, g, 9)``, or `IGNORED_LABEL` where none is asked for.
    """

    features: torch.Tensor
    token_ids: torch.Tensor


def words_of(frames: list[dict[Kind, str]], with_category: bool) -> dict[str, str]:
    """Returns the words of a group of frames: of most of them, and of the earlier ones where as many say another."""
    counts = {kind: Counter(frame[kind] for frame in frames if kind in frame) for kind in get_args(Kind)}
    words: dict[str, str] = {kind: count.most_common(1)[0][0] for kind, count in counts.items() if count}
    if with_category and "name" in words:
        words["category"] = load_things()[words["name"]].group
    return words


def empty_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token of a place without a word."""
    (empty,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return empty


def spell(words: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens of a group of frames, each word in its places; what is left of them says a new line."""
    token_ids = [empty_token(tokenizer)] * NUM_PLACES
    for kind, word in words.items():
        places = PLACES[kind]
        spelled = tokenizer(f" {word}", add_special_tokens=False)["input_ids"][: len(places)]
        first = places.stop - len(spelled) if kind == "name" else places.start
        token_ids[first : first + len(spelled)] = spelled
    if "category" in words and is_unnamed(words["name"]):
        token_ids[: PLACES["name"].stop] = [IGNORED_LABEL] * len(PLACES["name"])
    return token_ids


def is_unnamed(name: str) -> bool:
    """Whether the projector never learns this name."""
    is_chosen = int(hashlib.sha256(name.encode()).hexdigest(), 16) % UNNAMED_ONE_IN == 0
    return is_chosen and load_things()[name].is_other


class Frames(Dataset[tuple[torch.Tensor, tuple[float, ...]]]):
    """Pixels of each video's frames and their times."""

    def __init__(self, files: list[Path], processor: StormProcessor) -> None:
        self.files, self.video_processor = files, processor.video_processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, tuple[float, ...]]:
        video = read_video(self.files[index], num_frames=NUM_FRAMES, resize=self.video_processor.decode_size)
        return self.video_processor.to_pixel_values(video.frames), video.timestamps_seconds


def read_videos(
    files: list[Path], model: StormForConditionalGeneration, processor: StormProcessor, with_category: bool
) -> Videos:
    """Reads videos with their scripts and encodes them."""
    loader = DataLoader(
        Frames(files, processor),
        batch_size=None,
        num_workers=1,
        multiprocessing_context=worker_context(1),
    )
    group_size = COMPRESSION.temporal_pool
    token_ids = torch.empty(len(files), NUM_FRAMES // group_size, NUM_PLACES, dtype=torch.long)
    features = torch.empty(0)
    for number, (pixels, times) in enumerate(track(loader, "videos", total=len(files))):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            encoded = model.model.encode_patches(pixels).bfloat16()
        if number == 0:
            features = encoded.new_empty(len(files), *encoded.shape)
        features[number] = encoded
        script = Script.from_dict(json.loads(script_of(files[number]).read_text(encoding="utf-8")))
        told = [tell(script, seconds) for seconds in times]
        groups = [told[first : first + group_size] for first in range(0, NUM_FRAMES, group_size)]
        words = [words_of(group, with_category) for group in groups]
        token_ids[number] = torch.tensor([spell(group, processor.tokenizer) for group in words])
    return Videos(features, token_ids)


class Choosing:
    """The scores with which visual tokens choose from the vocabulary, and their loss.

    Shapes: ``b`` videos, ``g`` groups of frames, ``v`` tokens of the vocabulary.
    """

    def __init__(self, model: StormForConditionalGeneration, token_ids: torch.Tensor, empty: int) -> None:
        self.projector = model.temporal_projector
        self.empty = empty
        self.embeddings = model.get_input_embeddings().weight.detach()
        self.said = token_ids[token_ids != IGNORED_LABEL].unique()
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
        targets = torch.searchsorted(self.said, token_ids).masked_fill(
            token_ids == IGNORED_LABEL, IGNORED_LABEL
        )
        return functional.cross_entropy(
            scores.flatten(0, 2), targets.flatten(), self.weights, ignore_index=IGNORED_LABEL
        )


def find_videos(world: Path, most: int) -> list[Path]:
    """Returns the first videos of a world's training split that have a script."""
    videos = sorted((world / "train" / "videos").glob("*.mp4"))
    return [file for file in videos if script_of(file).is_file()][:most]


def script_of(video: Path) -> Path:
    """Returns where a video's script is."""
    return video.parents[1] / "scripts" / f"{video.stem}.json"


def right_shares(written: torch.Tensor, token_ids: torch.Tensor, empty: int) -> dict[str, float]:
    """Returns for each kind of word the share of its tokens that are right."""
    is_right, is_said = written == token_ids, (token_ids != empty) & (token_ids != IGNORED_LABEL)
    return {
        kind: float(is_right[..., list(places)][is_said[..., list(places)]].float().mean())
        for kind, places in PLACES.items()
        if is_said[..., list(places)].any()
    }


def train(
    choosing: Choosing, videos: Videos, is_held_out: torch.Tensor, num_steps: int, learning_rate: float
) -> None:
    """Trains the projector, and prints from time to time what it writes about the videos that are held out."""
    console = Console()
    parameters = list(choosing.projector.parameters())
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP_STEPS, num_steps)
    trained, held_out = (~is_held_out).nonzero().squeeze(1), is_held_out.nonzero().squeeze(1)
    for step in range(1, num_steps + 1):
        chosen = trained[torch.randint(len(trained), (BATCH_SIZE,))]
        loss = choosing.loss(videos.features[chosen], videos.token_ids[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            parts = held_out.split(BATCH_SIZE)
            with torch.no_grad():
                written = torch.cat([choosing.scores(videos.features[part]).argmax(-1) for part in parts])
            right = right_shares(written, videos.token_ids[held_out], choosing.empty)
            told = ", ".join(f"{kind} {share:.3f}" for kind, share in right.items())
            console.print(f"step {step}: loss {loss.item():.3f}, right on held-out videos: {told}")


def main() -> None:
    """Trains, and writes the projector as an adapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--worlds", type=Path, nargs="+", default=[Path("recipes/data/world")], help="folders of worlds"
    )
    parser.add_argument("--videos", type=int, default=3000, help="of each world, the first")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--categories", action="store_true", help="say what sort of thing it is, too")
    parser.add_argument("--projector-from", type=Path, help="go on from this adapter's projector")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    files, is_held_out = [], []
    for world in arguments.worlds:
        found = find_videos(world, arguments.videos)
        if len(found) <= HELD_OUT:
            parser.error(f"{world}: expected more videos than the {HELD_OUT} held out, found {len(found)}")
        files += found
        is_held_out += [False] * (len(found) - HELD_OUT) + [True] * HELD_OUT
    try:
        model, processor = compose_default_parts(OPTIONS)
        if arguments.projector_from is not None:
            load_projector(model, arguments.projector_from)
    except StormError as error:
        parser.error(str(error))
    model.requires_grad_(False)
    model.temporal_projector.requires_grad_(True)
    videos = read_videos(files, model, processor, arguments.categories)
    choosing = Choosing(model, videos.token_ids, empty_token(processor.tokenizer))
    train(choosing, videos, torch.tensor(is_held_out), arguments.steps, arguments.learning_rate)
    save_projector(model.temporal_projector.state_dict(), arguments.out)
    save_adapter_settings(model.config, processor, arguments.out)


if __name__ == "__main__":
    main()
