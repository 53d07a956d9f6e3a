"""The proof at a run's end: norms against dense algebra, and every suspicious thing in one sentence."""

import pytest
import torch
from small_runs import encoded, llama

import veneer
from veneer.train.loop import fit
from veneer.train.proof import change_norm, proof


@pytest.mark.parametrize("recipe", ["lora", "lora+pissa", "dora", "dora+pissa", "full"])
def test_change_norms_are_those_of_the_folded_weights(recipe):
    model = llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = veneer.attach(model, recipe, rank=None if recipe == "full" else 4)
    fit(adapter, encoded(16), batch_size=4, lr=1e-2, precision="fp32", display=False)
    found = {d.site.path: change_norm(d) for d in adapter.deltas.values()}
    adapter.fold()
    after = dict(model.named_parameters())
    for path, norm in found.items():
        name = path if path in after else f"{path}.weight"
        wanted = (after[name] - before[name]).norm().item()
        assert norm == pytest.approx(wanted, rel=1e-3, abs=1e-5), path


def test_a_sound_run_has_nothing_to_warn_of(adapter, rows, quick):
    run = fit(adapter, rows, eval_data=encoded(8, 2), **quick | {"steps": 30})
    assert run.record["warnings"] == []
    assert run.record["proof"]["matched"]["q"] == 2
    assert set(run.record["proof"]["change_norm_by_block"]) == {"0", "1"}


def test_what_never_had_a_gradient_and_what_stayed_zero_is_named(rows, quick):
    adapter = veneer.attach(llama(), "lora", rank=4)
    adapter.model.model.layers[1].mlp.forward = lambda x: torch.zeros_like(x)  # cut off from the loss
    said = " | ".join(fit(adapter, rows, **quick).record["warnings"])
    assert "6 trained tensors never had a gradient: model.layers.1.mlp" in said
    assert "3 trained tensors still zero at the end" in said


def test_uneven_coverage_is_named():
    model = llama()
    sites = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.self_attn.v_proj"]
    found = proof(veneer.attach(model, "lora", rank=4, sites=sites), [], {})
    assert "1 of 2 sites of role q were not adapted" in found["warnings"]
    assert not any("role v" in w for w in found["warnings"])


def test_a_loss_that_did_not_fall_is_named(adapter):
    found = proof(adapter, [], {"before": 1.0, "after": 1.5})
    assert "held-out loss did not fall: 1.0000 before, 1.5000 after" in found["warnings"]


def test_a_block_far_larger_than_the_others_is_named():
    adapter = veneer.attach(llama(num_hidden_layers=3), "lora", rank=4)
    with torch.no_grad():
        for path, d in adapter.deltas.items():
            d.B.fill_(1000.0 if ".layers.2." in path else 1.0)
    assert any("1 block is over 50 times the median block's: 2" in w for w in proof(adapter, [], {})["warnings"])
