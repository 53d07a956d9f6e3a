"""Starts, one test file each; they are tried on the one-layer models of ``tests/deltas``."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "deltas"))


@pytest.fixture(autouse=True)
def _same_draws():
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.random.set_rng_state(state)
