"""The penalty of sheet 015: what it measures, where its gradient goes, and the two ways to hold the bound."""

import math

import pytest
import torch
from models import VOCABULARY, make
from recipes import moved

import veneer
from veneer.analysis.score_norms import norm_report
from veneer.errors import UserError
from veneer.objectives.score_norm import ScoreNorm
from veneer.train.steps import Passes


def attached(recipe, kind="llama"):
    case = make(kind)
    adapter = veneer.attach(case.model, recipe, rank=2, sites="attention", seed=1)
    return case, adapter, next((h for h in adapter.hooks if isinstance(h, ScoreNorm)), None)


def started(recipe, kind="llama", size=0.4):
    """A moved adapter whose hook watches."""
    case, adapter, hook = attached(recipe, kind)
    moved(adapter, size)
    hook.on_start(adapter, None)
    case.model.train()
    for m in case.model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    return case, adapter, hook


def term(case):
    """What a training pass over the batch adds to the loss."""
    with Passes(case.model) as passes:
        case.loss()
    found = [loss for ctx in passes.contexts for loss in ctx.losses.get("score-norm", [])]
    return sum(found) if found else None


def size(case):
    return float(term(case).detach())


def reported(case, adapter):
    """Γ^Δ of every layer's q, k and v by the norm report."""
    layers = norm_report(case.model, case.batch["input_ids"], adapter, case.batch["attention_mask"])["layers"]
    return [layer[f"delta_{role}"] for layer in layers for role in "qkv"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("form", ["lora", "lora+pissa"])
def test_the_term_is_made_of_what_the_report_measures(kind, form):
    case, adapter, _ = started(f"{form}+score-norm(weight=2.0, target=0.01)", kind)
    free = 0.01 * math.sqrt(math.log(7))
    expected = 2.0 * sum(max(size - free, 0) ** 2 for size in reported(case, adapter))
    case.model.train()
    assert expected > 0 and size(case) == pytest.approx(expected, rel=1e-3)


def test_the_gradient_is_finite_differences_and_stays_with_the_factors():
    case, adapter, _ = started("lora+score-norm(target=0.01)")
    case.model.double()
    for p in adapter.parameters():
        p.data = p.data.double()
    last = [p for n, p in adapter.named_parameters() if "layers.1" in n and "q_proj" in n]  # no layer's input moves
    found = torch.autograd.grad(term(case), last)
    for p, grad in zip(last, found):
        at, eps = divmod(int(grad.abs().argmax()), grad.shape[1]), 1e-6
        values = []
        for sign in (1, -1):
            p.data[at] += sign * eps
            values.append(size(case))
            p.data[at] -= sign * eps
        assert float(grad[at]) == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-4)


def test_nothing_is_added_at_the_start_below_the_target_in_evaluation_and_with_the_adapter_off():
    case, adapter, hook = attached("lora+score-norm")
    hook.on_start(adapter, None)
    case.model.train()
    assert size(case) == 0
    moved(adapter, 0.4)
    hook.target = 100.0
    assert size(case) == 0
    hook.target = 0.01
    assert size(case) > 0
    with adapter.disabled():
        assert term(case) is None
    case.model.eval()
    assert term(case) is None


def rows():
    g = torch.Generator().manual_seed(0)
    return [
        {"input_ids": (i := torch.randint(3, VOCABULARY, (n,), generator=g).tolist()), "labels": i} for n in [8, 5] * 8
    ]


def trained(recipe, **options):
    case, adapter, _ = attached(recipe)
    moved(adapter, 0.4)
    settings = {"batch_size": 4, "steps": 16, "lr": 5e-2, "precision": "fp32", "display": False, "task": "causal"}
    run = veneer.fit(adapter, rows(), **(settings | options))
    return max(reported(case, adapter)), run


def test_training_with_the_penalty_ends_with_smaller_norms():
    plain, _ = trained("lora")
    held, _ = trained("lora+score-norm(weight=10.0, target=0.05)")
    assert held < 0.7 * plain


def test_projected_factors_reach_the_bound():
    case, adapter, hook = started("lora+score-norm(way='project', target=0.1)", size=1.0)
    bound = 0.1 * math.sqrt(math.log(7))
    first = reported(case, adapter)[:3]
    case.model.train()
    case.loss()
    hook.after_step(0)
    assert min(first) > bound and reported(case, adapter)[:3] == pytest.approx([bound] * 3, rel=1e-3)


def test_a_recomputed_block_counts_once():
    losses = [trained("lora+score-norm(weight=5.0, target=0.05)", checkpointing=c)[1].losses for c in (False, True)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_hooks_are_taken_off_at_the_end():
    case, _, hook = started("lora+score-norm")
    hook.on_end()
    assert not any(m._forward_pre_hooks for n, m in case.model.named_modules() if n.endswith("q_proj"))


@pytest.mark.parametrize("recipe, sites", [("bitfit+score-norm", "linear"), ("lora+score-norm", "mlp")])
def test_a_recipe_without_pairs_on_queries_keys_or_values_is_refused(recipe, sites):
    with pytest.raises(UserError, match=r"score-norm|wants"):
        veneer.attach(make("llama").model, recipe, sites=sites)
