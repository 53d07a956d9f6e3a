"""Objectives, one test file each; the loop's tiny model and broken runs serve here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
