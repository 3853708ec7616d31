"""``python -m storm_vlm.training recipe.yaml``: what ``storm train`` runs, for torchrun and accelerate launch."""

import sys

from storm_vlm_console import main

sys.argv.insert(1, "train")
main()
