"""The loop, its checkpoints and its bridges, on a two-block Llama."""

import sys
from pathlib import Path

import pytest

import veneer

sys.path.insert(0, str(Path(__file__).parent))

from small_runs import encoded, llama


@pytest.fixture
def model():
    return llama()


@pytest.fixture
def rows():
    return encoded(48)


@pytest.fixture
def adapter(model):
    return veneer.attach(model, "lora", rank=4)


@pytest.fixture
def quick():
    """Settings of a short silent run."""
    return {"batch_size": 4, "lr": 1e-2, "steps": 12, "precision": "fp32", "display": False}
