"""Intruders by the sheet's closed forms and against PEFT; what a look at an adapter must find."""

import pytest
import torch
from models import make

import veneer
from veneer.analysis.inspection import compared, inspect, spectra
from veneer.analysis.intruders import effective_rank, intruders, mitigated, overlap, shrunk
from veneer.core.site import find_sites
from veneer.errors import UserError
from veneer.numerics.factored import recompress


@pytest.mark.parametrize(
    "a, S, c",
    [
        (2, (4.0665, 1.5581, 0.8181), (0.9579, 0.7909, 0.7511)),
        (5, (6.3668, 1.5439, 0.4027), (0.8514, 0.8350, 0.8233)),
        (20, (20.6785, 1.6510, 0.0634), (0.6678, 0.8290, 0.8239)),
    ],
)
def test_values_and_similarities_of_the_sheet(a, S, c):
    u, v = torch.ones(3) / 3**0.5, torch.tensor([1.0, -1.0, 0.0]) / 2**0.5
    found = intruders(
        torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([3.0, 2.0, 1.0])) + a * u[:, None] * v
    )
    torch.testing.assert_close(found.S, torch.tensor(S), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.similarity, torch.tensor(c), atol=1e-4, rtol=0)
    assert found.count == 0


def test_one_planted_direction_is_one_intruder_and_shrinking_scales_it():
    W0, u = torch.diag(torch.arange(5.0, 0.0, -1.0)), torch.ones(5) / 5**0.5
    A, B = u[None], u[:, None]
    found = intruders(W0, W0 + 100 * B @ A)
    assert found.count == 1 and float(found.S[0]) == pytest.approx(103.020, abs=1e-3)
    assert float(found.similarity[0]) == pytest.approx(0.4562, abs=1e-4)
    for factor in (1.0, 0.75, 0.0):
        A2, B2 = shrunk(A, B, 100.0, found, factor)
        left = torch.linalg.svdvals(W0 + B2 @ A2)
        kept = torch.cat([found.S[1:], found.S[:1] * factor]).sort(descending=True).values
        torch.testing.assert_close(left, kept, atol=2e-3, rtol=1e-4)


def test_shrinking_to_the_rank_gives_pefts_product():
    peft_intruders = pytest.importorskip("peft.tuners.lora.intruders")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 48, bias=False))
    W0 = model[0].weight.detach().clone()
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    layer = wrapped.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_().mul_(3)
        layer.lora_A["default"].weight.normal_()
    A, B = layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()
    peft_intruders.reduce_intruder_dimension(wrapped, logging_sink=None)
    theirs = 2.0 * layer.lora_B["intruder_reduced"].weight @ layer.lora_A["intruder_reduced"].weight
    found = intruders(W0, W0 + 2.0 * B @ A)
    assert found.count > 0
    A2, B2 = recompress(*shrunk(A, B, 2.0, found), 3)[:2]
    torch.testing.assert_close(B2 @ A2, theirs.detach(), atol=1e-3, rtol=1e-3)


def test_an_adapter_at_its_start_changed_nothing_and_one_far_away_spikes():
    model = make("llama").model
    adapter = veneer.attach(model, "lora", rank=2)
    report = inspect(adapter)
    assert report["totals"]["intruders"] == 0 and "changed nothing" in report["warnings"][0]
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            p.normal_(generator=torch.Generator().manual_seed(len(name))).mul_(5)
    report = inspect(adapter)
    assert any("larger than the weight" in w for w in report["warnings"])
    assert sum(b["sites"] for b in report["blocks"]) == len(adapter.sites)
    assert 0 < report["sites"][0]["effective_rank"] <= 2.001


def test_two_adapters_that_are_one_overlap_wholly():
    model = make("llama").model
    first, second = (veneer.attach(model, "lora", rank=2, name=n) for n in "ab")
    for adapter in (first, second):
        with torch.no_grad():
            for name, p in adapter.named_parameters():
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    found = compared(first, second, rank=2)
    assert all(f["cosine"] == pytest.approx(1, abs=1e-4) and f["overlap"] == pytest.approx(1, abs=1e-3) for f in found)
    assert overlap(torch.diag(torch.tensor([1.0, 0])), torch.diag(torch.tensor([0, 1.0])), 1) == pytest.approx(
        0, abs=1e-6
    )


def test_effective_rank_counts_equal_values():
    assert effective_rank(torch.ones(5)) == pytest.approx(5, rel=1e-6) and effective_rank(torch.zeros(3)) == 0


def test_a_form_without_a_matrix_is_refused():
    adapter = veneer.attach(make("llama").model, "bitfit")
    with pytest.raises(UserError, match="no weight matrix"):
        inspect(adapter)


def spoilt(recipe="lora", factor=5.0, **given):
    """An attached tiny model whose adapter is far from its start."""
    model = make("llama").model
    adapter = veneer.attach(model, recipe, rank=2, **given)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            p.normal_(generator=torch.Generator().manual_seed(len(name))).mul_(factor)
    return model, adapter


def test_gram_matrices_give_the_decomposition_of_the_weight():
    torch.manual_seed(0)
    for shape in ((12, 30), (30, 12)):
        W0, W = torch.randn(shape), torch.randn(shape)
        U0 = torch.linalg.svd(W0, full_matrices=False)[0]
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        found = intruders(W0, W, 5)
        torch.testing.assert_close(found.S, S[:5], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.similarity, (U[:, :5].T @ U0).abs().amax(1), atol=1e-4, rtol=0)
        torch.testing.assert_close((found.U * found.S) @ found.V.T, (U[:, :5] * S[:5]) @ Vh[:5], atol=1e-4, rtol=0)
        low = torch.randn(shape[0], 3) @ torch.randn(3, shape[1])  # no digits left in a Gram matrix: the plain way
        assert intruders(low, low, 3).count == 0


def test_a_fold_into_bf16_loses_what_the_report_says():
    model, adapter = spoilt(factor=1e-2)
    row = inspect(adapter)["sites"][0]
    site = next(s for s in adapter.sites if s.path == row["path"])
    W, change = site.weight().clone(), adapter.deltas[row["path"]].weight()
    half = model.bfloat16()
    before = site.weight().float().clone()
    with torch.no_grad():
        site.write(W + change)
    moved = site.weight().float() - before
    assert half is model and row["fold_error"] == pytest.approx(
        float((moved - change).norm() / change.norm()), rel=1e-3
    )
    assert row["unmoved"] == pytest.approx(float((moved == 0).float().mean()))


def test_a_pair_has_as_many_singular_values_as_its_rank():
    _, adapter = spoilt(factor=0.05)
    for row in inspect(adapter)["sites"]:
        S = torch.linalg.svdvals(adapter.deltas[row["path"]].weight())
        assert sum(s > 0 for s in row["spectrum"]) == 2
        assert row["spectrum"][:2] == pytest.approx(S[:2].tolist(), rel=1e-3)


def test_spectra_of_the_weights_are_those_of_svd():
    model = make("llama").model
    sites = find_sites(model, "linear")
    found = {(row["block"], row["role"]): row for row in spectra(sites)}
    for site in sites:
        row, S = found[site.block, site.role], torch.linalg.svdvals(site.weight())
        assert row["top"] == pytest.approx(float(S[0]), rel=1e-5)
        assert row["stable_rank"] == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-4)
        assert row["effective_rank"] == pytest.approx(effective_rank(S), rel=1e-4)


def test_zero_factors_and_wild_scales_are_named():
    adapter = veneer.attach(make("llama").model, "lora", rank=2, alpha=1000)
    found = " ".join(inspect(adapter)["warnings"])
    assert "14 trained tensors are all zero" in found and ".B" in found
    assert "14 scales are larger than 64" in found and "500" in found


def test_shrunk_adapters_load_as_plain_lora_and_hold_the_formula(tmp_path):
    _, adapter = spoilt()
    factors, facts = mitigated(adapter, 0.25)
    assert facts["intruders"] == inspect(adapter)["totals"]["intruders"] > 0
    change, after = 0.0, 0.0
    for f in factors:
        W0, old = f.site.weight(), adapter.deltas[f.path].weight()
        found = intruders(W0, W0 + old)
        removed = (found.U * found.S)[:, found.flags] @ found.V[:, found.flags].T
        new = f.scale * (f.B @ f.A)
        torch.testing.assert_close(new, old - 0.75 * removed, atol=2e-4, rtol=1e-4)
        change, after = change + float(old.square().sum()), after + float(new.square().sum())
    assert facts["uniform"] == pytest.approx((after / change) ** 0.5, rel=1e-4)
    with pytest.raises(UserError, match="at least 0"):
        mitigated(adapter, -0.5)
    with pytest.raises(UserError, match="not plain LoRA"):
        mitigated(spoilt("dora")[1], 0.5)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_planted_direction_intrudes_once_it_is_as_large_as_the_weight_and_noise_never():
    W0, u, v = gaussian(64, 64), gaussian(64, 1, seed=11), gaussian(1, 64, seed=21)
    top, plant = torch.linalg.matrix_norm(W0, 2), (u / u.norm()) @ (v / v.norm())
    assert [intruders(W0, W0 + f * top * plant).count for f in (0.25, 0.5, 1, 1.5, 2, 4)] == [0, 0, 1, 1, 1, 1]
    noise = gaussian(64, 64, seed=31)
    for size in (0.01, 0.1):
        assert intruders(W0, W0 + size * noise * W0.norm() / noise.norm()).count == 0


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_turning_all_directions_changes_no_similarity_and_the_count_grows_with_k_and_epsilon(side):
    W0, change = gaussian(20, 16), 3 * gaussian(20, 2, seed=1) @ gaussian(2, 16, seed=2)
    P, Q = (torch.linalg.qr(gaussian(n, n, seed=n))[0] for n in (20, 16))
    found, turned = intruders(W0, W0 + change, side=side), intruders(P @ W0 @ Q, P @ (W0 + change) @ Q, side=side)
    torch.testing.assert_close(found.similarity, turned.similarity, atol=1e-4, rtol=0)
    by_k = [intruders(W0, W0 + change, k, side=side).count for k in (1, 4, 10)]
    by_epsilon = [intruders(W0, W0 + change, 10, e, side).count for e in (0.1, 0.5, 0.9, 999)]
    assert by_k == sorted(by_k) and by_epsilon == sorted(by_epsilon) and by_epsilon[-1] == 10


def test_sides_ask_for_the_vectors_they_name():
    W0 = torch.diag(torch.arange(8.0, 0.0, -1.0))
    u = torch.ones(8) / 8**0.5
    change = 100 * u[:, None] * torch.eye(8)[3]  # left of it is spread evenly, right of it one of the base's own
    counts = {side: intruders(W0, W0 + change, k=1, side=side).count for side in ("left", "right", "both")}
    assert counts == {"left": 1, "right": 0, "both": 1}


def test_large_matrices_are_looked_at_by_their_leading_part_alone(monkeypatch):
    from veneer.analysis import intruders as module

    W0 = gaussian(96, 80) * torch.arange(1, 81).float().rsqrt()
    W = W0 + 4 * gaussian(96, 3, seed=1) @ gaussian(3, 80, seed=2)
    whole = intruders(W0, W)
    monkeypatch.setattr(module, "WHOLE", 16)
    leading = intruders(W0, W)
    torch.testing.assert_close(leading.S, whole.S, rtol=1e-3, atol=0)
    clear = (whole.similarity - 0.5).abs() > 0.02
    assert torch.equal(leading.flags[clear], whole.flags[clear]) and whole.count > 0


def test_a_direction_within_equal_values_of_the_base_is_seen_to_lie_among_them():
    W0 = torch.diag(torch.tensor([3.0] * 8 + [1.0] * 8))
    turned = torch.zeros(16, 16)
    turned[:8, :8] = torch.linalg.qr(gaussian(8, 8))[0]  # another basis of the same space
    u = turned[:, 0]
    found = intruders(W0, W0 + 2 * u[:, None] * u, k=1, epsilon=0.9)
    assert found.count == 1 and float(found.together[0]) == pytest.approx(1, abs=1e-4)
    apart = intruders(torch.diag(torch.arange(16.0, 0, -1)), W0 + 2 * u[:, None] * u, k=1, epsilon=0.9)
    assert float(apart.together[0]) == pytest.approx(float(apart.similarity[0]), abs=1e-6)


def test_a_rank_cuts_off_what_the_truncated_svd_loses():
    _, adapter = spoilt()
    (exact, facts), (cut, cut_facts) = mitigated(adapter, 0.5), mitigated(adapter, 0.5, rank=2)
    assert facts["lost"] == 0 and facts["rank"] > 2 and cut_facts["rank"] == 2
    lost = total = 0.0
    for one, other in zip(exact, cut):
        S = torch.linalg.svdvals(one.scale * (one.B @ one.A))
        error = (one.scale * (one.B @ one.A) - other.scale * (other.B @ other.A)).norm()
        assert float(error) == pytest.approx(float(S[2:].square().sum().sqrt()), rel=1e-3, abs=1e-3)
        lost, total = lost + float(error**2), total + float(S.square().sum())
    assert cut_facts["lost"] == pytest.approx(lost / total, rel=1e-3, abs=1e-7)


def test_trying_factors_scores_the_formula_and_leaves_everything_as_it_was():
    from veneer.analysis.mitigation import tried

    model, adapter = spoilt()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    site = adapter.sites[0]
    W0, change = site.weight().clone(), adapter.deltas[site.path].weight().detach()

    def score():
        return {"moved": float((site.weight() - W0).norm())}

    found = tried(adapter, score, factors=(1.0, 0.5, 1.5))
    assert found[0]["scores"]["moved"] == pytest.approx(float(change.norm()), rel=1e-4)
    flagged = intruders(W0, W0 + change)
    for factor, row in zip((1.0, 0.5, 1.5), found):
        removed = (flagged.U * flagged.S)[:, flagged.flags] @ flagged.V[:, flagged.flags].T
        expected = (change + (factor - 1) * removed).norm()
        assert row["scores"]["moved"] == pytest.approx(float(expected), rel=1e-4)
        assert row["control"]["moved"] == pytest.approx(row["uniform"] * float(change.norm()), rel=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="weights alone"):
        tried(spoilt("lora-bias")[1], score)
