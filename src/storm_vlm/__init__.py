"""STORM: a Mamba temporal projector between a vision encoder and an LLM, for token-efficient video understanding.

``import storm_vlm`` registers the model with transformers' Auto classes.
"""

import sys
from importlib.metadata import version

__version__ = version("storm-vlm")

# The `storm` command imports what a subcommand needs when it runs, so that `storm --help` stays instant.
if "storm_vlm_console" not in sys.modules:
    from storm_vlm import model as model
