"""The norm report: what the recorded attention is, the sheet's bounds and closed forms, what an adapter moves."""

import math

import pytest
import torch
from models import make

import veneer
from veneer.analysis.score_norms import norm_report, side, sweep, taylor_degree, taylor_features
from veneer.errors import UserError


def run(case, adapter=None, **options):
    return norm_report(case.model, case.batch["input_ids"], adapter, case.batch["attention_mask"], **options)


def test_entropies_are_those_of_the_models_own_attention():
    case = make("llama")
    report = run(case)
    case.model.set_attn_implementation("eager")
    batch = {k: v for k, v in case.batch.items() if k != "labels"}
    with torch.no_grad():
        maps = case.model(**batch, output_attentions=True).attentions
    for row, P in zip(report["layers"], maps):
        seen = [torch.special.xlogy(p[:, m], p[:, m]).sum(-1).mean() for p, m in zip(P, batch["attention_mask"].bool())]
        assert row["entropy"] == pytest.approx(-float(sum(seen)) / len(seen), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_the_model_runs_as_before_and_is_left_as_it_was(kind):
    case = make(kind)
    before, name = case.run(), case.model.config._attn_implementation
    report = run(case)
    assert case.model.config._attn_implementation == name and torch.equal(case.run(), before)
    assert len(report["layers"]) == (6 if kind == "t5" else 2)
    for row in report["layers"]:
        if kind != "t5":  # whose position bias is a part of S
            assert row["M"] <= row["width"] * row["gamma_q"] * row["gamma_k"] * (1 + 1e-5)
        assert row["D"] <= 2 * row["M"] + 1e-5 and row["M_rest"] <= row["M"]


def test_scores_grow_with_the_queries_weight_and_the_side_with_them():
    case, found = make("llama"), []
    for factor in (1.0, 20.0, 10.0):
        with torch.no_grad():
            case.model.model.layers[0].self_attn.q_proj.weight.mul_(factor)
        found.append(run(case)["layers"][0])
    assert [f["M"] / found[0]["M"] for f in found] == pytest.approx([1, 20, 200], rel=1e-4)
    assert [f["side"] for f in found] == ["below", "transition", "above"]
    assert found[2]["crossing"] * found[2]["M"] == pytest.approx(2 * math.log(7))
    assert [side(r) for r in (0.5, 0.51, 2.0, 2.01)] == ["below", "transition", "transition", "above"]


def test_padding_is_not_seen():
    case = make("llama")
    ids = case.batch["input_ids"][1:]
    padded = norm_report(case.model, ids, mask=case.batch["attention_mask"][1:])
    short = norm_report(case.model, ids[:, :5])
    assert padded["tokens"] == 5
    for one, other in zip(padded["layers"], short["layers"]):
        for name in ("M", "D", "D_median", "gamma_q", "gamma_k", "gamma_v", "entropy", "rank_99"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name


def test_an_adapter_at_its_start_moves_nothing_and_a_large_one_is_seen_where_it_is():
    case = make("llama")
    adapter = veneer.attach(case.model, "lora", rank=2, sites="q_proj")
    for row in run(case, adapter)["layers"]:
        assert row["change"] == row["delta_q"] == row["delta_k"] == row["delta_v"] == 0
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if "layers.1" in name:
                p.fill_(0.5)
    first, second = run(case, adapter)["layers"]
    assert first["change"] == 0 == first["delta_q"] and first["base_q"] == first["gamma_q"]
    with adapter.disabled():
        assert run(case)["layers"][1]["gamma_q"] == second["base_q"] != second["gamma_q"]
    assert second["change"] > 0 and second["delta_q"] > 0 and second["delta_k"] == 0
    inputs = []
    handle = case.model.model.layers[1].input_layernorm.register_forward_hook(lambda m, a, y: inputs.append(y))
    with adapter.disabled():
        case.run()
    handle.remove()
    rows = inputs[0].flatten(0, 1)[case.batch["attention_mask"].flatten().bool()]
    moved = (adapter.deltas["model.layers.1.self_attn.q_proj"].weight() @ rows.T).detach()
    assert second["delta_q"] == pytest.approx(float(moved.abs().max()) * 8**-0.25, rel=1e-4)


def test_what_an_adapter_adds_to_padding_does_not_count():
    case = make("llama")
    adapter = veneer.attach(case.model, "lora", rank=2, sites="attention")
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(0.5)
    ids, mask = case.batch["input_ids"][1:], case.batch["attention_mask"][1:]
    padded, short = norm_report(case.model, ids, adapter, mask), norm_report(case.model, ids[:, :5], adapter)
    for one, other in zip(padded["layers"], short["layers"]):
        assert [one[f"delta_{r}"] for r in "qkv"] == pytest.approx([other[f"delta_{r}"] for r in "qkv"], rel=1e-5)


def test_one_key_that_all_rows_look_at_has_rank_one_and_no_entropy():
    case = make("llama")
    with torch.no_grad():
        for p in (case.model.model.layers[0].self_attn.q_proj, case.model.model.layers[0].self_attn.k_proj):
            p.weight.zero_()
    row = norm_report(case.model, case.batch["input_ids"])["layers"][0]
    assert row["M"] == row["D"] == 0 and row["side"] == "below"
    expected = sum(math.log(k) for k in range(1, 8)) / 7  # even over the k tokens so far
    assert row["entropy"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bound, accuracy, degree", [(1.0, 0.1, 4), (2.0, 0.1, 8), (4.0, 0.1, 17), (0.0, 0.1, 0)])
def test_taylor_degrees_of_the_sheet(bound, accuracy, degree):
    assert taylor_degree(bound, accuracy) == degree


@pytest.mark.parametrize("degree, width, count", [(4, 8, 495), (4, 16, 4845), (8, 8, 12870), (8, 16, 735471)])
def test_feature_counts_of_the_sheet(degree, width, count):
    assert taylor_features(degree, width) == count


def test_longer_texts_have_larger_thresholds_and_no_smaller_scores():
    case = make("llama")
    short, long = sweep(case.model, case.batch["input_ids"], [4, 7])
    assert (short["threshold"], long["threshold"]) == pytest.approx((math.log(4), math.log(7)))
    assert long["M"] >= short["M"] and sum(long[name] for name in ("below", "transition", "above")) == 2


def test_a_model_whose_attention_cannot_be_seen_is_refused():
    with pytest.raises(UserError, match="attention interface"):
        norm_report(Bare(), torch.zeros(1, 4, dtype=torch.long))


class Bare(torch.nn.Module):
    """Runs no attention at all."""

    def forward(self, input_ids, attention_mask, use_cache):
        return input_ids
