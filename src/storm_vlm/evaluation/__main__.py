"""``python -m storm_vlm.evaluation --data ...``: what ``storm eval`` runs, for accelerate launch and torchrun."""

import sys

from storm_vlm_console import main

sys.argv.insert(1, "eval")
main()
