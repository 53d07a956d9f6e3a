"""Block-LoRA against its sheet's oracles (020)."""

import pytest
import torch
from single import linear, put, single, stirred
from torch import nn

import veneer
from veneer.errors import UserError

FORMS = [False, True]


def task():
    """W (6, 8), inputs and targets of a regression."""
    g = torch.Generator().manual_seed(4)
    return [torch.randn(*shape, generator=g) for shape in ((6, 8), (20, 8), (20, 6))]


def trained(recipe, make, steps=50, rank=4):
    """Losses by step, and the delta."""
    W, x, target = task()
    model, adapter, d = single(linear(W), recipe, rank=rank)
    optimizer = make(d)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    return losses, adapter, d


@pytest.mark.parametrize("arms", FORMS)
def test_the_sheets_closed_form(arms):
    model, adapter, d = single(linear(torch.zeros(2, 2)), f"block-lora(materialise_arms={arms})", rank=2, alpha=2**0.5)
    put(d, A=[[1.0, 2.0]])
    put(d, **({"arms": [[[1.0], [0.0]]] * 2} if arms else {"B": [[1.0], [0.0]]}))
    expected = torch.tensor([[2.0, 4.0], [0.0, 0.0]])  # B₁ = B₂, s = 1
    assert torch.allclose(model(torch.eye(2)).T, expected, atol=1e-6)
    A, B, scale, _ = d.as_lora(None, None)
    assert A.shape == (1, 2) and torch.allclose(scale * B @ A, expected, atol=1e-6)
    adapter.fold()
    assert torch.allclose(model[0].weight, expected, atol=1e-6)


@pytest.mark.parametrize("rule, scale", [("alpha_over_r", 2.0 / 8), ("alpha_over_sqrt_r", 2.0 / 8**0.5)])
@pytest.mark.parametrize("arms", FORMS)
def test_running_is_the_sum_of_the_arms(arms, rule, scale):
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    y0 = layer(x)
    recipe = f"block-lora(blocks=4, scale_rule={rule!r}, materialise_arms={arms})"
    model, adapter, d = single(layer, recipe, rank=8, alpha=2.0)
    assert torch.equal(model(x), y0)
    stirred(adapter)
    B = d.arms.sum(0) if arms else 4 * d.B
    assert torch.allclose(model(x), y0 + scale * x @ d.A.T @ B.T, atol=1e-5)
    assert torch.linalg.matrix_rank(d.weight()) == 2
    assert adapter.parameter_count() == d.parameter_count() == 2 * 9 + (8 if arms else 2) * 7


def test_one_block_is_lora():
    layer, x, outputs = nn.Linear(9, 7), torch.randn(4, 9), []
    for recipe, alpha in (("lora", 4.0), ("block-lora(blocks=1, scale_rule='alpha_over_r')", 4.0)):
        model, adapter, _ = single(layer, recipe, rank=4, alpha=alpha)
        stirred(adapter)
        outputs.append(model(x))
        adapter.detach()
    assert torch.equal(*outputs)


OPTIMISERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.2),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.02),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.02, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_arms_stay_alike_and_one_that_stands_for_all_moves_as_they_do(name):
    make = lambda d: OPTIMISERS[name](list(d.parameters()))  # noqa: E731
    many, _, d = trained("block-lora(materialise_arms=True)", make)
    assert torch.equal(d.arms[0], d.arms[1])
    one, _, e = trained("block-lora", make)
    assert one == many
    assert torch.equal(e.B, d.arms[0]) and torch.equal(e.A, d.A)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_it_trains_as_lora_of_a_part_of_the_rank_whose_b_has_n_times_the_rate(name):
    def faster(d):
        optimizer = OPTIMISERS[name]([{"params": [d.A]}, {"params": [d.B]}])
        group = optimizer.param_groups[1]
        group["lr"] *= 2
        group["weight_decay"] /= 2
        return optimizer

    ours, _, d = trained("block-lora(scale_rule='alpha_over_r')", lambda d: OPTIMISERS[name](list(d.parameters())))
    theirs, _, e = trained("lora(alpha=0.5)", faster, rank=2)  # s = 1/4 in both
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert torch.allclose(d.weight(), e.weight(), atol=1e-6)


@pytest.mark.parametrize("arms", FORMS)
def test_a_start_for_pairs_reaches_every_arm(arms):
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    y0 = layer(x)
    model, _, d = single(layer, f"block-lora(materialise_arms={arms})+pissa", rank=4)
    assert torch.allclose(model(x), y0, atol=1e-5)
    U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
    assert torch.allclose(d.weight(), (U[:, :2] * S[:2]) @ Vh[:2], atol=1e-5)


def test_a_rank_that_cannot_be_cut_is_refused_and_leaves_the_model_alone():
    layer = nn.Linear(9, 7)
    with pytest.raises(UserError, match="rank=3 cannot be cut into blocks=2"):
        single(layer, "block-lora", rank=3)
    assert type(layer) is nn.Linear and not veneer.adapters(layer)
