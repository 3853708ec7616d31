"""Fills the cache of a frozen vision encoder's features before training."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging as library_logging

from storm_vlm.data import TrainingDataset
from storm_vlm.data.dataset import RECORD_ERRORS
from storm_vlm.data.feature_cache import PIXEL_NAMES, FeatureCache
from storm_vlm.data.workers import worker_context
from storm_vlm.model import StormForConditionalGeneration, StormProcessor
from storm_vlm.pipeline.identity import weights_hash
from storm_vlm.training.parts import base_model

# Settings of the processors that pixels do not depend on: what is done with an encoder's features afterwards.
_LATER_SETTINGS = ("downsample", "temporal_pool", "spatial_pool", "temporal_sample", "token_budget")


def cache_features(
    dataset: TrainingDataset,
    model: Any,
    folder: Path,
    *,
    device: torch.device,
    bf16: bool,
    num_workers: int,
) -> FeatureCache:
    """Encodes all pictures and videos of a data set that are not in the cache; processes share the work.

    Args:
        dataset: The records; those that cannot be used are passed over, and are reported when training meets them.
        model: The model in training, within peft's or not.
        folder: Folder of the cache.
        device: Where the encoder runs.
        bf16: Compute as training with this setting does.
        num_workers: Processes that decode videos.

    Returns:
        The cache, which holds every record that can be used.
    """
    storm = base_model(model)
    cache = FeatureCache(folder, _media_context(storm, dataset.processor, bf16), _text_context(dataset))
    state = PartialState()
    missing = _MissingExamples(dataset, cache, range(state.process_index, len(dataset), state.num_processes))
    storm.vision_tower.to(device)
    loader = DataLoader(
        missing,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=worker_context(num_workers),
    )
    progress = library_logging.tqdm(
        loader, desc="vision features", total=len(missing), disable=not state.is_main_process
    )
    for index, example in progress:
        if example is not None:
            record = dataset.mixture[index]
            features = {
                kind: _encode(storm, example[name], device, bf16)
                for kind, name in PIXEL_NAMES.items()
                if name in example and not cache.holds_features(record, kind)
            }
            cache.save(record, example, features)
    state.wait_for_everyone()
    return cache


class _MissingExamples(Dataset[tuple[int, dict[str, torch.Tensor] | None]]):
    """Examples with pixels; None for those that the cache has, and for records that cannot be used."""

    def __init__(self, dataset: TrainingDataset, cache: FeatureCache, indices: range) -> None:
        self._dataset, self._cache, self._indices = dataset, cache, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: int) -> tuple[int, dict[str, torch.Tensor] | None]:
        index = self._indices[number]
        try:
            if not self._cache.holds(self._dataset.mixture[index]):
                return index, self._dataset.encode(index)
        except RECORD_ERRORS:
            pass
        return index, None


@torch.no_grad()
def _encode(
    model: StormForConditionalGeneration, pixel_values: torch.Tensor, device: torch.device, bf16: bool
) -> torch.Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model.model.encode_patches(pixel_values.to(device)).cpu()


def _media_context(model: StormForConditionalGeneration, processor: StormProcessor, bf16: bool) -> str:
    """Returns a hash of what features depend on beside the files."""
    pictures = [
        {name: value for name, value in part.to_dict().items() if name not in _LATER_SETTINGS}
        for part in (processor.image_processor, processor.video_processor)
    ]
    settings = [pictures, model.config.vision_feature_layer, bf16]
    return weights_hash(json.dumps(settings, sort_keys=True, default=str), model.vision_tower)


def _text_context(dataset: TrainingDataset) -> str:
    """Returns a hash of what texts depend on beside the records."""
    processor = dataset.processor
    settings = [
        processor.to_dict(),
        processor.tokenizer.get_vocab(),
        dataset.max_length,
        dataset.temporal_sample,
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
