"""Teaches a projector to write what videos show as the language model reads it: before the demo's stage on videos.

    python recipes/demo_words.py --out runs/demo-words [--videos 2000] [--steps 2600]

The scripts of the synthetic world say what each frame shows: a thing, which way it moves or in which corner it stays or
what it has changed to, a word on the screen. The nine visual tokens of a group of frames are drawn to the embeddings of the
tokens of these words, in this order, so that the language model finds text where it has learned to read text. It does not
run itself. That the Mamba layers have to bring the words to their places, from wherever the thing is, they learn with them.

It needs `storm setup-demo` and the videos of `storm world generate --out recipes/data/world`.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from storm_vlm.data.world import Script
from storm_vlm.data.world.questions import CORNERS
from storm_vlm.data.world.rendering import position
from storm_vlm.model import StormForConditionalGeneration, StormProcessor, TokenCompression
from storm_vlm.model.adapter import save_adapter_settings, save_projector
from storm_vlm.model.default_model import compose_default_parts
from storm_vlm.video import read_video

WORLD = Path("recipes/data/world/train")
NUM_FRAMES, COMPRESSION = 32, TokenCompression(temporal_pool=4, spatial_pool=4)
# Tokens of a group: of the thing's name, of what it does, none, of the word on the screen.
PLACES = {"name": range(3), "action": range(3, 5), "word": range(6, 9)}
NUM_PLACES = 9
HELD_OUT, BATCH_SIZE = 64, 4
LEARNING_RATE, WEIGHT_DECAY, WARM_UP_STEPS = 1e-3, 0.01, 50
# Weight of the distance to an embedding, of places without a word, and how sharply tokens are told apart by the angle.
DISTANCE_WEIGHT, EMPTY_WEIGHT, SHARPNESS = 0.5, 0.1, 12.0


@dataclass(frozen=True, slots=True)
class Videos:
    """Videos and what they say.

    Attributes:
        features: Patch features, ``(num_videos, t, h, w, c)``, bfloat16.
        token_ids: The tokens that each frame says, ``(num_videos, t, 9)``.
    """

    features: torch.Tensor
    token_ids: torch.Tensor


def tell(script: Script, seconds: float) -> dict[str, str]:
    """Returns the words of each kind that a frame has to say."""
    told = {}
    for text in script.texts:
        if text.start_seconds <= seconds < text.end_seconds:
            told["word"] = text.word
    for index, appearance in enumerate(script.appearances):
        if not appearance.start_seconds <= seconds < appearance.end_seconds:
            continue
        changes = [c for c in script.changes if c.appearance == index and seconds >= c.at_seconds]
        told["name"] = next((c.into for c in changes if c.into), appearance.thing)
        x, y = position(appearance, seconds)
        looks = [c.kind for c in changes if not c.into]
        if looks:
            told["action"] = looks[0]
        elif appearance.motion != "still":
            told["action"] = appearance.motion
        elif min(abs(x - 1 / 2), abs(y - 1 / 2)) > 1 / 6:
            told["action"] = CORNERS[2 * (y > 1 / 2) + (x > 1 / 2)]
    return told


def spell(told: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens of a frame's words, each kind in its places; what is left of them says a new line."""
    (empty,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    token_ids = [empty] * NUM_PLACES
    for kind, word in told.items():
        spelled = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        for place, token_id in zip(PLACES[kind], spelled, strict=False):
            token_ids[place] = token_id
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
    loader = DataLoader(Frames(scripts, processor), batch_size=None, num_workers=1)
    token_ids = torch.empty(len(scripts), NUM_FRAMES, NUM_PLACES, dtype=torch.long)
    features = torch.empty(0)
    for number, (pixels, times) in enumerate(track(loader, "videos", total=len(scripts))):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            encoded = model.model.encode_patches(pixels).bfloat16()
        if number == 0:
            features = encoded.new_empty(len(scripts), *encoded.shape)
        features[number] = encoded
        said = [spell(tell(scripts[number], seconds), processor.tokenizer) for seconds in times]
        token_ids[number] = torch.tensor(said)
    return Videos(features, token_ids)


class Telling:
    """The loss of a projector's tokens against the embeddings of words.

    Shapes: ``b`` videos, ``g`` groups of four frames, ``v`` tokens that videos say, ``d`` the language model's width.
    """

    def __init__(
        self, videos: Videos, model: StormForConditionalGeneration, processor: StormProcessor
    ) -> None:
        self.features, self.projector = videos.features, model.temporal_projector
        vocabulary, said = videos.token_ids.unique(return_inverse=True)
        self.said = said.unflatten(1, (-1, COMPRESSION.temporal_pool))  # (num_videos, g, 4, 9)
        embeddings = model.get_input_embeddings().weight.detach()
        self.mean = embeddings.mean(0)
        self.size = (embeddings - self.mean).square().mean().sqrt()
        self.embeddings = embeddings[vocabulary] - self.mean
        (empty,) = processor.tokenizer("\n", add_special_tokens=False)["input_ids"]
        self.empty = int((vocabulary == empty).nonzero())
        # New weights make tokens that are larger: they are trained as they are and brought to size afterwards.
        self.ratio = 1.0
        with torch.no_grad():
            tokens = self.tokens(torch.arange(BATCH_SIZE)) + self.mean
        self.ratio = float(tokens.square().mean().sqrt() / self.size)

    def tokens(self, chosen: torch.Tensor) -> torch.Tensor:
        """Returns the tokens of videos, ``(b, g, 9, d)``, without the mean embedding."""
        with torch.autocast("cpu", torch.bfloat16):
            videos = self.projector(list(self.features[chosen].float()))
        tokens = torch.stack([COMPRESSION(video) for video in videos]).flatten(2, 3).float()
        return tokens / self.ratio - self.mean

    @torch.no_grad()
    def rescale(self) -> None:
        """Brings the projector's tokens to the size of embeddings: its Mamba layers begin with a norm."""
        for name, parameter in self.projector.named_parameters():
            if name.startswith("input_projection") or name.endswith("out_proj.weight"):
                parameter /= self.ratio

    def loss(self, chosen: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the loss and, for each kind of word, the share of right tokens where four frames say the same."""
        tokens, said = self.tokens(chosen), self.said[chosen].transpose(2, 3)  # (b, g, 9, 4)
        shares = functional.one_hot(said, len(self.embeddings)).float().mean(3)  # (b, g, 9, v)
        angles = functional.normalize(tokens, dim=-1) @ functional.normalize(self.embeddings, dim=-1).T
        missed = -(shares * functional.log_softmax(SHARPNESS * angles, -1)).sum(-1)
        distance = ((tokens - shares @ self.embeddings) / self.size).square().mean(-1)
        is_empty = shares[..., self.empty] == 1
        weights = torch.where(is_empty, EMPTY_WEIGHT, 1.0)
        loss = ((missed + DISTANCE_WEIGHT * distance) * weights).sum() / weights.sum()
        is_right = shares.gather(-1, angles.argmax(-1, keepdim=True)).squeeze(-1) == 1
        is_clear = (shares.amax(-1) == 1) & ~is_empty
        right = {
            kind: float(is_right[..., list(places)][is_clear[..., list(places)]].float().mean())
            for kind, places in PLACES.items()
        }
        return loss, right


def main() -> None:
    """Trains, and writes the projector as an adapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2600)
    arguments = parser.parse_args()
    console = Console()
    torch.manual_seed(0)
    files = sorted((WORLD / "scripts").glob("*.json"))[: arguments.videos]
    if len(files) <= HELD_OUT:
        parser.error(f"--videos: expected more than the {HELD_OUT} that are held out, found {len(files)}")
    scripts = [Script.from_dict(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    model, processor = compose_default_parts()
    telling = Telling(read_videos(scripts, model, processor), model, processor)
    held_out, num_trained = torch.arange(len(files) - HELD_OUT, len(files)), len(files) - HELD_OUT
    optimizer = torch.optim.AdamW(
        telling.projector.requires_grad_(True).parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP_STEPS, arguments.steps)
    for step in range(1, arguments.steps + 1):
        loss, _ = telling.loss(torch.randint(num_trained, (BATCH_SIZE,)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(telling.projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            with torch.no_grad():
                _, right = telling.loss(held_out)
            told = ", ".join(f"{kind} {share:.3f}" for kind, share in right.items())
            console.print(f"step {step}: loss {loss.item():.3f}, right on held-out videos: {told}")
    telling.rescale()
    save_projector(telling.projector.state_dict(), arguments.out)
    save_adapter_settings(model.config, processor, arguments.out)


if __name__ == "__main__":
    main()
