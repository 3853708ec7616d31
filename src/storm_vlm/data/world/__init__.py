"""The synthetic video world: scripted videos of named things, with questions whose answers the script gives."""

from storm_vlm.data.world.config import SPLITS, WorldConfig
from storm_vlm.data.world.dataset import generate_dataset, make_sample
from storm_vlm.data.world.directing import direct
from storm_vlm.data.world.encoding import write_video
from storm_vlm.data.world.preview import draw_preview
from storm_vlm.data.world.questions import TASKS, Question, ask_about
from storm_vlm.data.world.rendering import render_frames
from storm_vlm.data.world.script import Script
from storm_vlm.data.world.sprites import fetch_sprite_sets
from storm_vlm.data.world.statistics import dataset_statistics
from storm_vlm.data.world.telling import tell

__all__ = [
    "SPLITS",
    "TASKS",
    "Question",
    "Script",
    "WorldConfig",
    "ask_about",
    "dataset_statistics",
    "direct",
    "draw_preview",
    "fetch_sprite_sets",
    "generate_dataset",
    "make_sample",
    "render_frames",
    "tell",
    "write_video",
]
