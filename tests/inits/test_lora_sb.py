"""LoRA-SB against its sheet's oracles (036)."""

import pytest
import torch
from single import linear
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.errors import UserError


class Regression(nn.Module):
    """A layer with a loss."""

    def __init__(self, layer, factor=1.0):
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, x, target):
        y = self.layer(x)
        return type("Out", (), {"loss": self.factor * (y - target).square().mean(), "logits": y})


def data(n=2, rows=20, inn=9, out=7):
    g = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(rows, inn, generator=g), "target": torch.randn(rows, out, generator=g)} for _ in range(n)]


def started(recipe="lora-sb(exact=True, guard=0, rate=0.01)", factor=1.0, layer=None, **options):
    """(model, delta, the gradient summed over the batches)."""
    torch.manual_seed(0)
    model, batches = Regression(nn.Linear(9, 7) if layer is None else layer, factor), data()
    (G,) = torch.autograd.grad(sum(model(**b).loss for b in batches), model.layer.weight)
    adapter = veneer.attach(model, recipe, sites="all", calibration=batches, **({"rank": 3} | options))
    return model, adapter, adapter.deltas["layer"], G


def test_the_change_is_the_best_of_its_rank_for_the_first_step():
    _, adapter, d, G = started()
    step = -0.01 * G.sign()
    U, S, Vh = torch.linalg.svd(step)
    assert torch.allclose(d.weight(), (U[:, :3] * S[:3]) @ Vh[:3], atol=1e-6)
    assert ((d.weight() - step) ** 2).sum().item() == pytest.approx(S[3:].square().sum().item(), rel=1e-4)
    assert torch.allclose(d.B.T @ d.B, torch.eye(3), atol=1e-5)
    assert torch.allclose(d.A @ d.A.T, torch.eye(3), atol=1e-5)
    assert torch.equal(d.R, torch.diag(d.R.diagonal())) and (d.R.diagonal().diff() <= 0).all()
    assert adapter.parameter_count() == 9 and not any(n.endswith((".A", ".B")) for n, _ in adapter.named_parameters())


def test_a_sign_pattern_of_rank_one_comes_out_whole():
    x = torch.tensor([[1.0, -1.0, -1.0]])
    model = Regression(linear(torch.zeros(2, 3)))
    batch = {"x": x, "target": torch.tensor([[-1.0, -1.0]])}  # G = 2(y − t)/2 · x has the signs (+, −, −) in both rows
    adapter = veneer.attach(model, "lora-sb(exact=True, guard=0, rate=0.01)", rank=1, sites="all", calibration=[batch])
    d = adapter.deltas["layer"]
    assert d.R.item() == pytest.approx(0.01 * 6**0.5, rel=1e-5)
    assert torch.allclose(d.weight(), torch.tensor([[-0.01, 0.01, 0.01]] * 2), atol=1e-7)


@pytest.mark.parametrize("option", [{"alpha": 12.0}, {"factor": 7.0}])
def test_neither_alpha_nor_the_scale_of_the_loss_changes_the_start(option):
    assert torch.allclose(started(**option)[2].weight(), started()[2].weight(), atol=1e-6)


def test_the_cores_gradient_is_the_projection_of_the_weights():
    model, _, d, _ = started()
    batch = data()[0]
    W = (model.layer.weight + d.weight()).detach().requires_grad_()
    y = nn.functional.linear(batch["x"], W, model.layer.bias)
    (G,) = torch.autograd.grad((y - batch["target"]).square().mean(), W)
    model(**batch).loss.backward()
    assert torch.allclose(d.R.grad, d.B.T @ G @ d.A.T, atol=1e-6)
    best = d.B @ d.R.grad @ d.A
    for other in (best + 0.01 * d.B @ torch.randn(3, 3) @ d.A for _ in range(3)):
        assert (G - best).norm() < (G - other).norm()


def test_the_size_of_the_step_is_the_fields_the_schedules_or_a_default():
    unit = started("lora-sb(exact=True, guard=0, rate=1.0)")[2].weight()
    schedule = Schedule(steps=100, lr=0.04, warmup=3)
    cases = {"lora-sb(guard=0)": 1e-4, "lora-sb(guard=0, rate=0.02)": 0.02}
    for recipe, rate in cases.items():
        assert torch.allclose(started(recipe)[2].weight(), rate * unit, atol=1e-6)
    found = started("lora-sb(guard=0)", schedule=schedule)[2].weight()
    assert torch.allclose(found, 0.04 / 4 * unit, atol=1e-6)


def test_a_small_step_lowers_the_loss_and_the_guard_halves_a_large_one():
    def loss(model):
        return sum(float(model(**b).loss) for b in data())

    model, adapter, _, _ = started("lora-sb(exact=True, guard=0, rate=1e-3)")
    with adapter.disabled():
        base = loss(model)
    assert loss(model) < base
    wild, free = (started(f"lora-sb(exact=True, rate=2.0, guard={n})") for n in (6, 0))
    assert loss(free[0]) > base >= loss(wild[0])
    halvings = (free[2].R[0, 0] / wild[2].R[0, 0]).log2().item()
    assert 1 <= round(halvings) <= 6 and halvings == pytest.approx(round(halvings), abs=1e-4)


def test_bases_of_the_gradient_hold_more_of_it_and_step_as_far():
    _, _, sign, G = started()
    _, _, own, _ = started("lora-sb(exact=True, guard=0, rate=0.01, update='gradient')")
    kept = [torch.linalg.matrix_norm(d.B.T @ G @ d.A.T) for d in (sign, own)]
    assert kept[0] < kept[1] and kept[1].item() == pytest.approx(torch.linalg.svdvals(G)[:3].norm().item(), rel=1e-4)
    assert own.weight().norm().item() == pytest.approx(sign.weight().norm().item(), rel=1e-4)
    assert (own.weight() * G).sum() < 0


def test_fold_export_and_file_give_what_runs(tmp_path):
    model, adapter, d, _ = started()
    x = data()[0]
    y = model(**x).logits
    A, B, s = d.pair()
    W = model.layer.weight + s * B @ A
    assert torch.allclose(nn.functional.linear(x["x"], W, model.layer.bias), y, atol=1e-5)
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(**x).logits, y)


def test_what_cannot_start_is_refused():
    with pytest.raises(UserError, match="rank=8 is more than"):
        started(rank=8)
    with pytest.raises(UserError, match="small trained core"):
        started("lora+lora-sb")
    with pytest.raises(UserError, match="not finite"):
        started(factor=float("nan"))
