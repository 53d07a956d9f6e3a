"""Once-for-All on adapters against the oracles of its sheet (120)."""

from collections import Counter

import pytest
import torch
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.errors import UserError
from veneer.ranks.elastic import balance, cut, hidden_units, kept, pick


class Small(nn.Module):
    """Two layers of a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x, labels=None):
        return self.second(self.first(x).relu())


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])


def data(count: int = 8):
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(16, 6, generator=g) for _ in range(count)]
    return [{"x": x, "labels": x[:, :5].argmax(1)} for x in xs]


def attached(fields: str = "", form: str = "lora", **options):
    return veneer.attach(Small(), f"{form}+elastic({fields})", **({"rank": 4, "seed": 2} | options))


def moved(adapter):
    torch.manual_seed(5)
    for p in adapter.parameters():
        p.data.add_(0.3 * torch.randn(p.shape))
    return adapter


def fit(adapter, steps=24, **options):
    settings = {"loss": loss, "steps": steps, "lr": 1e-2, "precision": "fp32", "display": False}
    return veneer.fit(adapter, data(), **(settings | options))


@pytest.mark.parametrize("scaling, alpha", [("constant", 8.0 / 2), ("per-rank", 8.0)])
def test_a_slice_is_the_lora_of_its_first_components(scaling, alpha):
    adapter, x = moved(attached(f"scaling='{scaling}'", alpha=8.0)), data()[0]["x"]
    twin = veneer.attach(Small(), "lora", rank=2, alpha=alpha)
    for mine, theirs in zip(adapter.deltas.values(), twin.deltas.values()):
        theirs.A.data.copy_(mine.A[:2])
        theirs.B.data.copy_(mine.B[:, :2])
    whole = adapter.model(x)
    with adapter.hooks[0].at(dict.fromkeys(adapter.deltas, 0.5)):
        assert torch.allclose(adapter.model(x), twin.model(x), atol=1e-6)
    assert torch.equal(adapter.model(x), whole)
    assert cut(adapter, dict.fromkeys(adapter.deltas, 0.5)) == dict.fromkeys(adapter.deltas, 2)
    assert torch.allclose(adapter.model(x), twin.model(x), atol=1e-6)
    assert [d.scale for d in adapter.deltas.values()] == [alpha / 2] * 2


def test_components_outside_a_slice_have_no_gradient_and_slices_add_up():
    adapter, batch = moved(attached()), data()[0]
    hook, (d, _) = adapter.hooks[0], adapter.deltas.values()
    found = []
    for share in (0.25, 0.5):
        with hook.at(dict.fromkeys(adapter.deltas, share)):
            loss(adapter.model, batch).backward()
        n = kept(share, 4)
        found.append(d.B.grad.clone())
        if share == 0.25:
            assert not d.A.grad[n:].any() and not d.B.grad[:, n:].any() and d.A.grad[:n].any()
    assert not found[1][:, 2:].any() and not torch.equal(found[0], found[1])  # the second was added to the first


def test_balancing_keeps_the_product_and_orders_by_singular_values():
    g = torch.Generator().manual_seed(0)
    for shape in ((4, 9, 7), (6, 3, 8)):  # the second has more components than directions
        r, i, o = shape
        A, B = torch.randn(r, i, generator=g), torch.randn(o, r, generator=g)
        A2, B2 = balance(A, B)
        assert torch.allclose(B2 @ A2, B @ A, atol=1e-5) and A2.shape == A.shape and B2.shape == B.shape
        sigma = torch.linalg.svdvals(B @ A)
        norms = B2.norm(dim=0) * A2.norm(dim=1)
        assert torch.allclose(norms[: min(r, i)], sigma[: min(r, i)], atol=1e-4)
        lost = (B @ A - B2[:, :2] @ A2[:2]).square().sum()
        assert lost.item() == pytest.approx(sigma[2:].square().sum().item(), rel=1e-4)


def test_hidden_units_are_ordered_by_the_columns_of_the_layer_down():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11, hidden_size=2, intermediate_size=3, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    down = model.model.layers[0].mlp.down_proj
    down.weight.data.copy_(torch.tensor([[1.0, -3.0, 0.5], [0.0, 2.0, -1.0]]))
    ((path, (module, order, each)),) = hidden_units(model).items()
    assert module is down and order.tolist() == [1, 2, 0] and each == 3 * 2  # sheet 120, oracle 3
    adapter = veneer.attach(model, "lora+elastic(widths=(1.0, 0.6))", rank=1)
    moved(adapter)
    ids = torch.tensor([[1, 2, 3]])
    with adapter.hooks[0].at({path: 0.6}):
        narrow = model(ids).logits
    mlp = model.model.layers[0].mlp
    adapter.bake()
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight.data = layer.weight.data[[1, 2]]
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, [1, 2]]
    assert torch.allclose(model(ids).logits, narrow, atol=1e-6)


def test_a_stage_draws_what_it_has_opened_and_every_replica_the_same():
    first, second = attached(), attached()
    for adapter in (first, second):
        adapter.phase = 2
    found = [first.hooks[0].drawn(step, 0) for step in range(1000)]
    assert found == [second.hooks[0].drawn(step, 0) for step in range(1000)]
    counts = Counter(sizes["first"] for sizes in found)
    assert set(counts) == {1.0, 0.5, 0.25} and all(280 < n < 390 for n in counts.values())
    assert first.hooks[0].drawn(0, 0) != first.hooks[0].drawn(0, 1) or found[1] != first.hooks[0].drawn(1, 1)


def test_one_size_without_teacher_is_plain_training():
    adapter = attached("ranks=(1.0, 0.5), distill=0.0, order='none', whole=0.99")
    plain = veneer.attach(Small(), "lora", rank=4, seed=2)
    fit(adapter, steps=101, schedule="constant")
    first = fit(plain, steps=100, schedule="constant").losses
    again = attached("ranks=(1.0, 0.5), distill=0.0, order='none', whole=0.99")
    assert fit(again, steps=101, schedule="constant").losses[:100] == first


def test_training_makes_small_slices_usable():
    def small(adapter):
        with torch.no_grad(), adapter.hooks[0].at(dict.fromkeys(adapter.deltas, 0.25)):
            return sum(loss(adapter.model, b).item() for b in data())

    elastic, plain = attached("distance='classes'"), attached("whole=0.98, ranks=(1.0, 0.5), order='none', distill=0.0")
    for adapter in (elastic, plain):
        fit(adapter, steps=240, lr=5e-2)
    assert small(elastic) < 0.8 * small(plain)
    assert not elastic.hooks[0].teacher


def test_the_teacher_is_the_whole_adapter_and_its_targets_count():
    adapter, batch = moved(attached()), data()[0]
    hook = adapter.hooks[0]
    z, hook.soft = torch.randn(16, 5), torch.randn(16, 5)
    wanted = nn.functional.cross_entropy(z, hook.soft.softmax(1))
    assert torch.allclose(hook.loss(z, batch, None), wanted)
    adapter.optimizer = None
    hook.on_phase_end(hook.phases()[0])
    assert {n: t.tolist() for n, t in hook.teacher.items()} == {n: p.tolist() for n, p in adapter.named_parameters()}


def test_the_slice_picked_is_within_the_budget_and_the_best_of_a_known_score():
    adapter = moved(attached())
    hook = adapter.hooks[0]
    running = {}
    enter = hook.at
    hook.at = lambda sizes: (running.update(sizes), enter(sizes))[1]
    fast = {"population": 20, "generations": 30}
    least = pick(adapter, lambda: -hook.cost(running), 10**9, samples=24, **fast)
    assert least == dict.fromkeys(adapter.deltas, 0.125)
    for budget in (60, 100):
        most = pick(adapter, lambda: hook.cost(running), budget, samples=24, **fast)
        costs = [hook.cost({"first": a, "second": b}) for a in hook.ranks for b in hook.ranks]
        assert hook.cost(most) == max(c for c in costs if c <= budget)
    with pytest.raises(UserError, match="more than the budget"):
        pick(adapter, lambda: 0.0, 10)
    sizes = {"first": 0.25, "second": 1.0}
    cost = hook.cost(sizes)
    cut(adapter, sizes)
    assert adapter.parameter_count() == cost == hook.cost({})


def test_it_stops_and_goes_on_bit_for_bit_and_comes_back_from_its_file(tmp_path):
    class Stop(Exception):
        pass

    whole = attached()
    fit(whole, out=tmp_path / "whole", save_every=5)

    for fatal_step in (13, 22):
        seen = []

        def broken(model, batch, seen=seen, last=fatal_step):
            seen.append(1)
            if len(seen) == last:
                raise Stop
            return loss(model, batch)

        with pytest.raises(Stop):
            fit(attached(), out=tmp_path / str(fatal_step), save_every=5, loss=broken)
        again = attached()
        fit(again, out=tmp_path / str(fatal_step), save_every=5, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(whole.state().values(), again.state().values()))
    loaded = veneer.load(Small(), tmp_path / "whole" / "adapter")
    x = data()[0]["x"]
    with loaded.hooks[0].at({"first": 0.5}), whole.hooks[0].at({"first": 0.5}):
        assert torch.equal(loaded.model(x), whole.model(x))


def test_sizes_that_do_not_fall_are_refused():
    with pytest.raises(UserError, match="must begin with 1"):
        attached("ranks=(0.5, 0.25)")
    with pytest.raises(UserError, match="MLP"):
        attached("widths=(1.0, 0.5)")
    assert [p.name for p in attached("progressive=False").hooks[0].phases()] == ["whole", "4 ranks, 1 widths"]
    attached().hooks[0].on_start(None, Schedule(3))
