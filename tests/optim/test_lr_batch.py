"""lr-batch: the probe on losses whose Hessian is known, and the rates of a run."""

import pytest
import torch
from breaks import goes_on_bit_for_bit, training
from torch import nn

import veneer
from veneer.optim.lr_batch import proposed
from veneer.parts.curvature import Curvature, curvature_probe, difference_product, hessian_product

D = torch.arange(1.0, 21.0)


def bowl():
    """½xᵀDx with a dropout and a parameter beside it."""
    model = nn.Module()
    model.x, model.drop = nn.Parameter(torch.randn(20)), nn.Dropout(0.5)
    return model.train(), lambda: 0.5 * (D * model.x.square()).sum()


@pytest.mark.parametrize("kind", [hessian_product, difference_product])
def test_products_with_a_quadratics_hessian_are_exact(kind):
    model, loss = bowl()
    v = torch.nn.functional.normalize(torch.randn(20), dim=0)
    tolerance = 1e-6 if kind is hessian_product else 1e-4  # a difference of two rounded gradients
    assert torch.allclose(kind(loss, [model.x])(v), D * v, atol=tolerance)


@pytest.mark.parametrize("exact", [True, False])
def test_the_probe_finds_the_spectrum_and_leaves_everything_as_it_was(exact):
    model, loss = bowl()
    model.x.grad = torch.ones(20)
    before, random = model.x.detach().clone(), torch.get_rng_state()
    found = curvature_probe(model, loss, steps=20, exact=exact)
    assert found.top == pytest.approx(20, rel=1e-3) and found.smallest == pytest.approx(1, abs=0.02)
    assert torch.equal(model.x, before) and torch.equal(model.x.grad, torch.ones(20)) and model.drop.training
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("share, ends", [(0.95, True), (1.05, False)])
def test_descent_converges_just_below_two_over_the_curvature(share, ends):
    model, loss = bowl()
    rate = share * 2 / curvature_probe(model, loss).top
    for _ in range(200):
        (g,) = torch.autograd.grad(loss(), [model.x])
        model.x.data.sub_(g, alpha=rate)
    assert (loss().item() < 1e-3) == ends


def test_the_proposal_is_that_of_two_curvatures():
    lr, momentum = proposed(Curvature([1.0, 9.0], [0.5, 0.5]), safety=1.0)
    assert lr == pytest.approx((2 / 4) ** 2) and momentum == pytest.approx((2 / 4) ** 2)
    lr, _ = proposed(Curvature([-9.0, 1.0, 4.0], [0.3, 0.0, 0.7]), safety=0.5)
    assert lr == pytest.approx(0.5 * (2 / 5) ** 2)  # |θ| limits, and a value without weight does not count


def test_the_run_trains_at_the_scaled_rate():
    run, plain = training("lora+lr-batch(reference=2)", accumulate=2), training("lora", accumulate=2)
    for r in (run, plain):
        r.take_step()
    assert run.rate == pytest.approx(plain.rate * 2)  # 8 rows a step, four times as many, and Adam
    assert run.adapter.hooks[0].rows == 8 and not torch.equal(run.adapter.vector(), plain.adapter.vector())


def test_probes_change_nothing_and_are_noted():
    run, plain = training("lora(dropout=0.1)+lr-batch(probe=2, depth=4)"), training("lora(dropout=0.1)")
    losses = [[r.take_step() for _ in range(4)] for r in (run, plain)]
    assert losses[0] == losses[1] and torch.equal(run.adapter.vector(), plain.adapter.vector())
    probes = next(h for h in run.adapter.hooks if h.name == "lr-batch").probes
    assert list(probes) == [0, 2]
    assert all(p["top"] > 0 and p["lr"] > 0 and 0 <= p["momentum"] < 1 for p in probes.values())


def test_the_rate_follows_the_probes():
    run = training("lora+lr-batch(probe=1, depth=4, follow=True)")
    for _ in range(3):
        run.take_step()
    (hook,) = [h for h in run.adapter.hooks if h.name == "lr-batch"]
    found = [p["top"] for p in hook.probes.values()]
    assert hook.rate(run.adapter.optimizer.param_groups[0], 3) == pytest.approx((found[0] / found[-1]) ** 0.5)
    params = list(run.adapter.parameters())
    run.adapter.optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.1)
    group = run.adapter.optimizer.param_groups[0]
    assert hook.rate(group, 3) * run.schedule.lr == pytest.approx(list(hook.probes.values())[-1]["lr"])
    assert group["momentum"] == list(hook.probes.values())[-1]["momentum"]


def test_a_rule_without_its_numbers_is_refused():
    from small_runs import llama

    with pytest.raises(veneer.UserError, match="needs curvature"):
        veneer.attach(llama(), "lora+lr-batch(reference=8, rule='measured')")


def test_a_broken_run_goes_on_bit_for_bit():
    make = lambda: training("lora+lr-batch(probe=1, depth=3, follow=True, reference=2)")  # noqa: E731
    assert goes_on_bit_for_bit(make)
