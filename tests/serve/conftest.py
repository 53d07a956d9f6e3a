"""Tiny models with adapters of several forms, written once a session."""

import copy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny import FORMS, MODELS, trained

from veneer.serve.trunk import Trunk


@pytest.fixture(scope="session", params=MODELS)
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def written(kind, tmp_path_factory):
    """(base, folder, adapted models by name) for one kind of model."""
    root = tmp_path_factory.mktemp(kind)
    base, adapted = MODELS[kind](), {}
    for number, (name, (recipe, rank, sites)) in enumerate(FORMS.items()):
        own, adapter = trained(base, recipe, rank, sites, seed=number)
        adapter.save(root / name)
        adapted[name] = own
    return base, root, adapted


@pytest.fixture(scope="module")
def base():
    """A small Llama, as it was made."""
    return MODELS["llama"]()


@pytest.fixture(scope="module")
def trunk(base):
    """It as the server runs it."""
    return Trunk(copy.deepcopy(base))
