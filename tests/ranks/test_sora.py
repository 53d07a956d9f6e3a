"""SoRA against the numbers of its sheet (003): the proximal map, gates, pruning for good."""

import pytest
import torch
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.parts.restore import attach_from
from veneer.ranks.sora import prox


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))


def test_the_map_is_the_sheets_oracle_3():
    g = torch.tensor([0.5, -0.25, 0.1, -0.45])
    assert torch.allclose(prox(g, 0.2), torch.tensor([0.3, -0.05, 0.0, -0.25]))
    assert torch.allclose(prox(g, 0.2, "official"), torch.tensor([0.3, 0.0, 0.0, -0.25]))


def test_the_tiny_forward_is_the_sheets_oracle_5():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    adapter = veneer.attach(model, "sora(threshold=0.3)", rank=2)
    d = adapter.deltas["0"]
    with torch.no_grad():
        d.A.copy_(torch.eye(2))
        d.B.copy_(torch.tensor([[1.0, 2.0]]))
        d.gate.copy_(torch.tensor([0.5, -0.2]))
    x = torch.tensor([[1.0, 3.0]])
    assert model(x).item() == pytest.approx(-0.7)
    adapter.hooks[0].after_step(0)
    assert torch.allclose(d.gate, torch.tensor([0.2, 0.0]))
    assert model(x).item() == pytest.approx(0.2)


def test_gates_of_one_are_lora():
    x = torch.randn(4, 8)
    plain, gated = mlp(), mlp()
    a, b = veneer.attach(plain, "lora", rank=4), veneer.attach(gated, "sora", rank=4)
    with torch.no_grad():
        for p, q in zip(a.deltas.values(), b.deltas.values()):
            p.B.normal_()
            q.A.copy_(p.A)
            q.B.copy_(p.B)
            q.gate.fill_(1.0)
    assert torch.allclose(plain(x), gated(x), atol=1e-6)


def test_a_closed_component_learns_only_through_its_gate():
    model = mlp()
    adapter = veneer.attach(model, "sora", rank=3)
    d = adapter.deltas["0"]
    with torch.no_grad():
        d.B.normal_()
        d.gate[1] = 0
    model(torch.randn(4, 8)).square().sum().backward()
    assert not d.A.grad[1].any() and not d.B.grad[:, 1].any() and d.gate.grad[1] != 0


def test_pruning_is_for_good_and_changes_nothing():
    model, x = mlp(), torch.randn(4, 8)
    adapter = veneer.attach(model, "sora", rank=4, alpha=8.0)
    scale = adapter.deltas["0"].scale
    with torch.no_grad():
        for d in adapter.deltas.values():
            d.B.normal_()
        adapter.deltas["0"].gate[[0, 2]] = 0
        adapter.deltas["2"].gate.zero_()
    before = model(x)
    adapter.hooks[0].on_end()
    assert torch.allclose(model(x), before, atol=1e-5)
    assert list(adapter.deltas) == ["0"] and adapter.deltas["0"].A.shape == (2, 8)
    assert adapter.deltas["0"].scale == scale == 2.0 and adapter.deltas["0"].gate is None
    assert adapter.parameter_count() == 2 * (8 + 12)
    fresh = mlp()
    attach_from(fresh, adapter.description(), adapter.state())
    assert torch.equal(fresh(x), model(x))


def test_pruning_carries_the_optimisers_state():
    model = mlp()
    adapter = veneer.attach(model, "sora", rank=4)
    d = adapter.deltas["0"]
    adapter.optimizer = torch.optim.AdamW(adapter.optimizer_groups(), lr=1e-2)
    for _ in range(2):
        model(torch.randn(4, 8)).square().sum().backward()
        adapter.optimizer.step()
    moment = adapter.optimizer.state[d.A]["exp_avg"].clone()
    with torch.no_grad():
        d.gate[0] = 0
    adapter.hooks[0].on_end()
    assert torch.equal(adapter.optimizer.state[d.A]["exp_avg"], moment[1:])
    assert any(d.A is p for g in adapter.optimizer.param_groups for p in g["params"])


def test_a_threshold_above_the_rate_is_said():
    adapter = veneer.attach(mlp(), "sora(threshold=0.1)", rank=2)
    with pytest.warns(UserWarning, match="every gate will fall"):
        adapter.hooks[0].on_start(adapter, Schedule(steps=10, lr=0.01))


def test_more_thresholds_are_more_phases():
    adapter = veneer.attach(mlp(), "sora(threshold=0.0, then=(1e-3, 2e-3))", rank=2)
    shares = [p.share for p in adapter.phases]
    assert sum(shares) == pytest.approx(1) and shares[0] > shares[1] == shares[2]
    assert adapter.advance() and adapter.hooks[0].current() == 1e-3
    assert adapter.advance() and adapter.hooks[0].current() == 2e-3
    assert not adapter.advance()


@pytest.mark.parametrize("recipe", ["pissa+sora", "dora+pissa+sora"])
def test_beside_an_offset_start_it_starts_at_the_base_and_ends_without_a_jump(recipe):
    model, x = mlp(), torch.randn(4, 8)
    base = model(x)
    adapter = veneer.attach(model, recipe, rank=3)
    assert torch.allclose(model(x), base, atol=1e-5)
    with torch.no_grad():
        adapter.deltas["0"].gate.zero_()
        adapter.deltas["2"].gate[1] = 0.0
    before = model(x)
    adapter.hooks[-1].on_end()
    assert torch.allclose(model(x), before, atol=1e-5) and not torch.allclose(before, base, atol=1e-3)
    assert [len(d.A) for d in adapter.deltas.values()] == [1, 2]
