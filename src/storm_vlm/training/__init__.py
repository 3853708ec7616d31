"""Training in stages with transformers' Trainer: recipes, frozen parts, LoRA, resuming, export."""

from storm_vlm.training.curve import plot_curve
from storm_vlm.training.plan import PartPlan, TrainingPlan
from storm_vlm.training.recipe import Recipe, read_recipe
from storm_vlm.training.run import TrainingResult, plan_training, train

__all__ = [
    "PartPlan",
    "Recipe",
    "TrainingPlan",
    "TrainingResult",
    "plan_training",
    "plot_curve",
    "read_recipe",
    "train",
]
