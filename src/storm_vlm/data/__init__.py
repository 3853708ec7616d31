"""Training data: records of any published form, mixtures of them, and the batches that a model is trained on."""

from storm_vlm.data.answers import render_with_answers
from storm_vlm.data.bad_samples import BadSampleLog
from storm_vlm.data.batches import TrainingBatches
from storm_vlm.data.collator import StormCollator
from storm_vlm.data.dataset import BadSample, TrainingDataset, estimate_lengths
from storm_vlm.data.example import encode_record, estimate_length
from storm_vlm.data.mixture import Mixture, MixtureConfig, SetConfig, read_mixture_config
from storm_vlm.data.readers import RecordSet, read_records
from storm_vlm.data.record import Item, Record, Turn

__all__ = [
    "BadSample",
    "BadSampleLog",
    "Item",
    "Mixture",
    "MixtureConfig",
    "Record",
    "RecordSet",
    "SetConfig",
    "StormCollator",
    "TrainingBatches",
    "TrainingDataset",
    "Turn",
    "encode_record",
    "estimate_length",
    "estimate_lengths",
    "read_mixture_config",
    "read_records",
    "render_with_answers",
]
