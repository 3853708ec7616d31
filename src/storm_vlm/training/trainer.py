"""transformers' Trainer with our batches, a learning rate for each part, and figures of the run in its log."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from storm_vlm.data import BadSampleLog, TrainingBatches
from storm_vlm.data.workers import worker_context
from storm_vlm.errors import RecipeError
from storm_vlm.training.parts import parameter_groups
from storm_vlm.training.recipe import LearningRates, Recipe
from storm_vlm.training.throughput import Throughput


class StormTrainer(Trainer):
    """The Trainer's own loop; only what it offers to be overridden is.

    Args:
        batches: Batches of the whole run.
        bad_samples: Counts records that could not be used.
        learning_rates: Learning rate of each part.
        **options: Those of `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        batches: TrainingBatches,
        bad_samples: BadSampleLog,
        learning_rates: LearningRates,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._batches = batches
        self._bad_samples = bad_samples
        self._learning_rates = learning_rates
        self._throughput = Throughput()

    def get_train_dataloader(self) -> DataLoader:
        """Returns the loader of the whole run's batches, which accelerate deals out to the processes."""
        num_workers = self.args.dataloader_num_workers
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=num_workers,
            multiprocessing_context=worker_context(num_workers),
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Makes the Trainer's optimizer with one group for each part and decay."""
        model = self.model if model is None else model
        if self.optimizer is None:  # type: ignore[has-type]  # the Trainer sets it
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            decayed = set(self.get_decay_parameter_names(model))
            groups = parameter_groups(model, self._learning_rates, self.args.weight_decay, decayed)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """Takes the next batches; bad records that they replace are counted, and stop the run if too many."""
        return super().get_batch_samples(self._checked(epoch_iterator), num_batches, device)

    def compute_loss(self, model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        """Computes the loss of a batch, without the scores that it does not need."""
        return super().compute_loss(model, {**inputs, "skip_logits": True}, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the figures of the run to the lines that report a loss."""
        if "loss" in logs:
            logs = {**logs, **self._throughput.take(), "num_bad_samples": len(self._bad_samples)}
        super().log(logs, start_time)

    def _checked(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in self._throughput.count(batches):
            self._bad_samples.add(batch.pop("bad_samples"))
            yield batch


def training_arguments(recipe: Recipe, *, use_cpu: bool) -> TrainingArguments:
    """Returns the Trainer's settings for a recipe.

    Args:
        recipe: The recipe.
        use_cpu: Leave a GPU alone.

    Returns:
        The settings; the Trainer sees the whole run as one epoch.

    Raises:
        RecipeError: The Trainer knows no such optimizer, scheduler or tracker.
    """
    schedule, output, rates = recipe.schedule, recipe.output, recipe.learning_rates
    installed = get_available_reporting_integrations()
    if missing := [tracker for tracker in output.report_to if tracker not in installed]:
        raise RecipeError(
            f"output.report_to: {missing[0]} is no tracker that is installed, those are: {', '.join(installed)}"
        )
    known = [rates.vision_tower, rates.temporal_projector, rates.language_model]
    options: dict[str, Any] = {}
    if schedule.gradient_checkpointing:
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    try:
        return TrainingArguments(
            output_dir=str(output.folder),
            num_train_epochs=1,
            learning_rate=max(rate for rate in known if rate is not None),
            per_device_train_batch_size=schedule.batch_size or 1,
            gradient_accumulation_steps=schedule.gradient_accumulation_steps,
            warmup_steps=schedule.warmup_ratio,
            lr_scheduler_type=schedule.lr_scheduler,
            weight_decay=schedule.weight_decay,
            max_grad_norm=schedule.max_grad_norm,
            optim=schedule.optimizer,
            bf16=schedule.bf16,
            seed=schedule.seed,
            logging_steps=output.logging_steps,
            save_steps=output.save_steps,
            save_total_limit=output.save_total_limit,
            report_to=list(output.report_to),
            dataloader_num_workers=recipe.data.num_workers,
            accelerator_config={"even_batches": False, "split_batches": False, "dispatch_batches": False},
            remove_unused_columns=False,
            use_cpu=use_cpu,
            **options,
        )
    except ValueError as error:
        raise RecipeError(f"schedule or output: {str(error).splitlines()[0]}") from error
