"""Recipes drawn at random from what methods give and want train, go on after a break, come back, fold and leave."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from models import VOCABULARY, make
from recipes import EXAMPLES

import veneer
from veneer.core import registry
from veneer.core.hook import Schedule
from veneer.errors import UserError
from veneer.train.display import Silent

DRAWN = 30
FIT = {"batch_size": 4, "steps": 5, "lr": 5e-3, "precision": "fp32", "task": "causal"}
# With a search, shares or slices for a tiny model.
SMALL = {n: EXAMPLES[n] for n in ("flexora", "colora", "n2n", "s2ft", "miss-mini")} | {"pego": "pego(slices=1)"}
ran, refused = [], []


class Broken(Exception):
    """A run was stopped on purpose."""


class Breaks(Silent):
    """Stops a run after its third step, one after a checkpoint."""

    def step(self, values):
        if values["step"] == 3:
            raise Broken


def rows(count=20):
    """Encoded rows: the answer repeats the question's tokens."""
    ids = torch.randint(3, VOCABULARY, (count, 4), generator=torch.Generator().manual_seed(0))
    full = torch.cat([ids, ids], 1)
    return [{"input_ids": r.tolist(), "labels": [-100] * 4 + r[4:].tolist()} for r in full]


@st.composite
def recipes(draw):
    """A form, and for every other axis nothing or a method whose wants the form gives."""
    form = draw(st.sampled_from(registry.methods("delta")))
    parts, given_ = [form], set(form.gives)
    for axis in ("init", "ranks", "optim", "objective", "base"):
        fitting = [m for m in registry.methods(axis) if m.wants and set(m.wants) <= given_]
        fitting += [m for m in registry.methods(axis) if m.name == "ba-lora"]
        choice = draw(st.sampled_from(fitting)) if fitting and draw(st.booleans()) else None
        if choice is not None:
            parts.append(choice)
            given_ |= set(choice.gives)
    return (
        "+".join(SMALL.get(m.name, m.name) for m in parts),
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from(["linear", "attention", "mlp"])),
        draw(st.integers(0, 99)),
    )


def attached(recipe, rank, sites, seed):
    """A tiny llama with the recipe on it; the rank is offered where something has one."""
    case = make("llama")
    before = case.run()
    drawn = rows(12)
    calibration = [
        {k: torch.tensor([r[k] for r in drawn[i : i + 4]]) for k in ("input_ids", "labels")} for i in (0, 4, 8)
    ]
    options = {"sites": sites, "seed": seed, "calibration": calibration, "schedule": Schedule(steps=5, lr=5e-3)}
    try:
        return case, veneer.attach(case.model, recipe, rank=rank, **options)
    except UserError as error:
        if "has a field 'rank'" in str(error):
            return case, veneer.attach(case.model, recipe, **options)
        assert "\n" not in str(error) and not veneer.adapters(case.model)
        converted = "nf4" in recipe or "loftq" in recipe  # a converted base stays converted
        assert converted or torch.equal(case.run(), before)
        raise


def fitted(drawn, out, display=False, resume=False):
    case, adapter = attached(*drawn)
    run = veneer.fit(adapter, rows(), out, display=display, resume=resume, save_every=2, **FIT)
    assert all(torch.isfinite(torch.tensor(run.losses)))
    return case, adapter


def sentence(error):
    """Whether an error is one sentence of some length."""
    return "\n" not in str(error) and str(error).count(" ") > 3


@settings(
    max_examples=DRAWN, derandomize=True, deadline=None, database=None, phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(recipes())
def test_a_legal_recipe_does_all_that_adapters_do(drawn):
    with tempfile.TemporaryDirectory() as folder:
        try:
            case, adapter = fitted(drawn, Path(folder) / "whole")
        except UserError as error:
            assert sentence(error)
            event("refused")
            refused.append((drawn, str(error)))
            return
        ran.append(drawn)
        goes_on_after_a_break(drawn, adapter, Path(folder) / "broken")
        comes_back(case, Path(folder) / "whole" / "adapter")
        folds_or_says_why(case, adapter)
        leaves_or_says_why(case, adapter, Path(folder))


def goes_on_after_a_break(drawn, adapter, out):
    """The state of a run that was broken and resumed is that of one which was not, bit for bit."""
    with pytest.raises(Broken):
        fitted(drawn, out, Breaks())
    _, again = fitted(drawn, out, resume=True)
    state, resumed = adapter.state(), again.state()
    assert state.keys() == resumed.keys()
    assert all(torch.equal(state[k], resumed[k]) for k in state), drawn


def comes_back(case, directory):
    """What was saved gives the same outputs on a fresh base."""
    fresh = make("llama")
    veneer.load(fresh.model, directory)
    assert torch.equal(fresh.run(), case.run())


def folds_or_says_why(case, adapter):
    """Folded weights give the same outputs, and unfolding gives the weights back."""
    running = case.run()
    try:
        adapter.fold()
    except UserError as error:
        assert sentence(error)
        assert adapter.recipe.part("base") or not all(d.folds for d in adapter.deltas.values())
        return
    assert (case.run() - running).abs().max() <= 2e-5 * running.abs().max()
    adapter.unfold()
    assert torch.equal(case.run(), running)


def leaves_or_says_why(case, adapter, folder):
    """PEFT directories give the same outputs, plain LoRA ones within the error said."""
    running = case.run()
    for form, options in (("peft", {}), ("peft-lora", {"tolerance": 0.1})):
        try:
            found = adapter.export(folder / form, form, **options)
        except UserError as error:
            assert sentence(error) and not (folder / form).exists()
            continue
        assert form == "peft" or found.error <= 0.1 + 1e-6
        if form == "peft" and adapter.recipe.part("base") is None:
            fresh = make("llama")
            veneer.load(fresh.model, folder / form)
            assert (fresh.run() - running).abs().max() <= 2e-5 * running.abs().max()
    assert torch.equal(case.run(), running)


def test_most_of_what_was_drawn_ran():
    """The words that methods give and want say nearly all that can be said of what goes together."""
    assert len(ran) >= 0.7 * (len(ran) + len(refused)), refused
