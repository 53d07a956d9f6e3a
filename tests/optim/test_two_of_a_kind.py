"""Two methods that each bring the run's optimiser are refused in one sentence, whether named or brought along."""

import pytest
import torch
from small_runs import llama

import veneer


@pytest.mark.parametrize(
    "recipe, says",
    [
        ("galore+fira", "galore and fira both bring their own optimizer"),
        ("owlore+fira", "galore and fira both bring their own optimizer"),
        ("frugal+galore", "frugal and galore both bring their own optimizer"),
    ],
)
def test_a_second_optimiser_is_refused(recipe, says):
    model, ids = llama(num_hidden_layers=1), [{"input_ids": torch.ones(1, 4, dtype=int)}]
    with pytest.raises(veneer.UserError) as error:
        veneer.attach(model, recipe, calibration=ids)
    words = str(error.value)
    assert "\n" not in words and set(says.split()) <= set(words.replace(";", "").split())
    assert not veneer.adapters(model)
