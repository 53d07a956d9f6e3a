"""DyLoRA against the numbers of its sheet (024): nested prefixes, any rank afterwards."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.errors import UserError
from veneer.ranks.dylora import at_rank, cut

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))

from breaks import goes_on_bit_for_bit, training
from small_runs import collated, encoded, llama


def attached(recipe="dylora", **options):
    """On a small MLP with B moved; and the hook."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))
    adapter = veneer.attach(model, recipe, **({"rank": 4, "alpha": 8.0} | options))
    with torch.no_grad():
        for d in adapter.deltas.values():
            d.B.normal_()
    return adapter, adapter.hooks[-1]


def test_the_branch_at_every_rank_is_the_sheets_oracle_2():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    adapter = veneer.attach(model, "dylora", rank=4, alpha=4.0)
    with torch.no_grad():
        adapter.deltas["0"].A.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]]))
        adapter.deltas["0"].B.fill_(1.0)
    for n, value in ((1, 4.0), (2, 6.0), (3, 8.0), (4, 8.0)):
        with at_rank(adapter, n):
            assert model(torch.tensor([[1.0, 2.0]])).item() == pytest.approx(value)
    assert model(torch.tensor([[1.0, 2.0]])).item() == pytest.approx(8.0)


@pytest.mark.parametrize("frozen", [False, True])
def test_only_the_prefix_learns_and_of_the_frozen_variant_its_last(frozen):
    adapter, hook = attached(f"dylora(frozen={frozen})")
    hook.draw = lambda step, path="": 3
    hook.before_step(0)
    adapter.model(torch.randn(4, 8)).square().sum().backward()
    hook.after_backward(0)
    d, learns = adapter.deltas["2"], torch.tensor([not frozen, not frozen, True, False])
    assert torch.equal(d.A.grad.any(1), learns) and torch.equal(d.B.grad.any(0), learns)
    hook.after_step(0)
    assert d.gate is None
    _, hook = attached("dylora(block=2, frozen=True)", rank=6)
    hook.draw = lambda step, path="": 4
    for d in hook.adapter.deltas.values():
        d.A.grad, d.B.grad = torch.ones_like(d.A), torch.ones_like(d.B)
    hook.after_backward(0)
    assert d.A.grad.any(1).tolist() == [False, False, True, True, True, True]  # beyond 4 the forward gives zeros


def test_always_the_whole_rank_is_lora():
    runs = [training(r, steps=4, seed=3, rank=4) for r in ("lora", "dylora(ranks=(4,))")]
    losses = [[run.take_step() for _ in range(4)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(runs[0].adapter.vector(), runs[1].adapter.vector(), rtol=1e-5, atol=1e-7)


def test_draws_are_even_and_the_seeds_own():
    _, hook = attached(rank=8)
    found = Counter(hook.draw(step) for step in range(8000))
    assert set(found) == set(range(1, 9)) and all(abs(n - 1000) < 120 for n in found.values())
    _, again = attached(rank=8)
    assert [again.draw(s) for s in range(9)] == [hook.draw(s) for s in range(9)]
    assert len({hook.draw(0, path) for path in "abcdefghijkl"}) > 1
    _, steep = attached("dylora(distribution='geometric', p=0.5)", rank=8)
    counts = Counter(steep.draw(step) for step in range(4000))
    assert counts[1] / 4000 == pytest.approx(0.5 / (1 - 0.5**8), abs=0.03)
    assert attached("dylora(block=2)", rank=7)[1].choices() == [2, 4, 6, 7]


def test_every_rank_folds_and_cutting_is_for_good():
    x = torch.randn(4, 8)
    for n in (1, 2, 4):
        adapter, _ = attached()
        d = adapter.deltas["0"]
        with at_rank(adapter, n):
            running = adapter.model(x)
            adapter.fold()
            assert torch.allclose(adapter.model(x), running, atol=1e-5)
            adapter.unfold()
        by_hand = 8.0 / n * d.B[:, :n] @ d.A[:n]
        cut(adapter, n)
        assert torch.allclose(adapter.model(x), running, atol=1e-5)
        assert torch.allclose(d.weight(), by_hand, atol=1e-5)
        assert d.A.shape == (n, 8) and d.B.shape == (12, n) and d.scale == 8.0 / n


@pytest.mark.parametrize("n", [1, 3])
def test_a_prefix_goes_through_files_and_peft_runs_it(n, tmp_path):
    from peft import PeftModel

    adapter = veneer.attach(llama(), "dylora", rank=4, alpha=8.0, sites="attention")
    with torch.no_grad():
        for d in adapter.deltas.values():
            d.B.normal_(generator=torch.Generator().manual_seed(d.B.numel()))
    batch = collated(encoded(3), 3)[0]
    with at_rank(adapter, n):
        expected = adapter.model(**batch).logits
    adapter.save(tmp_path / "whole")
    fresh = llama()
    again = cut(veneer.load(fresh, tmp_path / "whole"), n)
    torch.testing.assert_close(fresh(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    again.export(tmp_path / "peft", format="peft")
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "peft")
    assert theirs.peft_config["default"].r == n and theirs.peft_config["default"].lora_alpha == 8
    torch.testing.assert_close(theirs(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_goes_on_bit_for_bit():
    assert goes_on_bit_for_bit(lambda: training("dylora(frozen=True)", accumulate=2), before=2, after=3)


def test_what_cannot_be_is_refused():
    adapter, _ = attached()
    for n in (0, 5):
        with pytest.raises(UserError, match="any rank from 1 to 4"):
            cut(adapter, n)
    adapter.fold()
    with pytest.raises(UserError, match="unfold"), at_rank(adapter, 2):
        pass
    for recipe, says in (
        ("dylora(ranks=(9,))", "within 1"),
        ("pissa+dylora", "put back what it moved"),
        ("lora-pro+dylora", "whole pairs"),
    ):
        with pytest.raises(UserError, match=says):
            attached(recipe)
    attached("lora-plus+dylora")[1].on_start(attached()[0], Schedule(4))
