"""GLAD's rules against the numbered oracles of its sheet (083), its two passes against SAM."""

import pytest
import torch
from breaks import goes_on_bit_for_bit, training
from torch import nn

import veneer
from veneer.objectives import glad
from veneer.objectives.glad import ascent, harmonic_mean, steered


def vector(*values):
    return [torch.tensor([v]) for v in values]


def pairs(count=20):
    """Random gradients and references of two tensors."""
    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield tuple([torch.randn(3, 2, generator=g), torch.randn(4, generator=g)] for _ in range(2))


def dot(a, b):
    return float(sum((x * y).sum() for x, y in zip(a, b)))


def test_projection_is_oracle_3():
    g, s = vector(1.0, 0.0), vector(-1.0, 1.0)
    found = steered(g, s, "project", 0.5)
    assert [x.item() for x in found] == [0.5, 0.5] and dot(found, s) == 0


def test_projection_never_turns_against_the_gradient_and_leaves_agreement_alone_oracle_4():
    conflicts = 0
    for g, s in pairs():
        found = steered(g, s, "project", 0.5)
        if dot(g, s) < 0:
            conflicts += 1
            assert dot(found, s) == pytest.approx(0, abs=1e-5) and dot(found, g) >= 0
        else:
            assert found is g
    assert 0 < conflicts < 20


def test_ascent_and_blend_on_a_quadratic_are_oracles_5_and_6():
    H, theta = torch.tensor([4.0, 1.0]), torch.ones(2)
    g = H * theta
    (e,) = ascent([theta], [g], 0.05)
    assert torch.allclose(e, torch.tensor([0.0485, 0.0121]), atol=5e-5)
    s = H * (theta + e)
    assert torch.allclose(s, torch.tensor([4.1940, 1.0121]), atol=5e-5)
    (found,) = steered([g], [s], "blend", 0.3)
    assert torch.allclose(found, g + 0.3 * 0.05 * H * g / g.norm())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_alignment_keeps_the_length_oracle_7(share):
    for g, s in pairs(3):
        found = steered(g, s, "align", share)
        assert dot(found, found) == pytest.approx(dot(g, g), rel=1e-5)
        cosine = dot(found, s) / (dot(found, found) * dot(s, s)) ** 0.5
        assert (cosine > 0.9999) == (share == 1.0)


def test_the_harmonic_mean_is_oracle_10():
    assert harmonic_mean(0.84, 0.72) == pytest.approx(0.775385, abs=1e-6) and harmonic_mean(0.0, 0.0) == 0


@pytest.mark.parametrize("recipe", ["glad(rho=0.0)", "glad(share=0.0)", "glad(share=0.0, mode='align')"])
def test_nothing_to_steer_is_lora_bit_for_bit_oracles_1_2(recipe):
    runs = [training(r, rank=2, dropout=0.1) for r in (recipe, "lora")]
    assert [runs[0].take_step() for _ in range(3)] == [runs[1].take_step() for _ in range(3)]


class Net(nn.Module):
    """Two layers with a loss, as the loop calls it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x, labels):
        return type("Out", (), {"loss": (self.two(torch.tanh(self.one(x))) - labels).square().mean()})


@pytest.mark.parametrize("adaptive", [False, True])
def test_all_of_the_reference_is_sams_step_as_pytorch_optimizer_takes_it(adaptive):
    SAM = pytest.importorskip("pytorch_optimizer").SAM
    g = torch.Generator().manual_seed(1)
    batches = 4 * [{"x": torch.randn(4, 5, generator=g), "labels": torch.randn(4, 2, generator=g)}]
    other = Net()
    sam = SAM(other.parameters(), torch.optim.AdamW, rho=0.2, adaptive=adaptive, lr=1e-2, weight_decay=0.0)
    for batch in batches:

        def closure(batch=batch):
            sam.zero_grad()
            loss = other(**batch).loss
            loss.backward()
            return loss

        closure()
        sam.step(closure)
    own = Net()
    given = f"full+glad(share=1.0, rho=0.2, ascent='{'adaptive' if adaptive else 'plain'}')"
    adapter = veneer.attach(own, given, sites="all", train=["one.bias", "two.bias"])
    plain = {"schedule": "constant", "warmup": 0, "clip": 0.0, "precision": "fp32", "display": False}
    veneer.fit(adapter, batches, task="regression", steps=4, lr=1e-2, weight_decay=0.0, **plain)
    adapter.bake()
    moved = 0.0
    for (n, p), q in zip(own.named_parameters(), other.parameters()):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), n
        moved += float((p - Net().get_parameter(n)).abs().sum())
    assert moved > 0.1


def test_the_weights_come_back_bit_for_bit_and_the_optimiser_does_not_feel_the_ascent_oracle_8():
    run = training("glad(rho=0.3)", rank=2, lr=0.0)
    with torch.no_grad():
        for p in run.adapter.parameters():
            p.normal_(std=0.1)
    before = run.adapter.vector()
    run.take_step(), run.take_step()
    assert torch.equal(run.adapter.vector(), before)
    assert all(state["step"] == 2 for state in run.adapter.optimizer.state.values())


def seen(monkeypatch):
    """What `steered` is given and gives, step by step."""
    found, own = [], glad.steered

    def spy(g, reference, *args):
        found.append(([x.clone() for x in g], [x.clone() for x in reference]))
        return own(g, reference, *args)

    monkeypatch.setattr(glad, "steered", spy)
    return found


def test_at_the_start_only_b_is_perturbed_and_the_reference_moves_a_oracle_9(monkeypatch):
    found, run = seen(monkeypatch), training("glad", rank=2)
    names = [n for n, _ in run.adapter.named_parameters()]
    run.take_step()
    for n, g, s in zip(names, *found[0]):
        assert s.abs().sum() > 0 and (g.abs().sum() == 0) == n.endswith(".A"), n


def test_both_passes_see_the_same_dropout(monkeypatch):
    found = seen(monkeypatch)
    run = training("glad(rho=1e-6)", rank=2, accumulate=2, dropout=0.5)
    inner = run.adapter.model.model.layers[0].mlp
    inner.act_fn = nn.Sequential(inner.act_fn, nn.Dropout(0.5))  # the model's own, from torch's generator
    run.take_step(), run.take_step()
    for g, s in found:
        assert dot(g, s) / (dot(g, g) * dot(s, s)) ** 0.5 > 0.99999


def test_the_second_pass_leaves_chance_where_the_first_did():
    plain, steered_run = (training(r, rank=2, dropout=0.1, accumulate=2) for r in ("lora", "glad"))
    for run in (plain, steered_run):
        torch.manual_seed(5)
        run.adapter.model.model.layers[0].mlp.act_fn = nn.Dropout(0.5).train()
        run.take_step()
        run.random = torch.get_rng_state()
    assert torch.equal(plain.random, steered_run.random)
    assert plain.adapter.root.draws == steered_run.adapter.root.draws


def test_accumulated_micro_batches_are_one_batch():
    runs = [training("glad(rho=0.1)", rank=2, **sizes) for sizes in ({"accumulate": 2, "size": 4}, {"size": 8})]
    for _ in range(3):
        for run in runs:
            run.take_step()
    assert torch.allclose(runs[0].adapter.vector(), runs[1].adapter.vector(), rtol=1e-3, atol=1e-5)


def test_every_other_step_costs_one_pass():
    run, passes = training("glad(every=2)", rank=2), []
    run.adapter.model.register_forward_hook(lambda *_: passes.append(1))
    counts = []
    for _ in range(4):
        run.take_step()
        counts.append(len(passes))
        passes.clear()
    assert counts == [2, 1, 2, 1]


def test_a_gradient_that_is_used_up_within_backward_is_refused():
    with pytest.raises(veneer.UserError, match="used them up"):
        training("full+galore(per_layer=True)+glad", clip=None).take_step()


def test_a_broken_run_goes_on_bit_for_bit():
    assert goes_on_bit_for_bit(lambda: training("glad(every=2)", accumulate=2, rank=2, dropout=0.1))


def test_other_objectives_count_in_both_passes(monkeypatch):
    found, run = seen(monkeypatch), training("lora+pego(weight=0.1)+glad(rho=1e-6)", rank=4)
    with torch.no_grad():
        for p in run.adapter.parameters():
            p.normal_(std=0.1)
    run.take_step()
    (g, s) = found[0]
    assert (dot(g, g) / dot(s, s)) == pytest.approx(1, abs=1e-3)
