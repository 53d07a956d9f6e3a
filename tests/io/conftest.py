"""The tiny models of the contract tests serve here too."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def peft_directory(tmp_path):
    """Save an adapter made by PEFT; returns (directory, PEFT's output on the case's batch, the PEFT model)."""
    from by_peft import saved

    torch.manual_seed(0)  # of a hundred draws one nearly cancels a hidden state, whose norm then magnifies rounding
    return lambda kind, **config: saved(tmp_path, kind, **config)
