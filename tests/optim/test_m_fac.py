"""M-FAC's steps and pruning against dense solves (sheet 071)."""

import pytest
import torch
from breaks import goes_on_bit_for_bit, training
from small_runs import encoded, llama
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.optim.m_fac import prune


def attached(recipe, clip=None, form="full"):
    """Two layers, gradients at will, as training begins."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    adapter = veneer.attach(model, f"{form}+{recipe}", sites="all")
    groups = [g | {"lr": 0.1, "weight_decay": 0.0} for g in adapter.optimizer_groups()]
    adapter.optimizer = adapter.hooks[-1].optimizer(groups)
    adapter.hooks[-1].on_start(adapter, Schedule(10, 0.1, clip=clip))
    return adapter, adapter.hooks[-1]


def put(adapter, g):
    """Write a flat gradient."""
    params = adapter.parameters()
    for p, piece in zip(params, g.split([p.numel() for p in params])):
        p.grad = piece.view_as(p).clone()


def moves(adapter, gradients):
    """How far each gradient moves the weights, over the rate."""
    found = []
    for g in gradients:
        before = adapter.vector()
        put(adapter, g)
        adapter.optimizer.step()
        found.append((before - adapter.vector()) / 0.1)
    return found


def natural(rows, g, damping, count):
    """F⁻¹g by a dense solve in fp64."""
    F = (
        damping * torch.eye(len(g), dtype=torch.double)
        + torch.stack(rows).double().T @ torch.stack(rows).double() / count
    )
    return torch.linalg.solve(F, g.double()).float()


@pytest.mark.parametrize("count_rows", [True, False])
def test_a_step_is_the_dense_solve_over_the_last_gradients(count_rows):
    adapter, _ = attached(f"m-fac(window=3, damping=0.1, count_rows={count_rows})")
    G = list(torch.randn(5, len(adapter.vector())))
    for k, u in enumerate(moves(adapter, G)):
        rows = G[max(0, k - 2) : k + 1]
        expected = natural(rows, G[k], 0.1, len(rows) if count_rows else 3)
        assert torch.allclose(u, expected, rtol=1e-4, atol=1e-5)


def test_decay_is_part_of_the_gradient_that_is_stored():
    adapter, _ = attached("m-fac(window=4, damping=0.1)")
    adapter.optimizer.param_groups[0]["weight_decay"] = 0.5
    rows = []
    for g in torch.randn(3, len(adapter.vector())):
        rows.append(g + 0.5 * adapter.vector())
        (u,) = moves(adapter, [g])
        assert torch.allclose(u, natural(rows, rows[-1], 0.1, len(rows)), rtol=1e-4, atol=1e-5)


def test_momentum_is_a_running_mean_of_the_preconditioned_gradients():
    (plain, _), (heavy, _) = (attached(f"m-fac(window=4, damping=0.1, momentum={mu})") for mu in (0.0, 0.9))
    G, v = torch.randn(3, len(plain.vector())), 0.0
    for u, moved in zip(moves(plain, G), moves(heavy, G)):
        v = 0.9 * v + 0.1 * u
        assert torch.allclose(moved, v, rtol=1e-4, atol=1e-6)


def test_the_order_of_tensors_does_not_matter():
    (one, _), (other, _) = attached("m-fac(damping=0.1)"), attached("m-fac(damping=0.1)")
    other.optimizer.param_groups[0]["params"].reverse()
    G = torch.randn(3, len(one.vector()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(moves(one, G), moves(other, G)))


@pytest.mark.parametrize("blocks", ["site", "tensor"])
def test_blocks_have_windows_of_their_own(blocks):
    adapter, _ = attached(f"m-fac(damping=0.1, blocks='{blocks}')", form="lora(rank=2)")
    assert [n for n, _ in adapter.named_parameters()] == ["0.A", "0.B", "1.A", "1.B"]
    sizes = (14, 12) if blocks == "site" else (6, 8, 8, 4)
    G = list(torch.randn(2, 26))
    u = moves(adapter, G)[1]
    expected = [natural([a, b], b, 0.1, 2) for a, b in zip(G[0].split(sizes), G[1].split(sizes))]
    assert torch.allclose(u, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_the_first_step_is_bounded_by_the_inverse_of_the_gradients_length():
    adapter, _ = attached("m-fac(damping=0.1)")
    g = torch.randn(len(adapter.vector()))
    assert torch.allclose(moves(adapter, [g])[0], g / (0.1 + g @ g), rtol=1e-4)


def test_the_curvature_is_of_gradients_before_clipping_and_the_step_has_a_bound_of_its_own():
    (one, hook), (bound, _) = attached("m-fac(damping=0.1)", clip=0.5), attached("m-fac(damping=0.1, clip=0.01)")
    g = 3 * torch.randn(len(one.vector()))
    put(one, g)
    hook.after_backward(0)
    for p in one.parameters():
        p.grad *= 0.5 / g.norm()
    hook.before_optimizer(0)
    before = one.vector()
    one.optimizer.step()
    assert torch.allclose((before - one.vector()) / 0.1, g / (0.1 + g @ g), rtol=1e-3)
    assert moves(bound, [g])[0].norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_loop_that_clips_takes_the_steps_of_one_that_does_not():
    runs = [training("m-fac", rank=2, clip=clip) for clip in (None, 1e-3)]
    for _ in range(3):
        losses = [run.take_step() for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert torch.allclose(runs[0].adapter.vector(), runs[1].adapter.vector(), rtol=1e-2, atol=1e-5)


def test_the_window_begins_anew_when_a_tensor_changes_its_shape():
    run = training("m-fac(window=4)", rank=2)
    run.take_step(), run.take_step()
    (state,) = run.adapter.optimizer.state.values()
    assert state["pushed"] == 2 and state["window"].shape == (4, len(run.adapter.vector()))
    delta = next(iter(run.adapter.deltas.values()))
    for name, dim in (("A", 0), ("B", 1)):
        run.adapter.replace_parameter(delta, name, getattr(delta, name).detach().narrow(dim, 0, 1), [0], dim)
    run.take_step()
    (state,) = run.adapter.optimizer.state.values()
    assert state["pushed"] == 1 and state["window"].shape == (4, len(run.adapter.vector()))


def test_bytes_of_state_are_the_formula():
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        run = training(f"m-fac(window=4, dtype='{dtype}')", rank=2)
        run.take_step()
        (state,) = run.adapter.optimizer.state.values()
        held = sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))
        assert held == size * 4 * len(run.adapter.vector()) + 8 * 4 * 4


@pytest.mark.parametrize("recipe", ["m-fac(window=3)", "m-fac(momentum=0.5, dtype='bf16', blocks='site')"])
def test_a_broken_run_goes_on_bit_for_bit(recipe):
    assert goes_on_bit_for_bit(lambda: training(recipe, accumulate=2, rank=2, dropout=0.1))


def test_fit_learns_with_it():
    run = veneer.fit(
        veneer.attach(llama(num_hidden_layers=1), "m-fac", rank=4),
        encoded(48),
        steps=15,
        precision="fp32",
        display=False,
    )
    assert sum(run.losses[-3:]) / 3 < sum(run.losses[:3]) / 3 - 0.05


class Regression(nn.Module):
    """y = Wx with a dropout that must be off, as a classifier of transformers gives its loss."""

    def __init__(self):
        super().__init__()
        self.line, self.dropout = nn.Linear(12, 3, bias=False), nn.Dropout(0.5)

    def forward(self, x, y):
        return type("Out", (), {"loss": (self.line(self.dropout(x)) - y).square().mean()})


def regression(seed=0):
    """A fitted regression on correlated inputs, and its batches of eight rows."""
    g = torch.Generator().manual_seed(seed)
    model = Regression().train()
    mix = torch.randn(12, 12, generator=g) * 0.6 + torch.eye(12)
    x = torch.randn(512, 12, generator=g) @ mix
    y = x @ torch.randn(12, 3, generator=g) + 0.3 * torch.randn(512, 3, generator=g)
    model.line.weight.data = torch.linalg.lstsq(x, y).solution.T.clone()
    return model, [{"x": a, "y": b} for a, b in zip(x.split(8), y.split(8))]


def loss_of(model, batches):
    model.eval()
    with torch.no_grad():
        return float(torch.stack([model(**b).loss for b in batches]).mean())


@pytest.mark.parametrize("block", [None, 5])
def test_pruning_sets_the_share_to_zero_and_leaves_everything_else_of_the_model_as_it_was(block):
    model, batches = regression()
    weight = model.line.weight.requires_grad_(False)
    weight.grad = None
    (mask,) = prune(model, [weight], batches, 0.5, block=block, rounds=4)
    assert mask.shape == weight.shape and int(mask.sum()) == 18
    assert torch.equal(weight == 0, ~mask)
    assert model.training and not weight.requires_grad and weight.grad is None


def test_surgery_loses_less_than_magnitude_and_less_in_rounds():
    found = {}
    for name in ("magnitude", 1, 8):
        total = 0.0
        for seed in range(4):
            model, batches = regression(seed)
            W = model.line.weight
            if name == "magnitude":
                W.data.flatten()[W.detach().abs().flatten().argsort()[:18]] = 0
            else:
                prune(model, [W], batches, 0.5, block=None, rounds=name)
            total += loss_of(model, batches)
        found[name] = total
    assert found[8] < 0.9 * found["magnitude"] and found[8] < 0.9 * found[1]


def test_the_loss_may_be_given_and_several_tensors_are_ranked_together():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight.data *= 1e-4
    before = model[1].weight.detach().clone()
    loss = lambda m, x: (m(x) - x[:, :2]).square().mean()  # noqa: E731
    masks = prune(
        model, [m.weight for m in model], list(torch.randn(16, 3, 4)), 16 / 24, loss=loss, damping=1e6, rounds=1
    )
    assert [int(m.sum()) for m in masks] == [0, 8] and torch.allclose(model[1].weight, before, rtol=1e-4)


def test_an_adapter_is_pruned_by_its_own_tensors():
    model = llama(num_hidden_layers=1)
    adapter = veneer.attach(model, "lora", rank=2)
    veneer.fit(adapter, encoded(16), steps=3, lr=1e-2, precision="fp32", display=False)
    from veneer.data import Collator

    rows = encoded(16)
    prune(model, adapter.parameters(), [Collator(0)(rows[k : k + 4]) for k in range(0, 16, 4)], 0.75, rounds=2)
    share = float((adapter.vector() == 0).float().mean())
    assert share == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("sparsity, batches, says", [(1.0, [1], "below 1"), (0.5, [], "empty")])
def test_what_cannot_be_pruned_is_refused(sparsity, batches, says):
    model = nn.Linear(2, 2)
    with pytest.raises(veneer.UserError, match=says):
        prune(model, [model.weight], batches, sparsity)
