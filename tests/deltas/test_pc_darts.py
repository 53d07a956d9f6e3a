"""PC-DARTS on adapters against the oracles of its sheet (121)."""

import math

import pytest
import torch
from torch import nn

import veneer
from veneer.deltas.pc_darts import edges, genotype, strengths
from veneer.errors import UserError


class Stack(nn.Module):
    """Three layers, two of one shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def data(count: int = 12):
    g = torch.Generator().manual_seed(1)
    return [(x, x.flip(-1).tanh()) for x in (torch.randn(8, 6, generator=g) for _ in range(count))]


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def attached(form: str = "", search: str = "", **options):
    return veneer.attach(Stack(), f"pc-darts({form})+pc-darts-search({search})", **({"seed": 3} | options))


def moved(adapter):
    torch.manual_seed(5)
    for p in adapter.parameters():
        p.data.add_(0.3 * torch.randn(p.shape))
    return adapter


def fit(adapter, steps=30, **options):
    settings = {"loss": loss, "steps": steps, "lr": 1e-2, "precision": "fp32", "display": False}
    return veneer.fit(adapter, data(), **(settings | options))


def test_it_starts_at_the_base_for_any_scores():
    adapter, x, hook = attached(), data()[0][0], None
    (hook,) = adapter.hooks
    for s in hook.scores.values():
        s.data.normal_()
    hook.apply()
    with adapter.disabled():
        base = adapter.model(x)
    assert torch.equal(adapter.model(x), base)
    with hook.live(hook.relaxed()):
        assert torch.equal(adapter.model(x), base)


def test_one_operator_on_all_channels_with_equal_edges_is_lora():
    adapter, x = moved(attached("operators=('lora-2',), channels=1")), data()[0][0]
    (hook,) = adapter.hooks
    hook.scores["beta"].data.zero_()
    hook.apply()
    twin = veneer.attach(Stack(), "lora", rank=2, alpha=4.0)
    for mine, theirs in zip(adapter.deltas.values(), twin.deltas.values()):
        theirs.A.data.copy_(mine.A2)
        theirs.B.data.copy_(mine.B2)
    assert torch.allclose(adapter.model(x), twin.model(x), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_the_bases_and_the_tensors_are_a_kth(channels):
    adapter, x = moved(attached(f"channels={channels}")), data()[0][0]
    d = adapter.deltas["layers.0"]
    with adapter.disabled():
        base = adapter.model.layers[0](x)
    changed = (adapter.model.layers[0](x) != base).any(0).nonzero().flatten()
    assert torch.equal(changed, d.S) and len(d.S) == 8 // channels
    assert d.B8.shape == (8 // channels, 8) and d.v.shape == (8 // channels,)
    assert d.parameter_count() == 10 * 6 + 11 * 8 // channels


def test_edges_within_a_group_sum_to_its_size():
    found = edges(torch.tensor([0.0, 0.0, math.log(2)]), ["g"] * 3)
    assert found.tolist() == pytest.approx([0.75, 0.75, 1.5])  # 3·(0.25, 0.25, 0.5)
    mixed = edges(torch.tensor([1.0, -2.0, 5.0, 0.3]), ["a", "b", "a", "b"])
    assert mixed[[0, 2]].sum().item() == pytest.approx(2) and mixed[[1, 3]].sum().item() == pytest.approx(2)


def test_the_genotype_of_the_sheet():
    alpha = torch.tensor([[5.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    found = strengths(alpha, torch.zeros(2), ["g", "g"])
    e = math.e
    assert found[0, 1].item() == pytest.approx(0.5 * e / (e**5 + e + 1), rel=1e-5)
    assert found[1, 1].item() == pytest.approx(0.5 * e**2 / (1 + e**2 + e), rel=1e-5)
    assert genotype(found, ("none", "lora-1", "scale"), ["g", "g"], 0.5) == {1: "lora-1"}
    assert genotype(found, ("none", "lora-1", "scale"), ["g", "g"], 1.0) == {1: "lora-1", 0: "lora-1"}


def test_scores_stand_still_at_first_and_each_half_moves_its_own():
    adapter = attached()
    (hook,), seen = adapter.hooks, []
    start = {n: s.detach().clone() for n, s in hook.scores.items()}
    after = hook.after_step

    def noted(step):
        after(step)
        still = all(torch.equal(s, start[n]) for n, s in hook.scores.items())
        seen.append((still, len(hook.adam.state) if hook.adam else None))

    hook.after_step = noted
    fit(adapter, steps=30)
    search = seen[:12]
    assert search[:4] == [(True, 0)] * 4 and all(s == (False, 2) for s in search[4:])  # 0.3·12 steps of waiting


def test_gradients_of_scores_leave_operators_alone_and_the_other_way_round():
    adapter = moved(attached())
    (hook,) = adapter.hooks
    hook.moving, batch = True, data()[0]

    class Run:
        calls = 0

        def loss(self, part):
            return loss(adapter.model, part)

        def backward(self, value):
            value.backward()
            Run.calls += 1

    hook._note(Run(), None, batch)
    assert all(p.grad is None for p in adapter.parameters())
    assert all(s.grad.abs().sum() > 0 for s in hook.scores.values())
    wanted = [s.grad.clone() for s in hook.scores.values()]
    loss(adapter.model, batch).backward()
    assert all(torch.equal(s.grad, w) for s, w in zip(hook.scores.values(), wanted))
    for name, s in hook.scores.items():  # finite differences of the first entry
        ends = []
        for step in (1e-2, -1e-2):
            flat = s.data.view(-1)
            flat[0] += step
            hook.apply()
            ends.append(loss(adapter.model.double(), [t.double() for t in batch]).item())
            flat[0] -= step
        adapter.model.float()
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(s.grad.view(-1)[0].item(), rel=2e-2, abs=1e-6), name


@pytest.mark.parametrize("operator", [None, "lora-2", "scale"])
def test_folding_equals_running(operator):
    adapter, x = moved(attached()), data()[0][0]
    if operator:
        adapter.rebuild({p: {"operator": operator, "weights": None} for p in adapter.deltas})
        moved(adapter)
    y = adapter.model(x)
    adapter.fold()
    assert torch.allclose(adapter.model(x), y, atol=1e-6)


def test_a_run_searches_and_trains_what_it_chose():
    adapter = attached(search="among='all', search=0.5")
    run = fit(adapter, steps=80)
    assert len(adapter.deltas) == 2 and all(
        d.operator in ("lora-2", "lora-8", "scale") for d in adapter.deltas.values()
    )
    assert adapter.parameter_count() == sum(d.parameter_count() for d in adapter.deltas.values())
    assert run.losses[-1] < run.losses[0]


def test_a_budget_takes_the_strongest_that_fit():
    adapter = attached(search="among='all', budget=60")
    fit(adapter)
    assert 0 < adapter.parameter_count() <= 60
    with pytest.raises(UserError, match="no operator fits"):
        fit(attached("operators=('none', 'lora-8')", "budget=5"))


def test_it_stops_and_goes_on_bit_for_bit_and_comes_back_from_its_file(tmp_path):
    class Stop(Exception):
        pass

    whole = attached()
    fit(whole, out=tmp_path / "whole", save_every=5)
    for last in (12, 30):  # in the search, and after it
        seen = []

        def broken(model, batch, seen=seen, last=last):
            seen.append(1)
            if len(seen) == last:
                raise Stop
            return loss(model, batch)

        with pytest.raises(Stop):
            fit(attached(), out=tmp_path / str(last), save_every=5, loss=broken)
        again = attached()
        fit(again, out=tmp_path / str(last), save_every=5, resume=True)
        assert whole.state().keys() == again.state().keys()
        assert all(torch.equal(a, b) for a, b in zip(whole.state().values(), again.state().values()))
    loaded = veneer.load(Stack(), tmp_path / "whole" / "adapter")
    x = data()[0][0]
    assert torch.equal(loaded.model(x), whole.model(x))


def test_operators_are_checked():
    for bad in ("('none',)", "('lora-2', 'lora-2')", "('lora-0',)", "('conv',)"):
        with pytest.raises(UserError):
            attached(f"operators={bad}")


def test_the_search_keeps_the_channels_that_it_scales_once():
    layer, x = nn.Linear(64, 128), torch.randn(32, 64, requires_grad=True)
    adapter = veneer.attach(nn.Sequential(layer), "pc-darts")
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = adapter.model(x)
    assert [t.shape for t in kept.values() if t.shape[-1:] == (32,) and t.ndim > 1 and len(t) == 32] == [(32, 32)]
    assert sum(t.numel() for t in kept.values() if t.shape[:1] == x.shape[:1] and t.ndim > 1) == 32 * (64 + 10 + 32)
    y.square().sum().backward()
    d = adapter.deltas["0"]
    assert torch.allclose(d.v.grad, d.weights[3] * 2 * y.detach()[:, d.S].square().sum(0), rtol=1e-5)
