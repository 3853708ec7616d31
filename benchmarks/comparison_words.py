"""The stage in which a projector of `comparison.py` learns words: every model alike, and before questions are asked.

A visual token chooses from the language model's vocabulary (`vocabulary_readout`). The tokens that a group of frames
keeps are to say between them the words for what these frames show: which of them says which is left to the model, so
that the stage is the same for one frame or four, one token or four.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from comparison_data import TRAIN, words_at
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from storm_vlm.data import TrainingDataset
from storm_vlm.data.world import Script
from storm_vlm.model import StormForConditionalGeneration, TokenCompression

# Weight of saying nothing else, beside the weight 1 of saying what is to be said.
SILENCE_WEIGHT = 0.5
NEVER = -1e4


class WordLoss(nn.Module):
    """A projector with the loss of what its tokens say.

    Args:
        model: The model whose projector learns.
        compression: Of the projector's tokens.
        empty: Token that stands for no word.
    """

    def __init__(
        self, model: StormForConditionalGeneration, compression: TokenCompression, empty: int
    ) -> None:
        super().__init__()
        self.projector = model.temporal_projector
        embeddings = model.get_input_embeddings().weight.detach()
        self.register_buffer("embeddings", embeddings / math.sqrt(embeddings.shape[1]), persistent=False)
        self.compression, self.empty = compression, empty

    def log_shares(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the logarithm of each token's choice, ``(videos, groups, tokens, vocabulary)``.

        Args:
            features: Patch features, ``(videos, t, h, w, c)``.
        """
        tokens = torch.stack([self.compression(video) for video in self.projector(list(features))])
        return nn.functional.linear(tokens.flatten(2, 3), self.embeddings).log_softmax(-1)

    def forward(self, features: torch.Tensor, said: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the loss.

        Args:
            features: Patch features, ``(videos, t, h, w, c)``.
            said: Whether a group is to say a token of the vocabulary, ``(videos, groups, vocabulary)``, bool.
        """
        log_shares = self.log_shares(features)
        of_group = log_shares.logsumexp(2).clamp(max=0)
        missed = -(of_group * said).sum(-1) / said.sum(-1)
        allowed = said.clone()
        allowed[..., self.empty] = True
        wrong = -log_shares.masked_fill(~allowed[:, :, None], NEVER).logsumexp(-1)
        return {"loss": missed.mean() + SILENCE_WEIGHT * wrong.mean()}


@dataclass(frozen=True, slots=True)
class Words(Dataset[dict[str, torch.Tensor]]):
    """Features of videos with what their groups of frames are to say.

    Attributes:
        examples: The videos, one an example, with cached features.
        world: Folder of the world.
        times_seconds: Of each frame, the same in all videos.
        group_size: Frames of a group.
        tokenizer: Of the language model.
        empty: Token that stands for no word.
        said: What the groups of each video that has been read are to say.
    """

    examples: TrainingDataset
    world: Path
    times_seconds: Sequence[float]
    group_size: int
    tokenizer: PreTrainedTokenizerBase
    empty: int
    said: dict[int, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of videos."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns `features` and `said` of `WordLoss.forward`, of one video."""
        if index not in self.said:
            self.said[index] = self._read(index)
        return {"features": self.examples[index]["video_patch_features"], "said": self.said[index]}

    def _read(self, index: int) -> torch.Tensor:
        file = self.world / TRAIN / "scripts" / f"{index:06d}.json"
        script = Script.from_dict(json.loads(file.read_text(encoding="utf-8")))
        starts = range(0, len(self.times_seconds), self.group_size)
        said = torch.zeros(len(starts), len(self.tokenizer), dtype=torch.bool)
        for group, start in enumerate(starts):
            words = words_at(script, self.times_seconds[start : start + self.group_size])
            token_ids = [i for word in words for i in self.tokenizer.encode(word, add_special_tokens=False)]
            said[group, token_ids or [self.empty]] = True
        return said


def teach_words(
    loss: WordLoss,
    words: Words,
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> float:
    """Trains a projector in place, and returns the loss of its last steps."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=seed,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model=loss, args=arguments, train_dataset=words)
    trainer.train()
    return next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)
