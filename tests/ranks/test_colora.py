"""CoLoRA against the oracles of its sheet (004)."""

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.errors import UserError
from veneer.models.networks import SPAN, NAFNet
from veneer.parts.attribution import base_weights, contributions, fine_tuned
from veneer.ranks.colora import ranks, squares

SHAPES = [(32, 27), (32, 288), (32, 288), (32, 288), (3, 288)]
SCORES = [6.2e-5, 6e-7, 1e-6, 3.6e-6, 5.5e-5]  # the sheet's pilot: a U


def size(found: list[int], shapes=SHAPES) -> int:
    """Numbers that these ranks train."""
    return sum(r * (d + k) for r, (d, k) in zip(found, shapes))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("budget", [1500, 4000, 9000])
def test_the_budget_is_kept_and_one_more_step_would_break_it(budget, beta):
    found = ranks(SCORES, SHAPES, budget, beta)
    assert size(found) <= budget
    top = max(SCORES)
    shares = [(c / top) ** beta for c in SCORES]
    whole = [d * k / (d + k) for d, k in SHAPES]
    # the α at which each layer's rank would grow next: δ·dk/(d + k) reaches r + ½, while δ is below 1
    alpha = min((r + 0.5) / (s * w) for r, s, w in zip(found, shares, whole) if r + 0.5 < w) * (1 + 1e-9)
    grown = [min(max(round(min(1, alpha * s) * w), 1), d, k) for s, w, (d, k) in zip(shares, whole, SHAPES)]
    assert grown != found and size(grown) > budget


def test_a_large_beta_saturates_the_ends_and_hands_the_rest_on():
    found = ranks(SCORES, SHAPES, 9000, 3.0)
    assert found[0] == round(32 * 27 / 59) and found[4] == 3
    assert size(found) > 0.9 * 9000


def test_only_ratios_matter_and_beta_zero_forgets_them():
    assert ranks([7.3 * c for c in SCORES], SHAPES, 4000, 0.5) == ranks(SCORES, SHAPES, 4000, 0.5)
    shares = [r * (d + k) / (d * k) for r, (d, k) in zip(ranks(SCORES, SHAPES, 9000, 0.0), SHAPES)]
    assert max(shares) < 1.6 * min(shares)  # equal but for rounding: 3 × 288 has two ranks only


def test_permuting_layers_permutes_ranks():
    order = [3, 0, 4, 1, 2]
    found = ranks(SCORES, SHAPES, 4000, 0.5)
    assert ranks([SCORES[i] for i in order], [SHAPES[i] for i in order], 4000, 0.5) == [found[i] for i in order]


def test_every_layer_that_contributes_has_a_rank_and_others_none():
    scores = [1.0, 1e-12, 0.0, 1.0, 1.0]
    found = ranks(scores, SHAPES, 6000, 1.0)
    assert found[1] == 1 and found[2] == 0


def test_a_budget_below_rank_one_drops_the_least_contributing_layers():
    found = ranks(SCORES, SHAPES, 700, 0.5)
    assert found[1] == found[2] == 0 and min(found[0], found[4]) >= 1
    assert 0 < size(found) <= 700


def test_without_contributions_all_have_one_rank():
    assert ranks([0.0] * 5, SHAPES, 4 * sum(map(sum, SHAPES)), 0.5) == [4, 4, 4, 4, 3]


def network() -> NAFNet:
    """A small network that restores images, the same each time."""
    torch.manual_seed(0)
    made = NAFNet(4, (1,), 1, (1,))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return made


def images(count: int = 2) -> list[dict[str, Tensor]]:
    """Batches of dark images and their clean ones."""
    g = torch.Generator().manual_seed(1)
    clean = [torch.rand(2, 3, 8, 8, generator=g) for _ in range(count)]
    return [{"pixel_values": c * 0.5, "labels": c} for c in clean]


FAST = "points=4, steps=3, lr=0.01"


def attached(recipe: str, model: nn.Module | None = None, **options):
    """CoLoRA on the convolutions of the network."""
    return veneer.attach(model or network(), recipe, calibration=images(), **({"sites": "conv"} | options))


def test_the_model_is_left_as_it_was_and_starts_there():
    model, untouched = network().train(), network()
    adapter = attached(f"colora({FAST})", model)
    assert all(m.training for m in model.modules())
    x = images()[0]["pixel_values"]
    assert torch.equal(model(x).image, untouched(x).image)
    adapter.detach()
    for (n, p), (_, q) in zip(model.named_parameters(), untouched.named_parameters()):
        assert torch.equal(p, q) and p.requires_grad and p.grad is None, n


def test_scores_are_the_means_of_the_contributions_of_each_weight():
    model = network()
    old = base_weights(model)
    new = fine_tuned(model, images(), 3, 0.01, squares)
    found = contributions(model, old, new, images(), 4, squares)
    (hook,) = attached(f"colora({FAST}, error='squares')", model).hooks
    assert hook.contributions == {n: pytest.approx(float(f.mean()), rel=1e-5) for n, f in found.items()}


def test_the_ranks_follow_and_take_what_the_forms_rank_would():
    adapter = attached(f"lora+colora({FAST})", rank=2, alpha=6.0)
    uniform = veneer.attach(network(), "lora", rank=2, sites="conv")
    given = {path: d.rank for path, d in adapter.deltas.items()}
    assert len(set(given.values())) > 1
    factors = sum(d.parameter_count() for d in adapter.deltas.values())
    assert 0.85 * uniform.parameter_count() < factors <= uniform.parameter_count()
    assert all(d.scale == pytest.approx(3.0) for d in adapter.deltas.values())


def test_a_share_as_budget_counts_the_weights():
    model = network()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    adapter = attached(f"colora(budget=0.3, {FAST})", model)
    assert 0.2 * weights < sum(d.parameter_count() for d in adapter.deltas.values()) <= 0.3 * weights


def test_biases_and_norms_train_whole_or_not_at_all():
    adapter = attached(f"colora({FAST})")
    names = {n for n, _ in network().named_parameters() if n.endswith("bias") or "norm" in n}
    assert set(adapter.trained) == names
    assert not attached(f"colora({FAST}, biases=False)").trained


def test_a_layer_that_the_loss_does_not_see_loses_its_adapter():
    model = network()
    del model.middle[0].beta
    model.middle[0].register_buffer("beta", torch.zeros(8, 1, 1))  # what this branch computes is multiplied by 0
    adapter = attached(f"colora({FAST})", model)
    assert "middle.0.project" not in adapter.deltas and "middle.0.narrow" in adapter.deltas


@pytest.mark.parametrize("select", ["conv", ["wide", "narrow"]])
def test_the_cheap_target_is_lora(select):
    model = network()
    (hook,) = attached(f"colora({FAST}, target='lora')", model, sites=select).hooks
    moved = {n for n, c in hook.contributions.items() if c > 0}
    adapted = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    adapted = {n for n in adapted if select == "conv" or n.endswith(("wide", "narrow"))}
    assert moved == {f"{n}.weight" for n in adapted}
    assert set(veneer.core.adapter.adapters(model)) == {"default"}


def test_it_saves_and_comes_back_without_calibration(tmp_path):
    adapter = attached(f"colora({FAST})")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    x = images()[0]["pixel_values"]
    expected = adapter.model(x).image
    adapter.save(tmp_path / "a")
    fresh = network()
    veneer.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(x).image, expected)


def test_a_run_learns():
    adapter = attached(f"colora({FAST})", rank=2)
    run = veneer.fit(adapter, images(), task="regression", steps=30, lr=1e-2, precision="fp32", display=False)
    assert run.losses[-1] < 0.7 * run.losses[0]


def test_what_it_cannot_do_is_refused():
    with pytest.raises(UserError, match="calibration"):
        veneer.attach(network(), "colora", sites="conv")
    with pytest.raises(UserError, match="compares images"):
        model = nn.Sequential(nn.Linear(3, 3))
        veneer.attach(model, "colora(error='squares')", calibration=[torch.ones(1, 3)])


def test_peft_reads_ranks_scales_and_biases(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base, model = SPAN(4, 2, 2), SPAN(4, 2, 2)
    model.load_state_dict(base.state_dict())
    small = [{"pixel_values": b["pixel_values"][..., ::2, ::2], "labels": b["labels"]} for b in images()]
    adapter = veneer.attach(model, f"lora+colora({FAST})", rank=2, alpha=3.0, sites="conv", calibration=small)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    adapter.export(tmp_path / "p", format="peft")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "p")
    x = small[0]["pixel_values"]
    assert len({d.rank for d in adapter.deltas.values()}) > 1 and len(adapter.trained) == 10
    assert torch.allclose(theirs(x).image, model(x).image, atol=1e-5)
