"""N2N on adapters against the oracles of its sheet (148)."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import veneer
from veneer.errors import UserError
from veneer.ranks.n2n import Policy, Trials, constrained, features, policy, reinforce, reward


class Small(nn.Module):
    """A classifier of three layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 5)])

    def forward(self, x, labels=None):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        logits = self.layers[-1](x)
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def data(count: int = 8):
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(32, 6, generator=g) for _ in range(count)]
    return [{"x": x, "labels": x[:, :5].argmax(1)} for x in xs]


FAST = "epochs=3, rollouts=3, steps=8"


def attached(fields: str = FAST, model=None, **options):
    return veneer.attach(model or Small(), f"lora+n2n({fields})", calibration=data(), **options)


def trials():
    adapter = veneer.attach(Small(), "lora", rank=4, seed=1)
    return Trials(adapter, data()[:6], data()[6:], 10, 1e-2)


def test_the_reward_in_numbers():
    assert reward(0.90, 0.92, 0.9) == pytest.approx(0.968478, abs=1e-6)
    assert reward(0.7, 0.7, 0.5) == pytest.approx(0.75)
    assert reward(0.80, 0.92, 0.9) == pytest.approx(0.860870, abs=1e-6)
    values = [reward(1, 1, c / 20) for c in range(21)]
    steps = [b - a for a, b in pairwise(values)]
    assert values[0] == 0 and values[-1] == 1 and min(steps) > 0 and steps == sorted(steps, reverse=True)


def test_a_broken_constraint_costs_more_as_epochs_pass():
    fades = [constrained(0.0, e) + 1 for e in (0, 5, 10, 15, 20)]
    assert fades == pytest.approx([1, 0.197531, 0.0123457, 0, 0], abs=1e-6)
    assert constrained(0.968478, 5) == pytest.approx(-0.61116, abs=1e-5)


def test_the_gradient_at_the_logits_is_that_of_reinforce():
    agent, x = Policy(3, both=False), torch.rand(1, 5)
    seen = {}
    agent.out.register_forward_hook(lambda m, a, y: (y.retain_grad(), seen.update(y=y))[0])
    _, logp, _ = agent(x, torch.tensor([2]))
    (-(0.7 - 0.2) * logp.sum()).backward()
    p = seen["y"].detach().softmax(-1)
    assert torch.allclose(seen["y"].grad, -0.5 * (torch.tensor([0.0, 0.0, 1.0]) - p), atol=1e-6)


@pytest.mark.parametrize("both", [True, False])
def test_every_weight_of_a_policy_learns(both):
    agent = policy(3, both, 0)
    _, logp, _ = agent(torch.rand(4, 5), torch.tensor([0, 2, 1, 1]))
    logp.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in agent.parameters())


def test_a_bandit_is_learned_and_equal_rewards_teach_nothing():
    x, wanted = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([4, 0, 0, 0])

    def chance_of(agent):
        with torch.no_grad():
            return agent(x, wanted)[1].sum().item()

    agent = policy(5, False, 1)
    before = [chance_of(agent)]
    for block in range(4):  # dense enough to be met: a share of the sites that are right
        reinforce(
            agent, x, lambda a, e: sum(i == j for i, j in zip(a, wanted.tolist())) / 4,
            epochs=15, rollouts=8, lr=1e-2, seed=block,
        )  # fmt: skip
        before.append(chance_of(agent))
    assert before == sorted(before) and before[-1] > before[0] + 2
    still = policy(5, False, 1)
    start = [p.detach().clone() for p in still.parameters()]
    reinforce(still, x, lambda a, e: 0.5, epochs=5, rollouts=3, lr=1e-2)
    assert all(torch.allclose(p, s, atol=1e-7) for p, s in zip(still.parameters(), start))


def test_the_same_seed_draws_the_same():
    x, seen = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)), []
    for _ in range(2):
        torch.rand(5)  # the global generator has no say
        seen.append(reinforce(policy(3, True, 7), x, lambda a, e: float(a[0]), epochs=3, rollouts=2, lr=1e-2, seed=7))
    assert seen[0] == seen[1]


def test_a_trial_is_the_training_of_an_adapter_of_that_rank_and_is_made_once():
    run = trials()
    found = run((2, 0, 1))
    model = Small()
    twin = veneer.attach(model, "lora", rank=4, seed=1)
    parts = list(twin.deltas.values())
    start = [(d.A.data[:r].clone(), d.B.data[:, :r].clone()) for d, r in zip(parts, (2, 0, 1))]
    twin.rebuild({p: {"rank": r} if r else None for p, r in zip(list(twin.deltas), (2, 0, 1))})
    for d, (A, B) in zip(twin.deltas.values(), [start[0], start[2]]):
        d.A.data.copy_(A)
        d.B.data.copy_(B)
    optimizer = torch.optim.AdamW(twin.parameters(), 1e-2, weight_decay=0.0)
    for step in range(10):
        optimizer.zero_grad()
        model(**data()[step % 6]).loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = [(model(**b).logits.argmax(1) == b["labels"]).float().mean().item() for b in data()[6:]]
    assert found == pytest.approx(sum(right) / 2, abs=1e-6)
    assert run.size((2, 0, 1)) == twin.parameter_count()
    run._trained = None
    assert run((2, 0, 1)) == found


def test_the_empty_configuration_is_the_base():
    run = trials()
    base = Small()
    with torch.no_grad():
        right = [(base(**b).logits.argmax(1) == b["labels"]).float().mean().item() for b in data()[6:]]
    assert run((0, 0, 0)) == pytest.approx(sum(right) / 2) and run.size((0, 0, 0)) == 0


def test_what_is_built_is_the_best_trial_and_the_model_is_as_it_was():
    model, untouched = Small(), Small()
    adapter = attached(model=model, alpha=8.0)
    (hook,) = adapter.hooks
    every = [pair for epoch in hook.history for pair in epoch]
    assert len(every) == 2 * 3 * 3
    ranks = {p: d.rank for p, d in adapter.deltas.items()}
    assert tuple(ranks.get(p, 0) for p in hook.sites) == hook.best and set(hook.best) <= {0, 1, 2, 4, 8}
    assert all(d.scale == pytest.approx(1.0) for d in adapter.deltas.values())  # α/r as of the form: 8/8
    assert set(veneer.core.adapter.adapters(model)) == {"default"}
    adapter.detach()
    assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(model.parameters(), untouched.parameters()))


def test_it_learns_in_what_it_built():
    adapter = attached()
    losses = veneer.fit(
        adapter, data(), steps=120, lr=3e-2, precision="fp32", display=False, loss=lambda m, b: m(**b).loss
    ).losses
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])  # an epoch each


def test_constraints_hold_where_something_met_them():
    adapter = attached(f"most=100, {FAST}")
    met = [c for epoch in adapter.hooks[0].history for c, _ in epoch]
    assert met and adapter.parameter_count() <= 100


def test_what_it_cannot_do_is_refused():
    with pytest.raises(UserError, match="calibration"):
        veneer.attach(Small(), "lora+n2n")
    with pytest.raises(UserError, match="at least two"):
        veneer.attach(Small(), "lora+n2n", calibration=data(1))
    with pytest.raises(UserError, match="two different"):
        attached("ranks=(4,)")


def test_features_lie_within_the_unit_interval():
    sites = veneer.core.site.find_sites(Small(), "linear")
    x = features(sites, (8, 0, 8), 8)
    assert x.shape == (3, 5) and x.min() >= 0 and x.max() <= 1 and x[:, 3].tolist() == [1, 0, 1]
