"""Composable sparse fine-tuning against its sheet's oracles (140)."""

import pytest
import torch
from single import gradients
from torch import nn

import veneer
from veneer.core.context import Context, using
from veneer.core.hook import Schedule
from veneer.errors import UserError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.second(self.first(x).tanh())


SIZE = 6 * 10 + 10 + 10 * 4 + 4


def batches(seed=0, count=16):
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(6, 4, generator=g)
    x = [torch.randn(8, 6, generator=g) for _ in range(count)]
    return [{"x": b, "y": b @ M} for b in x]


def error(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def fit(adapter, seed=0, steps=32, **settings):
    plain = {"loss": error, "steps": steps, "lr": 1e-2, "display": False, "precision": "fp32", "schedule": "constant"}
    return veneer.fit(adapter, batches(seed), **(plain | settings))


def attached(recipe="composable-sft(entries=12, dense=0.5)", model=None, **options):
    model = Net() if model is None else model
    return model, veneer.attach(model, recipe, sites="all", **options)


def difference(model, base):
    return {n: p.detach() - base.get_parameter(n) for n, p in model.named_parameters() if ".veneer." not in n}


def test_it_ends_with_k_entries_and_nothing_else_moves():
    model, adapter = attached()
    fit(adapter, weight_decay=0.1)
    assert adapter.parameter_count() == 12
    before = {n: p.clone() for n, p in model.named_parameters() if ".veneer." not in n}
    deltas = dict(adapter.deltas)
    adapter.bake()
    changed = {n: (p.detach() != before[n]).flatten() for n, p in model.named_parameters()}
    assert sum(int(c.sum()) for c in changed.values()) == 12
    for path, d in deltas.items():
        here = torch.cat([changed[f"{path}.weight"], changed[f"{path}.bias"]])
        assert here.nonzero().flatten().tolist() == ([] if d.indices is None else d.indices.tolist())


def test_phase_one_is_full_fine_tuning_and_phase_two_starts_at_the_base():
    model, adapter = attached()
    full = Net()
    full.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(adapter.parameters(), lr=0.01), torch.optim.Adam(full.parameters(), lr=0.01)]
    for batch in batches():
        for net, optimizer in zip((model, full), optimizers):
            optimizer.zero_grad()
            error(net, batch).backward()
            optimizer.step()
    x = torch.randn(5, 6)
    torch.testing.assert_close(model(x), full(x), rtol=1e-4, atol=1e-5)
    moved = torch.cat([d.D.detach() for d in adapter.deltas.values()])
    with adapter.disabled():
        y = model(x)
    assert adapter.advance() and torch.equal(model(x), y)
    chosen = [d.indices + s for d, s in zip(adapter.deltas.values(), (0, 70)) if d.indices is not None]
    assert torch.equal(torch.cat(chosen).long(), moved.abs().topk(12).indices.sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_gradients_are_the_dense_ones_at_the_entries(phase, below, dtype):
    model = Net()
    if below:
        fit(veneer.attach(model, "composable-sft(select='random', entries=20)", sites="all", name="below"))
    _, adapter = attached(f"composable-sft(entries=60, select={'lottery' if phase == 'dense' else 'random'!r})", model)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(0, 0.1)
    delta, x = adapter.deltas["first"], torch.randn(3, 5, 6, requires_grad=True)
    W = (model.first.weight + delta.weight()).detach()
    W = (W + model.first.veneer["below"].weight()).detach() if below else W
    others = [delta, model.first.veneer["below"]] if below else [delta]
    bias = (model.first.bias + sum(d.flat()[60:] for d in others)).detach().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        y = model.first(x)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    W.requires_grad_()
    expected = x @ W.T + bias
    torch.testing.assert_close(y.float(), expected, atol=tolerance, rtol=tolerance)
    own = delta.D if phase == "dense" else delta.v
    (g, into), (G, at_bias, dense_into) = gradients(y.float(), own, x), gradients(expected, W, bias, x)
    G = torch.cat([G.flatten(), at_bias])
    wanted = G if phase == "dense" else G[delta.indices]
    torch.testing.assert_close(g, wanted, atol=10 * tolerance, rtol=tolerance)
    torch.testing.assert_close(into, dense_into, atol=10 * tolerance, rtol=tolerance)


def test_with_every_entry_it_is_full_fine_tuning_run_twice():
    model, adapter = attached(f"composable-sft(entries={SIZE}, dense=0.5)")
    full = Net()
    full.load_state_dict(model.state_dict())
    run = fit(adapter, clip=0.0)
    again = veneer.attach(full, "full", sites="all")
    once = fit(again, steps=16, clip=0.0)
    assert run.losses[:16] == pytest.approx(once.losses, rel=1e-4)
    assert run.losses[16] != pytest.approx(run.losses[15], rel=1e-2)


def test_sums_of_adapters_do_not_depend_on_the_order():
    model = Net()
    x, parts = torch.randn(5, 6), {}
    for i, name in enumerate("ab"):
        adapter = veneer.attach(model, "composable-sft(entries=20)", sites="all", name=name, seed=i)
        fit(adapter, seed=i)
        parts[name] = [d.flat().detach() for d in adapter.deltas.values()]
    y = model(x)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer, one, other in zip((plain.first, plain.second), *parts.values()):
            n = layer.weight.numel()
            layer.weight.add_((one + other)[:n].view_as(layer.weight))
            layer.bias.add_((one + other)[n:])
    torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-6)


def test_rounds_keep_what_was_chosen_and_add_their_share():
    _, adapter = attached("composable-sft(entries=10, iterations=2, dense=0.5)")
    assert [p.name for p in adapter.phases] == ["dense", "sparse", "dense", "sparse"]
    seen = []
    advance = adapter.advance

    def watched():
        chosen = {p: set() if d.indices is None else set(d.indices.tolist()) for p, d in adapter.deltas.items()}
        held = torch.cat([d.v.detach() for d in adapter.deltas.values() if d.v is not None] or [torch.zeros(0)])
        seen.append((chosen, held))
        return advance()

    adapter.advance = watched
    fit(adapter, steps=64)
    counts = [sum(map(len, chosen.values())) for chosen, _ in seen]
    assert counts == [0, 5, 5, 10]
    assert all(seen[1][0][p] <= seen[3][0][p] for p in adapter.deltas)
    assert torch.equal(seen[1][1], seen[2][1]) and seen[1][1].any()


def test_a_head_that_trains_beside_goes_back_to_its_start():
    model = Net()
    adapter = veneer.attach(model, "composable-sft(entries=5, dense=0.5)", sites="first", train="second")
    start, seen = model.second.weight.detach().clone(), []
    advance = adapter.advance
    head = adapter.trained["second.weight"].parameter()
    adapter.advance = lambda: (seen.append(head.detach().clone()), advance(), seen.append(head.detach().clone()))[1]
    fit(adapter)
    assert not torch.equal(seen[0], start) and torch.equal(seen[1], start) and not torch.equal(head, start)


def test_a_random_draw_has_one_phase_and_all_entries_alike_likely():
    _, adapter = attached("composable-sft(select='random', entries=30)")
    assert len(adapter.phases) == 1 and adapter.parameter_count() == 30
    counts = torch.zeros(SIZE)
    for seed in range(60):
        _, other = attached("composable-sft(select='random', entries=57)", seed=seed)
        for d, s in zip(other.deltas.values(), (0, 70)):
            if d.indices is not None:
                counts[d.indices.long() + s] += 1
    assert counts.sum() == 60 * 57 and counts.min() > 10 and counts.max() < 50


def test_the_l1_term_is_the_sheets():
    _, adapter = attached("composable-sft(entries=12, l1_dense=3.0)")
    adapter.hooks[0].on_start(adapter, Schedule(1))
    d = adapter.deltas["first"]
    with torch.no_grad():
        d.D[0] = -2.0
    with using(Context(training=True)) as ctx:
        d.prepare(ctx)
    ctx.total_loss().backward()
    assert ctx.total_loss().item() == pytest.approx(3.0 / SIZE * 2.0)
    assert d.D.grad[0] == pytest.approx(-3.0 / SIZE) and d.D.grad.count_nonzero() == 1


def test_entries_that_end_at_the_base_are_dropped_and_the_file_is_sparse(tmp_path):
    model, adapter = attached()
    fit(adapter, steps=8)
    d = next(d for d in adapter.deltas.values() if d.v is not None)
    with torch.no_grad():
        d.v[0] = 1e-8
    adapter.hooks[0].on_end()
    assert adapter.parameter_count() == 11
    x = torch.randn(3, 6)
    y = model(x)
    adapter.save(tmp_path / "kept")
    assert sum(t.numel() for t in adapter.state().values()) == 22
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)


def test_a_run_that_was_broken_off_in_the_second_phase_ends_the_same(tmp_path):
    calls = []

    def breaking(model, batch):
        calls.append(batch)
        if len(calls) == 27:
            raise KeyboardInterrupt
        return error(model, batch)

    def run(folder, **settings):
        torch.manual_seed(0)
        _, adapter = attached("composable-sft(entries=12, dense=0.25)")
        fit(adapter, out=tmp_path / folder, save_every=4, **settings)
        return adapter.state()

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("broken", loss=breaking)
    again = run("broken", resume=True)
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="entries=900, but the selected tensors have only 114"):
        attached("composable-sft(entries=900)")
    with pytest.raises(UserError, match="which lora is not"):
        veneer.attach(Net(), "lora+composable-sft-ranks", sites="all")
