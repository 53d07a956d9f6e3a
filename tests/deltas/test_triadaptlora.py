"""TriAdaptLoRA against the numbers of its sheet (010): triangular borders, growth that changes nothing, the rounds."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import veneer
from veneer.deltas.triadaptlora import how_many
from veneer.parts.restore import attach_from
from veneer.parts.state import clone, load_state

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))

from breaks import goes_on_bit_for_bit, training
from growing import begun, stirred
from small_runs import collated, encoded, llama

FAST = "triadaptlora+triadaptlora-ranks(rank=3, block=1, wait=0, interval=1)"


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def started(recipe=FAST, model=None, **options):
    return begun(mlp() if model is None else model, recipe, **options)


def test_the_blocks_make_the_sheets_oracle_3():
    d = started()[0].deltas["0"]
    d.add_block()
    with torch.no_grad():
        for name, value in (("L0", [[1.0]]), ("L1", [[2.0, 3.0]]), ("U0", [[0.5]]), ("U1", [[4.0], [1.0]])):
            getattr(d, name).copy_(torch.tensor(value))
    assert d.core().tolist() == [[1.5, 4.0], [2.0, 4.0]]
    assert d.core().norm().item() == pytest.approx(6.184658)


def test_blocks_of_several_components_lie_as_the_equation_says():
    adapter = veneer.attach(mlp(), "triadaptlora(start=2, width=3, grown=2)")
    d = adapter.deltas["0"]
    stirred(adapter)
    C, n = torch.zeros(8, 8), 0
    for j in range(3):
        L, U = getattr(d, f"L{j}"), getattr(d, f"U{j}")
        m = n + len(L)
        C[n:m, :m] += L
        C[:m, n:m] += U
        n = m
    assert torch.equal(d.core(), C)


def test_the_number_of_parameters_is_the_sheets_oracle_5():
    d = veneer.attach(mlp(), "triadaptlora(grown=2)").deltas["0"]
    assert d.parameter_count() == sum(p.numel() for p in d.parameters()) == 27 + 12


def test_how_many_grow_is_the_sheets_oracle_4():
    assert how_many(12, 0.5, "linear", 24) == 6 and how_many(12, 0.5, "exponential", 24) == 3
    assert how_many(12, 0.0, "linear", 24) == 1 and how_many(12, 1.0, "linear", 5) == 5


def test_it_starts_at_the_base_with_gradients_in_the_core():
    model, x = mlp(), torch.randn(6, 5)
    base = model(x)
    adapter, _ = started(model=model)
    assert torch.equal(model(x), base)
    model(x).square().sum().backward()
    d = adapter.deltas["0"]
    assert d.L0.grad.any() and torch.equal(d.L0.grad, d.U0.grad)


def test_growth_changes_the_function_by_the_scale_alone():
    for scaling, factor in (("active", (1 + 1e-5) / (2 + 1e-5)), ("fixed", 1.0)):
        model, x = mlp(), torch.randn(6, 5)
        base = model[0](x)
        adapter, _ = started(f"{FAST[:-1]}, scaling='{scaling}')", model)
        stirred(adapter)
        before = model[0](x) - base
        adapter.deltas["0"].add_block()
        torch.testing.assert_close(model[0](x) - base, before * factor, rtol=1e-5, atol=1e-5)


def test_with_a_core_of_one_it_is_lora():
    model, plain, x = mlp(), mlp(), torch.randn(6, 5)
    adapter = veneer.attach(model, "triadaptlora(start=2)", alpha=6.0)
    lora = veneer.attach(plain, "lora", rank=2, alpha=6.0)
    with torch.no_grad():
        for d, twin in zip(adapter.deltas.values(), lora.deltas.values()):
            d.L0.copy_(torch.eye(2))
            d.B0.normal_()
            twin.A.copy_(d.A0)
            twin.B.copy_(d.B0)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_the_site_whose_core_rises_fastest_grows_and_keeps_its_state():
    adapter, hook = started()
    adapter.model(torch.randn(6, 5)).square().sum().backward()
    adapter.optimizer.step()
    d = adapter.deltas["2"]
    moment = adapter.optimizer.state[d.A0]["exp_avg"].clone()
    with torch.no_grad():
        adapter.deltas["0"].L0.fill_(0.5)
        d.L0.fill_(3.0)
    hook.before_optimizer(1)
    assert [d.rank for d in adapter.deltas.values()] == [1, 2]
    assert torch.equal(adapter.optimizer.state[d.A0]["exp_avg"], moment)
    assert set(adapter.optimizer.param_groups[-1]["names"]) == {f"2.{n}1" for n in "ABLU"}
    with torch.no_grad():
        adapter.deltas["0"].L0.fill_(0.9)  # the other has not risen since: 0.4 against what was halved by r
    hook.before_optimizer(2)
    assert [d.rank for d in adapter.deltas.values()] == [2, 2]


def test_ranks_never_fall_and_end_within_the_budget():
    adapter, hook = started(FAST.replace("block=1", "block=3"))
    seen = []
    for step in range(20):
        hook.before_optimizer(step)
        seen.append(sum(d.rank for d in adapter.deltas.values()))
    assert seen == sorted(seen) and seen[0] == 2 and seen[-1] == 5  # 2·3 allows one block of three beside 1 + 1


def test_the_orthogonal_term_is_of_the_whole_factors():
    adapter, _ = started("triadaptlora(grown=1)+orthogonal(weight=1.0)")
    A, B = adapter.deltas["0"].factors()
    assert A.shape == (2, 5) and B.shape == (4, 2)
    with torch.no_grad():
        for d in adapter.deltas.values():
            for p in d.parameters():
                p.zero_()
    assert adapter.hooks[-1].loss(None, None, None).item() == pytest.approx(2**0.5)
    assert "orthogonal" in str(veneer.attach(mlp(), "triadaptlora").recipe)


def test_a_grown_adapter_saves_folds_and_comes_back():
    model, x = mlp(), torch.randn(6, 5)
    adapter, hook = started(model=model)
    early = clone(adapter.state())
    for step in (1, 2, 3):
        hook.before_optimizer(step)
    stirred(adapter)
    expected, late = model(x), clone(adapter.state())
    fresh = mlp()
    again = attach_from(fresh, adapter.description(), late)
    assert torch.equal(fresh(x), expected)
    assert [d.rank for d in again.deltas.values()] == [d.rank for d in adapter.deltas.values()] != [1, 1]
    adapter.fold()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-3)
    adapter.unfold()
    load_state(adapter, early)
    assert [d.rank for d in adapter.deltas.values()] == [1, 1]
    load_state(adapter, late)
    assert torch.equal(model(x), expected)


def test_a_run_broken_off_in_mid_growth_goes_on_bit_for_bit():
    assert goes_on_bit_for_bit(lambda: training(FAST, accumulate=2), before=3, after=3)


def test_other_forms_and_runs_too_short_are_refused():
    with pytest.raises(veneer.UserError, match="not lora"):
        veneer.attach(mlp(), "lora+triadaptlora-ranks")
    with pytest.raises(veneer.UserError, match="left for growth"):
        started(FAST.replace("wait=0", "wait=19"))


def test_fit_grows_to_the_budget_and_peft_runs_the_export(tmp_path):
    from peft import PeftModel

    adapter = veneer.attach(llama(num_hidden_layers=1), "triadaptlora", rank=4)
    rows = encoded(48)
    run = veneer.fit(adapter, rows, steps=20, lr=2e-2, precision="fp32", display=False)
    ranks = [d.rank for d in adapter.deltas.values()]
    assert 4 * 7 - 2 < sum(ranks) <= 4 * 7 and len(set(ranks)) > 1
    assert sum(run.losses[-3:]) < sum(run.losses[:3])
    adapter.export(tmp_path / "p", format="peft")
    batch = collated(rows[:3], 3)[0]
    theirs = PeftModel.from_pretrained(llama(num_hidden_layers=1), tmp_path / "p")
    torch.testing.assert_close(theirs(**batch).logits, adapter.model(**batch).logits, rtol=1e-5, atol=1e-5)
