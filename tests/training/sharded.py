"""One sharded training step in each of several CPU processes; run by `test_sharding` with torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from storm_vlm.cli.processes import leave_process_group
from storm_vlm.data import Mixture, MixtureConfig, SetConfig, StormCollator, TrainingDataset
from storm_vlm.training.parts import prepare_parts, sharded_layer_names
from storm_vlm.training.recipe import LearningRates, LoraRecipe
from tests.model.tiny import make_model

# A batch of videos and pictures, and one of texts alone.
BATCHES = ((0, 4), (6, 7))


def make(with_lora: bool):
    torch.manual_seed(0)
    model, processor = make_model(temporal_pool=2, num_frames=4)
    rates = LearningRates(vision_tower=1e-3, temporal_projector=1e-3, language_model=1e-3)
    return prepare_parts(model, rates, LoraRecipe(rank=2) if with_lora else None).train(), processor


def shard(model):
    """Shards as FSDP2 through accelerate does: the named layers one by one, the rest together."""
    names = sharded_layer_names(model.get_base_model() if isinstance(model, PeftModel) else model)
    layers = [module for module in model.modules() if type(module).__name__ in names]
    assert layers
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


def batch_of(processor, corpus, numbers):
    dataset = TrainingDataset(Mixture(MixtureConfig((SetConfig("c", corpus),))), processor)
    batch = StormCollator(processor)([dataset[number] for number in numbers])
    batch.pop("bad_samples")
    return batch


def step(corpus: Path, with_lora: bool) -> dict[str, torch.Tensor]:
    """Returns every process's loss and the whole gradients of a sharded step."""
    rank = dist.get_rank()
    model, processor = make(with_lora)
    shard(model)
    loss = model(**batch_of(processor, corpus, BATCHES[rank])).loss
    loss.backward()
    gradients = {
        name: parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    losses = [torch.zeros(()) for _ in BATCHES]
    dist.all_gather(losses, loss.detach())
    return {**gradients, "loss": torch.stack(losses)}


def main(corpus: str, out: str, with_lora: str) -> None:
    dist.init_process_group("gloo")
    result = step(Path(corpus), with_lora == "lora")
    if dist.get_rank() == 0:
        save_file(result, out)
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
