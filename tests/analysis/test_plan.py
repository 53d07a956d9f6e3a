"""Forecasts: counted parameters, affine costs, refusals with offers, and a base left as it was."""

import pytest
import torch
from models import make

import veneer
from veneer.analysis import plan
from veneer.errors import UserError

GIB = 2**30


def test_a_forecast_counts_what_attaching_trains_and_leaves_the_model_as_it_was():
    model = make("llama").model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = plan.forecast(model, plan.Job("lora", rank=3, rows=5, length=16), room=64 * GIB)
    adapter = veneer.attach(model, "lora", rank=3)
    assert found.parameters == adapter.parameter_count()
    assert found.adapter_bytes == sum(t.numel() * t.element_size() for t in adapter.state().values())
    adapter.detach()
    assert found.probed and found.step > 0 and found.fits(64 * GIB)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_costs_are_affine_in_the_rows_and_never_fall():
    assert plan._affine(2.0, 4.0, 8) == pytest.approx(2 + 7)
    assert plan._affine(4.0, 3.0, 8) == 4.0


def test_a_job_whose_weights_alone_exceed_the_room_is_not_probed_and_gets_offers_that_fit():
    model = make("llama").model
    wanted = plan.forecast(model, plan.Job("full", rows=4, length=16), room=1)
    assert not wanted.probed and not wanted.fits(1)
    offers = list(plan.alternatives(model, wanted, 64 * GIB))
    assert all(o.fits(64 * GIB) for o in offers)
    assert "lora rank 16" in [plan.words(o, wanted.job) for o in offers]


@pytest.mark.parametrize("text, size", [("2GiB", 2 * GIB), ("1500M", 1500 * 2**20), ("12kb", 12 * 1024), ("77", 77)])
def test_sizes_are_read_as_people_write_them(text, size):
    assert plan.parsed_bytes(text) == size


def test_other_sizes_are_refused():
    with pytest.raises(UserError, match="2GiB"):
        plan.parsed_bytes("lots")
