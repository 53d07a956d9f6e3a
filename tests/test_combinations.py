"""Sums of methods train, go on after a break, save and come back; impossible ones are refused."""

import pytest
import torch
from models import VOCABULARY, make

import veneer
from veneer.errors import UserError

RECIPES = [
    "dora+pissa",
    "lora+eva+lora-pro",
    "lora+nf4+sora",
    "hydra+ba-lora",
    "rslora+lora-ga+ba-lora",
    "dora+nf4+eva",
    "lora+allora+sora",
    "increlora+ba-lora",
    "randlora+nf4",
    "lora+pissa+lora-ggpo",
    "galore+ba-lora",
    "dora+eva+lora-ggpo",
    "mos+nf4",
]


def rows(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Encoded rows: the answer repeats the question's tokens."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, 4), generator=g)
    full = torch.cat([ids, ids], 1)
    labels = full.clone()
    labels[:, :4] = -100
    return [{"input_ids": a.tolist(), "labels": b.tolist()} for a, b in zip(full, labels)]


def calibration() -> list[dict[str, torch.Tensor]]:
    """One batch with labels."""
    return [{k: torch.tensor([r[k] for r in rows(6)]) for k in ("input_ids", "labels")}]


def attached(recipe: str):
    """A tiny llama in fp32 with the recipe on it."""
    case = make("llama")
    return case, veneer.attach(case.model, recipe, rank=4, calibration=calibration(), seed=1)


def fitted(adapter, out=None, **options):
    """Twelve steps."""
    settings = {"batch_size": 4, "steps": 12, "lr": 5e-3, "precision": "fp32", "display": False, "task": "causal"}
    return veneer.fit(adapter, rows(48), out, **(settings | options))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_sum_trains_saves_and_comes_back(recipe, tmp_path):
    case, adapter = attached(recipe)
    run = fitted(adapter, tmp_path / "run", eval_data=rows(12, seed=1))
    assert all(torch.isfinite(torch.tensor(run.losses)))
    expected = case.run()
    with adapter.disabled():
        assert not torch.equal(case.run(), expected)
    fresh = make("llama")
    veneer.load(fresh.model, tmp_path / "run" / "adapter")
    assert torch.equal(fresh.run(), expected)


@pytest.mark.parametrize(
    "recipe, says",
    [
        ("lora+dora", "at most one delta"),
        ("lora+pissa+eva", "at most one init"),
        ("full+nf4", "quantised|frozen"),
        ("bitfit+pissa", "wants"),
        ("randlora+lora-pro", "wants|pairs"),
        ("lora-pro+galore", "at most one delta|both bring|wants"),
        ("hydra+sora", "wants|components"),
    ],
)
def test_an_impossible_sum_is_refused_in_one_sentence(recipe, says):
    case = make("llama")
    before = case.run()
    with pytest.raises(UserError, match=says) as error:
        veneer.attach(case.model, recipe, calibration=calibration())
    assert "\n" not in str(error.value)
    assert torch.equal(case.run(), before) and not veneer.adapters(case.model)


def test_evidence_is_asked_for_when_it_is_missing():
    with pytest.raises(UserError, match="calibration"):
        veneer.attach(make("llama").model, "eva")
