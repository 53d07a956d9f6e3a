"""ABMLL against the oracles of its sheet (088) and an explicit meta-step."""

import copy

import pytest
import torch
from models import make
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.errors import UserError
from veneer.numerics.gaussian import Gaussian, divergence
from veneer.objectives.abmll import Episodes, _split, _tasks, _without_task
from veneer.train.display import Silent

OFF = "gaussian-lora(log_variance=-70.0)+abmll(beta=0.0, gamma=0.0, inner_steps=0, support=0.0)"
FIT = {"steps": 6, "lr": 1e-2, "precision": "fp32", "display": False, "task": "classification"}


class Net(nn.Module):
    """A classifier of rows x (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x).tanh())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Outputs", (), {"logits": logits, "loss": loss})


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def columns(count: int = 40) -> dict[str, torch.Tensor]:
    """Rows whose label is the place of the largest of three numbers; task t shifts it by t."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return {"x": x, "labels": (x[:, :3].argmax(1) + torch.arange(count) % 4) % 3}


def episodes(**options) -> Episodes:
    return Episodes(columns(), [k % 4 for k in range(40)], 8, **options)


def attached(fields: str = "", **options):
    adapter = veneer.attach(net(), f"abmll({fields})", rank=2, sites="all", **options)
    return adapter, adapter.hooks[-1]


def runner(adapter):
    """``run`` as the hook gets it, for one micro-batch alone."""

    class Run:
        loss = staticmethod(lambda batch: adapter.model(**batch).loss)
        backward = staticmethod(lambda loss: loss.backward())

    return Run()


def test_with_all_off_it_is_lora_on_that_task():
    batch = columns(8)
    (plain, none) = (veneer.attach(net(), recipe, rank=2, sites="all") for recipe in ("lora", OFF))
    losses = [veneer.fit(a, [batch], **FIT).losses for a in (plain, none)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # sums in another order
    assert losses[0][-1] < losses[0][0]
    assert all(torch.allclose(none.state()[k], v, rtol=1e-5, atol=1e-7) for k, v in plain.state().items())


def test_a_meta_step_is_the_explicit_one():
    beta, gamma = 1e-3, 1e-3
    given = f"beta={beta}, gamma={gamma}, inner_steps=2, inner_rate=0.05, inner_clip=0.2"
    adapter = veneer.attach(net(), f"gaussian-lora(log_variance=-3.0)+abmll({given})", rank=2, sites="all")
    hook = adapter.hooks[-1]
    with torch.no_grad():
        for k, p in enumerate(adapter.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
    batch = next(iter(episodes()))
    twin = copy.deepcopy(adapter.model)
    loss = hook.micro_step(runner(adapter), batch)

    own = veneer.adapters(twin)["default"]
    deltas = list(own.deltas.values())
    theta = {p: p.detach().clone().requires_grad_() for p in own.parameters()}

    def kl():  # by the definition, of all sites; φ are the tensors, θ the copies
        total = 0.0
        for d in deltas:
            q, p = d.gaussian(), Gaussian(*(theta[t] for t in d.gaussian()))
            (m, lq), (n, lp) = ((g.B @ g.A, g.B_v @ g.A_v - 3) for g in (q, p))
            total = total + 0.5 * (lp - lq + ((lq.exp() + (m - n) ** 2) / lp.exp()) - 1).sum()
        return total

    params, expected, losses = list(theta), {p: torch.zeros_like(p) for p in theta}, []
    for t in batch["task"][:2].tolist():
        rows = {k: v[batch["task"] == t] for k, v in batch.items() if k != "task"}
        support, query = ({k: v[half] for k, v in rows.items()} for half in (slice(0, 4), slice(4, 8)))
        for k in range(2):
            twin.eval()
            for d in deltas:
                d.sampled = ("inner", 0, 1, t, k)
            slopes = torch.autograd.grad(twin(**support).loss + beta * kl(), params)
            norm = torch.cat([s.flatten() for s in slopes]).norm()
            assert norm > 0.2
            with torch.no_grad():
                for p, s in zip(params, slopes):
                    p -= 0.05 * 0.2 / norm * s
        twin.train()
        for d in deltas:
            d.sampled = ("outer", 0, 1, t)
        outer = twin(**query).loss + beta * kl()
        losses.append(outer.item())
        slopes = torch.autograd.grad(outer, [*params, *theta.values()])
        for p, a, b in zip(params, slopes, slopes[len(params) :]):
            expected[p] += (a + b) / 2
        with torch.no_grad():
            for p, start in theta.items():
                p.copy_(start)
    prior = 0.0
    for d in deltas:
        mean, ratio = d.B @ d.A, (d.B_v @ d.A_v).exp()
        prior = prior + gamma * (mean.square() / 2 + ratio.log() + 0.2 / ratio).sum()
    for p, s in zip(params, torch.autograd.grad(prior, params)):
        expected[p] += s
    assert loss.item() == pytest.approx(sum(losses) / 2 + prior.item(), rel=1e-5)
    for p, q in zip(adapter.parameters(), params):
        assert torch.allclose(p.grad, expected[q], rtol=1e-4, atol=1e-6)
        assert torch.equal(p, q)  # θ is as it was


def test_no_graph_goes_through_the_inner_steps():
    adapter, hook = attached("inner_steps=3")
    seen = []

    def loss(batch):
        seen.append([(p.is_leaf, p.grad_fn) for p in adapter.parameters()])
        return adapter.model(**batch).loss

    run = runner(adapter)
    run.loss = loss
    hook.micro_step(run, next(iter(episodes(together=1))))
    assert len(seen) == 4 and all(leaf and fn is None for pass_ in seen for leaf, fn in pass_)


def test_adapting_leaves_the_start_alone_and_its_state_does_better():
    adapter, hook = attached("inner_rate=0.5")
    batch, before = columns(12), {k: v.clone() for k, v in adapter.state().items()}
    modes = [m.training for m in adapter.model.modules()]
    phi = hook.adapt(batch, steps=60)
    assert all(torch.equal(v, before[k]) for k, v in adapter.state().items())
    assert modes == [m.training for m in adapter.model.modules()]
    assert all(p.grad is None for p in adapter.parameters())
    labels = batch["labels"]
    start = hook.predict(batch, 0)[range(12), labels].log().mean()
    with adapter.using(phi):
        assert hook.predict(batch, 0)[range(12), labels].log().mean() > start + 0.15
    again = hook.adapt(batch, steps=60)
    assert all(torch.equal(v, again[k]) for k, v in phi.items())


def test_a_large_weight_holds_phi_at_theta():
    batch = columns(12)
    moves = []
    for beta in (0.0, 10.0):  # 1e-3 · 10/v is well under 2
        adapter = veneer.attach(
            net(), f"gaussian-lora(log_variance=0.0)+abmll(beta={beta}, inner_rate=0.02)", rank=2, sites="all"
        )
        (d, *_), hook = adapter.deltas.values(), adapter.hooks[-1]
        start, phi = Gaussian(*(t.detach().clone() for t in d.gaussian())), hook.adapt(batch, steps=300)
        end = Gaussian(*(phi[f"body.{n}"] for n in ("A", "B", "A_v", "B_v")))
        moves.append(divergence(end, start, 0.0)[0].item())
    assert moves[1] < 0.02 * moves[0]


def test_predictions_are_the_mean_over_draws():
    adapter = veneer.attach(net(), "gaussian-lora(log_variance=-1.0)+abmll", rank=2, sites="all")
    hook, batch = adapter.hooks[-1], columns(5)
    adapter.model.eval()
    whole = hook.predict(batch, 8)
    parts = []
    for number in range(8):
        for d in adapter.deltas.values():
            d.sampled = ("predict", number)
        parts.append(adapter.model(batch["x"]).logits.softmax(-1))
        for d in adapter.deltas.values():
            d.sampled = None
    assert torch.allclose(whole, torch.stack(parts).mean(0), atol=1e-6) and not torch.equal(parts[0], parts[1])
    assert torch.allclose(hook.predict(batch, 0), adapter.model(batch["x"]).logits.softmax(-1))


def test_episodes_hold_whole_tasks_each_once_an_epoch_and_are_fixed_by_the_seed():
    data = episodes(seed=3)
    assert len(data) == 2
    batches = list(data)
    tasks = [b["task"].unique().tolist() for b in batches]
    assert sorted(tasks[0] + tasks[1]) == [0, 1, 2, 3]
    x = columns()["x"]
    for b in batches:
        assert b["task"].tolist()[:2] * 8 == b["task"].tolist()  # alternating: each of two processes has its own
        for row, t in zip(b["x"], b["task"].tolist()):
            assert int((x == row).all(1).nonzero()) % 4 == t
        assert len(b["x"].unique(dim=0)) == 16
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(batches, data))
    data.set_epoch(1)
    assert not torch.equal(next(iter(data))["x"], batches[0]["x"])


def test_rows_fall_to_their_tasks_and_halves():
    batch = {"x": torch.arange(8), "task": torch.tensor([7, 2, 7, 2, 7, 7, 7, 2]), "note": "all"}
    first, second = (_tasks(batch)[t] for t in (7, 2))
    assert first["x"].tolist() == [0, 2, 4, 5, 6] and second["x"].tolist() == [1, 3, 7] and first["note"] == "all"
    support, query = _split(first, 0.4)
    assert support["x"].tolist() == [0, 2] and query["x"].tolist() == [4, 5, 6]
    assert _split(first, 0.99)[1]["x"].tolist() == [6] and _split(first, 0.0)[0] is None
    assert len(_tasks({"x": torch.arange(3)})) == 1


def test_a_run_over_tasks_makes_a_start_that_adapts_better():
    held = {k: v[3::4] for k, v in columns(400).items()}

    def after(adapter, hook):
        support, query = ({k: v[s] for k, v in held.items()} for s in (slice(0, 8), slice(8, None)))
        with adapter.using(hook.adapt(support)):
            return hook.predict(query)[range(92), query["labels"]].log().mean().item()

    adapter, hook = attached("inner_rate=0.3")
    before = after(adapter, hook)
    data = Episodes(columns(400), [k % 4 for k in range(400)], 16)
    run = veneer.fit(adapter, data, eval_data=[held], **FIT | {"steps": 60})
    assert run.losses[-1] < run.losses[0] and after(adapter, hook) > before + 0.05
    assert _without_task not in adapter.model._forward_pre_hooks.values()


class Stop(Silent):
    """Ends a run after its third step."""

    def step(self, values):
        if values["step"] == 3:
            raise KeyboardInterrupt


def test_a_broken_run_goes_on_bit_for_bit(tmp_path):
    states = []
    for display in (False, Stop()):
        adapter, _ = attached()
        options = FIT | {"out": tmp_path / str(bool(display)), "save_every": 1, "display": display}
        if display:
            with pytest.raises(KeyboardInterrupt):
                veneer.fit(adapter, episodes(), **options)
            adapter, _ = attached()
        veneer.fit(adapter, episodes(), resume=bool(display), **options | {"display": False})
        states.append(adapter.state())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_the_gradients_carry_the_weight_of_the_micro_batch():
    batch, grads = next(iter(episodes())), []
    for weight in (1.0, 0.25):
        adapter, hook = attached()
        run = runner(adapter)
        run.backward = lambda loss, w=weight: (w * loss).backward()
        hook.micro_step(run, batch)
        grads.append([p.grad for p in adapter.parameters()])
    assert all(torch.allclose(0.25 * a, b, atol=1e-8) for a, b in zip(*grads))


def test_forms_without_a_variance_and_batches_without_names_are_refused():
    with pytest.raises(UserError, match="lora has none of: use gaussian-lora"):
        veneer.attach(net(), "lora+abmll", sites="all")
    with pytest.raises(UserError, match="batches by name"):
        _tasks([torch.zeros(3)])
    with pytest.raises(UserError, match="the task 1 has 3"):
        Episodes(columns(7), [0, 0, 0, 0, 1, 1, 1], 4)


def test_a_language_model_learns_from_tasks_of_tokens():
    case = make("llama")
    adapter = veneer.attach(case.model, "abmll", rank=2, schedule=Schedule(3))
    batch = {k: v.repeat(2, 1) for k, v in case.batch.items()} | {"task": torch.tensor([0, 1, 1, 0])}
    run = veneer.fit(adapter, [batch], steps=3, lr=1e-2, precision="fp32", display=False)
    assert run.losses[-1] < run.losses[0]
