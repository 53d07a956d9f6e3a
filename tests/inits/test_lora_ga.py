"""LoRA-GA against its sheet's oracles (014) and against PEFT."""

import copy

import pytest
import torch
from single import stirred
from torch import nn
from torch.nn.functional import linear as product

import veneer
from veneer.errors import UserError


class Regression(nn.Module):
    """A layer with a mean squared error as its loss."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, target):
        y = self.layer(x)
        return type("Out", (), {"loss": (y - target).square().mean(), "logits": y})


def data(n=1, rows=20, inn=7, out=6):
    g = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(rows, inn, generator=g), "target": torch.randn(rows, out, generator=g)} for _ in range(n)]


def started(recipe="lora-ga(exact=True)", out=6, inn=7, batches=1, **options):
    """(model, adapter, delta, exact gradient of the mean of the batches' losses)."""
    model = Regression(nn.Linear(inn, out))
    calibration = data(batches, inn=inn, out=out)
    loss = sum(model(**b).loss for b in calibration) / batches
    (G,) = torch.autograd.grad(loss, model.layer.weight)
    adapter = veneer.attach(model, recipe, sites="all", calibration=calibration, **options)
    return model, adapter, next(iter(adapter.deltas.values())), G


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize("scale", ["stable", "unit", "gd", "weight"])
@pytest.mark.parametrize("rule", ["official", "peft"])
def test_every_start_equals_the_base_and_takes_disjoint_directions(direction, scale, rule):
    model, adapter, d, G = started(
        f"lora-ga(direction='{direction}', scale='{scale}', rule='{rule}')", rank=2, alpha=3.0
    )
    batch = data()[0]
    y = model(**batch).logits
    with adapter.disabled():
        assert torch.allclose(model(**batch).logits, y, atol=1e-5)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    into_A = (nn.functional.normalize(d.A, dim=1) @ Vh.T).abs().argmax(1).tolist()
    into_B = (nn.functional.normalize(d.B, dim=0).T @ U).abs().argmax(1).tolist()
    assert sorted(into_A + into_B) == [0, 1, 2, 3]
    fixed = {"ArB2r": [0, 1], "A2rBr": [2, 3], "ArBr": [1, 3]}
    assert direction == "random" or into_A == fixed[direction]


@pytest.mark.parametrize("out, c", [(16, 0.5), (576, 1.2247449), (1536, 1.5650846)])
def test_the_stable_scale_and_orthogonal_factors(out, c):
    _, _, d, _ = started(out=out, inn=24, rank=4)
    for square in (d.A @ d.A.T, d.B.T @ d.B):
        assert torch.allclose(square, c**2 * torch.eye(4), atol=1e-4)


def test_the_first_step_is_the_best_rank_2r_part_of_the_gradient_step():
    _, _, d, G = started(rank=2, alpha=6.0, out=6, inn=5)
    s, c2 = d.scale, float(d.A[0].detach().square().sum())
    A, B = d.A.double(), d.B.double()
    step = s * ((s * G.double() @ A.T) @ A + B @ (s * B.T @ G.double()))  # of BA, per unit of −η
    U, S, Vh = torch.linalg.svd(G.double())
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    assert torch.allclose(step, s**2 * c2 * best, atol=1e-5)
    assert torch.isclose((step / (s**2 * c2) - G).square().sum(), S[4:].square().sum(), atol=1e-6)


def test_with_2r_beyond_the_rank_the_first_step_is_that_of_full_fine_tuning():
    _, _, d, G = started(rank=4, out=6, inn=7)
    step = G @ d.A.T @ d.A + d.B @ d.B.T @ G
    assert torch.allclose(step / d.A[0].square().sum(), G, atol=1e-5)


def test_the_gradient_is_the_mean_over_batches_and_leaves_no_trace():
    model = Regression(nn.Linear(7, 6))
    model.train()
    model.layer.weight.requires_grad_(False)
    _, _, d, G = started("lora-ga", batches=3, rank=1)
    Vh = torch.linalg.svd(G)[2]
    assert torch.allclose((nn.functional.normalize(d.A, dim=1) @ Vh[:1].T).abs(), torch.ones(1, 1), atol=1e-4)
    adapter = veneer.attach(model, "lora-ga", rank=1, sites="all", calibration=data(2))
    adapter.detach()
    assert model.training and all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [False, True]


def test_the_rank_2r_pair_on_w_equals_running_after_training():
    model, adapter, d, _ = started("rslora+lora-ga", rank=2, alpha=3.0)
    stirred(adapter)
    (A, B, s), (A0, B0, s0) = d.pair(), d.offset.pair()
    batch = data()[0]
    W = model.layer.weight + torch.cat([s * B, s0 * B0], 1) @ torch.cat([A, A0])
    assert torch.allclose(model(**batch).logits, product(batch["x"], W, model.layer.bias), atol=1e-5)


def test_clipping_bounds_what_is_moved_out_of_w():
    for clip in (False, True):
        _, _, d, _ = started(f"lora-ga(clip={clip}, scale='unit')", rank=2, alpha=40.0)
        ratio = d.weight().abs().max() / d.site.weight().abs().max()
        assert torch.isclose(ratio, torch.ones(()), atol=1e-4) if clip else ratio > 1


@pytest.mark.parametrize(
    "scale, theirs", [("stable", "stable"), ("unit", "unit"), ("gd", "gd_scale"), ("weight", "weight_svd")]
)
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_pefts_rule_agrees_with_peft(direction, scale, theirs):
    peft = pytest.importorskip("peft")
    layer, (batch,) = nn.Linear(7, 6), data()
    U, S, Vh = torch.linalg.svd(layer.weight.data, full_matrices=False)
    layer.weight.data = U * 0.1 ** torch.arange(len(S)) @ Vh  # a spectrum that PEFT's two sketched directions see well
    plain = nn.Sequential(copy.deepcopy(layer))
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["0"], init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction=direction, scale=theirs),
    )  # fmt: skip
    peft.preprocess_loraga(plain, config, lambda: (plain(batch["x"]) - batch["target"]).square().mean().backward())
    inner = peft.get_peft_model(plain, config).base_model.model[0]
    model = Regression(layer)
    recipe = f"lora-ga(rule='peft', direction='{direction}', scale='{scale}', exact=True)"
    adapter = veneer.attach(model, recipe, rank=2, alpha=6.0, sites="all", calibration=[batch])
    (d,) = adapter.deltas.values()
    A, B = inner.lora_A["default"].weight, inner.lora_B["default"].weight
    signs = torch.sign((d.A * A).sum(1)), torch.sign((d.B * B).sum(0))  # singular vectors are free to flip
    assert torch.allclose(d.A, signs[0][:, None] * A, atol=1e-4)
    assert torch.allclose(d.B, signs[1] * B, atol=1e-4)


def test_batches_without_a_loss_and_too_large_ranks_are_refused():
    model = nn.Sequential(nn.Linear(7, 6))
    with pytest.raises(UserError, match="give no loss"):
        veneer.attach(model, "lora-ga", rank=2, sites="all", calibration=[(torch.randn(3, 7),)])
    with pytest.raises(UserError, match="rank=7 is more than"):
        started(rank=7)
