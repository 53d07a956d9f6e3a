"""DiffoRA against the oracles of its sheet (023)."""

import pytest
import torch
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.deltas.diffora import chosen, kind, tangent_grams
from veneer.errors import UserError


class Stack(nn.Module):
    """Four residual layers of one shape."""

    def __init__(self, width: int = 6, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def data(count: int = 12):
    g = torch.Generator().manual_seed(1)
    return [(x, x.flip(-1)) for x in (torch.randn(8, 6, generator=g) for _ in range(count))]


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def attached(recipe="diffora", **options):
    return veneer.attach(Stack(), recipe, **({"rank": 2, "seed": 3} | options))


def fit(adapter, steps=20, **options):
    settings = {"loss": loss, "steps": steps, "lr": 1e-2, "precision": "fp32", "display": False}
    return veneer.fit(adapter, data(), **(settings | options))


def test_both_phases_start_at_the_base():
    adapter, x, seen = attached(), data()[0][0], []
    hook = adapter.hooks[0]
    with adapter.disabled():
        base = adapter.model(x)
    assert torch.equal(adapter.model(x), base)
    fit_start = hook.on_start
    hook.on_start = lambda a, s: (fit_start(a, s), seen.append(a.model(x).detach()))
    fit(adapter)
    assert len(seen) == 2 and all(torch.equal(y, base) for y in seen)


def test_open_gates_are_lora():
    adapter, x = attached(alpha=6.0), data()[0][0]
    twin = veneer.attach(Stack(), "lora", rank=2, alpha=6.0)
    for mine, theirs in zip(adapter.parameters(), twin.parameters()):
        theirs.data.copy_(mine.data.add_(0.1))
    for d in adapter.deltas.values():
        d.weighting = 1.0
    assert torch.allclose(adapter.model(x), twin.model(x), atol=1e-6)
    hook = adapter.hooks[0]
    hook.scores["a"].data.fill_(60.0)
    with hook.live(hook.relaxed()):
        assert torch.allclose(adapter.model(x), twin.model(x), atol=1e-6)


def test_everything_chosen_is_lora_without_shared_pairs():
    adapter = attached("diffora+diffora-ranks(ratio=1.0)")
    fit(adapter)
    assert not adapter.shared.owners and all(d.own and d.weighting == 1.0 for d in adapter.deltas.values())
    assert adapter.parameter_count() == 4 * 2 * 12


def test_nothing_chosen_is_one_pair_whose_gradient_is_the_sum_over_users():
    adapter = attached("diffora+diffora-ranks(ratio=0.0)")
    fit(adapter)
    assert adapter.parameter_count() == 2 * 12 == sum(d.parameter_count() for d in adapter.deltas.values())
    deltas = list(adapter.deltas.values())
    assert len({d.pair().A.data_ptr() for d in deltas}) == 1
    x, y = data()[0]
    loss(adapter.model, (x, y)).backward()
    (B,) = adapter.shared.B.values()
    twin, total = veneer.attach(Stack(), "lora", rank=2, alpha=4.0), torch.zeros_like(B)
    for mine, d in zip(deltas, twin.deltas.values()):
        d.A.data.copy_(mine.pair().A)
        d.B.data.copy_(mine.pair().B)
    loss(twin.model, (x, y)).backward()
    for d in twin.deltas.values():
        total += d.B.grad
    assert torch.allclose(B.grad, total, atol=1e-6) and total.abs().max() > 1e-4


def test_the_number_chosen_and_ties():
    weights = dict.fromkeys("abcdefg", 0.5)
    kinds = dict(zip(weights, "xxxxyyy"))
    assert chosen(weights, kinds, 0.5) == ["a", "b", "e", "f"]  # ⌈4/2⌉ and ⌈3/2⌉, the first ones
    assert chosen(weights | {"g": 0.6}, kinds, 0.5, "all") == ["a", "b", "c", "g"]  # ⌈7/2⌉
    assert chosen(weights, kinds, 0.0) == [] and len(chosen(weights, kinds, 1.0)) == 7


def test_scores_have_no_gradient_while_b_is_zero():
    adapter = attached()
    hook = adapter.hooks[0]
    with hook.live(hook.relaxed()):
        (found,) = torch.autograd.grad(loss(adapter.model, data()[0]), hook.scores["a"])
    assert torch.equal(found, torch.zeros(4))


def test_the_gradient_of_a_score_in_numbers():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    model = nn.Sequential(layer)
    adapter = veneer.attach(model, "diffora(alpha=1.0)", rank=1)
    (d,), hook = adapter.deltas.values(), adapter.hooks[0]
    d.A.data.fill_(1.0)
    d.B.data.fill_(2.0)  # sBAx = 2, and t makes y − t = −1
    with hook.live(hook.relaxed()):
        y = model(torch.ones(1, 1))
        (found,) = torch.autograd.grad(0.5 * (y - (y.detach() + 1)).square().sum(), hook.scores["a"])
    assert found.item() == pytest.approx(-0.5)  # Γ̄(1 − Γ̄)·⟨y − t, sBAx⟩ = ¼·(−1)·2, sheet 023, oracle 6


def test_columns_sum_to_their_number_and_start_at_one():
    hook = attached("diffora+diffora-ranks(relax='columns')").hooks[0]
    assert torch.equal(hook.relaxed(), torch.ones(4))
    hook.scores["a"].data.normal_()
    assert hook.relaxed().sum().item() == pytest.approx(4.0)


def test_the_kernel_is_that_of_the_closed_form_and_grows_with_choices():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4))
    adapter = veneer.attach(model, "diffora(alpha=3.0)", rank=2, sites=["0", "2"])
    for d in adapter.deltas.values():
        d.weighting = 1.0
        d.B.data.normal_()
    X, v = torch.randn(3, 5), torch.randn(4)
    H = tangent_grams(adapter, lambda: model(X) @ v)
    d = adapter.deltas["2"]
    h = model[1](model[0](X))
    G = v.expand(3, 4)  # ∂f/∂y, which is constant at the last layer
    s2 = d.scale**2
    of_B = s2 * (G @ G.T) * ((h @ d.A.T) @ (h @ d.A.T).T)  # ⟨gᵢ(Axᵢ)ᵀ, gⱼ(Axⱼ)ᵀ⟩, one position a sample
    of_A = s2 * ((G @ d.B) @ (G @ d.B).T) * (h @ h.T)
    assert torch.allclose(H["2"].float(), of_A + of_B, rtol=1e-5)
    smallest = [torch.linalg.eigvalsh(M)[0].item() for M in (H["0"], H["2"], H["0"] + H["2"])]
    assert smallest[0] > -1e-9 and smallest[2] >= max(smallest[:2]) - 1e-9


def test_a_run_searches_rounds_and_learns():
    adapter = attached("diffora+diffora-ranks(score_rate=0.1)")
    run = fit(adapter, steps=60)
    own = [d for d in adapter.deltas.values() if d.own]
    assert len(own) == 2 and adapter.parameter_count() == 3 * 2 * 12
    assert run.losses[-1] < 0.8 * run.losses[0]
    assert len({kind(d.site) for d in adapter.deltas.values()}) == 1


@pytest.mark.parametrize("unrolled", [False, True])
def test_the_search_moves_scores_apart_from_the_weights(unrolled):
    adapter = attached(f"diffora+diffora-ranks(score_rate=0.1, waiting=0.5, unrolled={unrolled})")
    hook, trace = adapter.hooks[0], []
    adapter.model.train()
    before = hook.after_step
    hook.after_step = lambda step: (before(step), trace.append([d.weighting for d in adapter.deltas.values()]))
    fit(adapter, steps=30)
    search = trace[:12]
    assert search[5] == [0.5] * 4 and len(set(search[-1])) == 4  # 0.4·30 steps, still for half of them


def test_it_stops_and_goes_on_bit_for_bit(tmp_path):
    class Stop(Exception):
        pass

    def broken(at):
        seen = []

        def inner(model, batch):
            seen.append(1)
            if len(seen) == at:
                raise Stop
            return loss(model, batch)

        return inner

    recipe = "diffora+diffora-ranks(score_rate=0.1)"
    whole = attached(recipe)
    fit(whole, out=tmp_path / "whole", save_every=4)
    for at in (10, 22):  # in the search (two losses a step), and after it
        with pytest.raises(Stop):
            fit(attached(recipe), out=tmp_path / str(at), save_every=4, loss=broken(at))
        again = attached(recipe)
        fit(again, out=tmp_path / str(at), save_every=4, resume=True)
        for (n, a), (m, b) in zip(whole.state().items(), again.state().items()):
            assert n == m and torch.equal(a, b), n


def test_it_saves_shared_pairs_once_and_folds_each_user_alone(tmp_path):
    adapter, x = attached("diffora+diffora-ranks(ratio=0.25)"), data()[0][0]
    fit(adapter)
    y = adapter.model(x)
    adapter.save(tmp_path / "a")
    loaded = veneer.load(Stack(), tmp_path / "a")
    assert torch.equal(loaded.model(x), y) and loaded.parameter_count() == adapter.parameter_count()
    users = [d for d in adapter.deltas.values() if not d.own]
    untouched = users[1].weight().clone()
    adapter.fold()
    assert torch.allclose(adapter.model(x), y, atol=1e-5)
    assert torch.equal(users[1].weight(), untouched)
    adapter.unfold()
    assert torch.equal(adapter.model(x), y)


@pytest.mark.parametrize("relax", ["sigmoid", "columns"])
def test_what_was_saved_in_the_search_runs_the_same(relax, tmp_path):
    adapter, x = attached(f"diffora+diffora-ranks(relax='{relax}')"), data()[0][0]
    adapter.hooks[0].scores["a"].data.normal_()
    adapter.hooks[0].apply()
    for p in adapter.parameters():
        p.data.add_(0.3)
    adapter.save(tmp_path / "a")
    assert torch.equal(veneer.load(Stack(), tmp_path / "a").model(x), adapter.model(x))


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="start that moves part of W"):
        attached("diffora+pissa")
    with pytest.raises(UserError, match="form diffora"):
        attached("lora+diffora-ranks")
    adapter = attached()
    adapter.hooks[0].on_start(adapter, Schedule(10))
    assert adapter.hooks[0].first == 1
