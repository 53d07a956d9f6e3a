"""AdaLoRA against PEFT's, step by step, and against the numbers of its sheet (061b)."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.errors import UserError
from veneer.numerics.orthogonality import orthogonality
from veneer.parts.restore import attach_from
from veneer.ranks.adalora import budget

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))

from breaks import goes_on_bit_for_bit, training
from small_runs import collated, encoded, llama

SHORT = "adalora(rank=2, initial=3, wait=1, settle=3)"


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))


def started(recipe, steps=10, **options):
    """An adapter with its optimiser, as training begins; and the hook of the ranks."""
    adapter = veneer.attach(mlp(), recipe, **options)
    adapter.optimizer = torch.optim.AdamW(adapter.optimizer_groups(), lr=1e-2)
    for h in adapter.hooks:
        h.on_start(adapter, Schedule(steps, 1e-2))
    return adapter, next(h for h in adapter.hooks if h.name == "adalora")


def stepped(adapter, hook, step):
    adapter.optimizer.zero_grad()
    adapter.model(torch.randn(6, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
    adapter.optimizer.step()
    hook.after_step(step)


def test_the_budget_is_the_sheets_oracle_3():
    found = {t: budget(t, 32, 12, 10, 80) for t in (10, 11, 24, 45, 79, 80, 81, 100)}
    assert found == {10: 32, 11: 31, 24: 22, 45: 14, 79: 12, 80: 12, 81: 12, 100: 12}
    assert sorted((budget(t, 32, 12, 10, 80) for t in range(101)), reverse=True) == [
        budget(t, 32, 12, 10, 80) for t in range(101)
    ]


def test_the_averages_are_the_sheets_oracle_4():
    adapter, hook = started("adalora(rank=1, initial=1)+orthogonal(weight=0)")
    for p in adapter.parameters():
        p.data.fill_(1.0)
    for size, product in ((2.0, 0.0765), (1.0, 0.12393)):
        for p in adapter.parameters():
            p.grad = torch.full_like(p, size)
        hook._observe()
        assert torch.allclose(hook.importance()["0"], torch.tensor(3 * product))


def test_the_orthogonal_term_is_the_sheets_oracle_7():
    Q = torch.linalg.qr(torch.randn(6, 3)).Q.T
    assert orthogonality([Q]).item() == pytest.approx(0, abs=1e-5)
    assert orthogonality([torch.zeros(2, 5)]).item() == pytest.approx(2**0.5)
    M = torch.randn(3, 4)
    by_hand = ((M @ M.T - torch.eye(3)).norm() + 2**0.5) / 2
    assert orthogonality([M, torch.zeros(2, 5)]).item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_steps_agree_with_peft():
    from peft import AdaLoraConfig, get_peft_model

    steps, wait, settle = 16, 2, 5
    ours, theirs = llama(), llama()
    adapter = veneer.attach(
        ours, f"adalora(rank=2, initial=4, wait={wait}, settle={settle}, interval=2)", alpha=8.0, sites="attention"
    )
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=wait, tfinal=settle, deltaT=2, total_step=steps, lora_alpha=8, lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )  # fmt: skip
    peft = get_peft_model(theirs, config)
    hooks = {h.name: h for h in adapter.hooks}
    layers = {path: theirs.get_submodule(path) for path in adapter.deltas}
    with torch.no_grad():
        for path, d in adapter.deltas.items():
            d.scale = 8 / (4 + 1e-5)
            layers[path].lora_A["default"].copy_(d.A)
            layers[path].lora_B["default"].copy_(d.B)
    adapter.optimizer = torch.optim.SGD(adapter.optimizer_groups(), lr=0.3)
    hooks["adalora"].on_start(adapter, Schedule(steps, 0.3))
    sgd = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.3)
    for step, batch in enumerate(collated(encoded(4 * steps), 4)):
        loss = ours(**batch).loss + hooks["orthogonal"].loss(None, batch, None)
        reference = peft.base_model(**batch).loss  # where PEFT adds the orthogonal term
        for total, optimizer in ((loss, adapter.optimizer), (reference, sgd)):
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        hooks["adalora"].after_step(step)
        peft.base_model.update_and_allocate(step)
        if step <= steps - settle:
            assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
            for path, d in adapter.deltas.items():
                torch.testing.assert_close(d.weight(), layers[path].get_delta_weight("default"), rtol=1e-4, atol=1e-7)
        if step < steps - settle:
            found = [d.gate != 0 for d in adapter.deltas.values()]
            assert torch.equal(torch.cat(found), torch.cat([m.lora_E["default"][:, 0] != 0 for m in layers.values()]))
    pattern = peft.peft_config["default"].rank_pattern
    ranks = {path: d.rank if path not in hooks["adalora"].closed else 0 for path, d in adapter.deltas.items()}
    assert {n.removesuffix(".lora_E.default"): sum(kept) for n, kept in pattern.items()} == ranks
    assert sum(ranks.values()) == 2 * len(ranks)


def test_pruning_makes_smaller_tensors_carries_state_and_ends_as_lora():
    adapter, hook = started(SHORT, alpha=6.0)
    for step in range(7):
        stepped(adapter, hook, step)
    before = {path: d.A for path, d in adapter.deltas.items()}
    stepped(adapter, hook, 7)
    assert sum(d.rank for d in adapter.deltas.values()) - len(hook.closed) == 4 and hook.settled
    for path, d in adapter.deltas.items():
        assert d.A.shape[0] == d.B.shape[1] == d.gate.shape[0] == d.rank and d.scale == 2.0
        own = adapter.optimizer.state[d.A]["exp_avg"]
        assert own.shape == d.A.shape and before[path] not in adapter.optimizer.state
    assert adapter.parameter_count() == sum(d.parameter_count() for d in adapter.deltas.values())
    stepped(adapter, hook, 8)
    x = torch.randn(4, 8)
    expected = adapter.model(x)
    hook.on_end()
    torch.testing.assert_close(adapter.model(x), expected, rtol=1e-5, atol=1e-6)
    assert all(d.gate is None for d in adapter.deltas.values())
    assert sum(d.rank for d in adapter.deltas.values()) == 4
    fresh = mlp()
    attach_from(fresh, adapter.description(), adapter.state())
    assert torch.equal(fresh(x), adapter.model(x))


def test_the_state_of_the_kept_components_is_theirs():
    adapter, hook = started(SHORT)
    for step in range(6):
        stepped(adapter, hook, step)
    d = adapter.deltas["0"]
    moments, rows = adapter.optimizer.state[d.A]["exp_avg"].clone(), d.A.detach().clone()
    hook._prune()
    for row, moment in zip(d.A.detach(), adapter.optimizer.state[d.A]["exp_avg"]):
        at = (rows == row).all(1).nonzero().item()
        assert torch.equal(moment, moments[at])


def test_a_closed_component_can_come_back_and_ties_close_no_more_than_asked():
    adapter, hook = started("adalora(rank=1, initial=4, wait=0, settle=0)")
    hook._observe()
    assert all(not s.any() for s in hook.importance().values())
    for d in adapter.deltas.values():
        d.gate.data.fill_(1.0)
    hook._close(3)
    assert sum(int((d.gate == 0).sum()) for d in adapter.deltas.values()) == 3
    d = adapter.deltas["0"]
    adapter.model(torch.randn(4, 8)).sum().backward()
    assert d.gate.grad[d.gate == 0].abs().min() > 0


def test_a_site_that_keeps_nothing_is_taken_off():
    adapter, hook = started(SHORT)
    hook._observe()
    for n in "ABE":
        hook.sensitivity[f"2.{n}"].fill_(1.0)
        hook.uncertainty[f"2.{n}"].fill_(1.0)
    hook.target = 3
    hook._prune()
    assert hook.closed == ["0"] and adapter.deltas["0"].rank == 1 and not adapter.deltas["0"].gate.any()
    stepped(adapter, hook, 9)
    assert not adapter.deltas["0"].gate.any()
    hook.on_end()
    assert list(adapter.deltas) == ["2"] and adapter.deltas["2"].rank == 3


def test_another_start_or_form_stands_in_the_place_of_its_own():
    alone = veneer.attach(mlp(), "adalora", rank=2)
    assert [p.method.name for p in alone.recipe.parts] == ["lora", "adalora-start", "adalora", "orthogonal"]
    spelt = veneer.attach(mlp(), "lora+adalora-start+adalora-ranks+orthogonal", rank=2)
    assert str(spelt.recipe) == str(alone.recipe)
    assert all(d.rank == 3 and not d.gate.any() and d.B.any() for d in alone.deltas.values())
    x = [torch.randn(20, 8)]
    other = veneer.attach(mlp(), "dora+eva(labels_only=False)+adalora+ba-lora", rank=2, calibration=x)
    assert [p.method.name for p in other.recipe.parts] == ["dora", "eva", "adalora", "ba-lora", "orthogonal"]
    assert all(d.rank == 3 and bool((d.gate == 1).all()) and not d.B.any() for d in other.deltas.values())


@pytest.mark.parametrize("before", [2, 4, 7])  # before closing, within it, after pruning
def test_a_resumed_run_goes_on_bit_for_bit(before):
    assert goes_on_bit_for_bit(lambda: training(SHORT, steps=10, accumulate=2), before=before, after=2)


def test_a_run_that_leaves_no_time_and_a_start_below_the_target_are_refused():
    with pytest.raises(UserError, match="leave none for pruning"):
        started("adalora(wait=5, settle=5)", steps=10)
    with pytest.raises(UserError, match="below rank"):
        veneer.attach(mlp(), "adalora(rank=4, initial=3)")
    with pytest.raises(UserError, match="goes with adalora"):
        veneer.attach(mlp(), "adalora-start+sora")
    with pytest.raises(UserError, match="wants rank-one components"):
        veneer.attach(mlp(), "hydra+adalora")


def test_the_sum_of_the_issue_trains_and_comes_back_with_its_ranks(tmp_path):
    model, rows = llama(), encoded(32)
    recipe = "lora+eva+adalora+ba-lora"
    adapter = veneer.attach(model, recipe, rank=2, sites="attention", calibration=collated(rows[:8], 4))
    start = adapter.parameter_count()
    settings = {"batch_size": 4, "steps": 10, "lr": 5e-3, "precision": "fp32", "display": False, "task": "causal"}
    run = veneer.fit(adapter, rows, tmp_path / "run", **settings)
    assert all(torch.isfinite(torch.tensor(run.losses))) and adapter.parameter_count() < start
    assert sum(d.rank for d in adapter.deltas.values()) == 2 * 8
    fresh = llama()
    veneer.load(fresh, tmp_path / "run" / "adapter")
    batch = collated(rows[:4], 4)[0]
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
