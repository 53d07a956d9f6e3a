"""Every way to act in training does the same in the loop, in both trainers, in two processes and over a break."""

import subprocess
import sys

import pytest
import torch
from small_runs import collated, encoded
from sums import STEPS, SUMS, attached
from test_distributed import PROGRAM, answer, environment, free_port
from test_trainer import losses, sft_trainer, trainer
from two_processes import TASKS, by_fit, by_tasks

from veneer.train.display import Silent
from veneer.train.loop import fit

SIZE = 4
RUN = {"steps": STEPS, "accumulate": 2, "lr": 1e-2, "clip": 0.1, "warmup": 0, "precision": "fp32"}
BY_TRL = (
    "lora+eva",
    "dora+eva",
    "increlora",
    "lora+lora-pro(",
    "galore(rank=4, gap=3, bits",
    "full+owlore",
    "sherl",
    "lora+glad(",
    "gaussian-lora",
    "lora+canonical",
    "lora+m",
)
HALVES = ("diffora", "pc-darts")  # which learn weights from one half of the rows and scores from the other
PHASED = (*HALVES, "lora+elastic(ranks=(1.0, 0.5), whole=0.5)")  # of which a trainer runs one phase a train()
# Whose loss and decisions are means over rows, so that a batch in two halves gives what the whole one gives; ABMLL's
# are means over tasks, which a process has whole.
BY_ROWS = [s for s in SUMS if s not in HALVES and not s.endswith("ba-lora") and "abmll" not in s]
# Which see of a batch what their process has of it, and yet stay the same on all.
BY_PARTS = [*(s for s in SUMS if s not in BY_ROWS), "lora+lr-batch(reference=4, probe=2, depth=3, follow=True)"]
TRAINED = {}  # by recipe: the losses and the tensors of the loop


class Broken(Exception):
    """A run was stopped on purpose."""


class Breaks(Silent):
    """Stops a run after its sixth step, two after a checkpoint."""

    def step(self, values):
        if values["step"] == 6:
            raise Broken


def by_loop(recipe):
    """What an unbroken run over batches in order finds; once a recipe."""
    if recipe not in TRAINED:
        adapter = attached(recipe)
        run = fit(adapter, collated(encoded(2 * SIZE * STEPS), SIZE), display=False, **RUN)
        TRAINED[recipe] = run.losses, adapter.state()
    return TRAINED[recipe]


def same(a, b, **near):
    """Whether two states hold the same tensors, bit for bit, or as near as is said."""
    equal = (lambda x, y: torch.allclose(x, y, **near)) if near else torch.equal
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("recipe", SUMS)
def test_a_run_broken_in_mid_schedule_goes_on_bit_for_bit_under_accumulation(tmp_path, recipe):
    rows = collated(encoded(2 * SIZE * STEPS), SIZE)
    with pytest.raises(Broken):
        fit(attached(recipe), rows, tmp_path, display=Breaks(), save_every=4, **RUN)
    again = attached(recipe)
    found = fit(again, rows, tmp_path, display=False, save_every=4, resume=True, **RUN)
    assert found.losses == by_loop(recipe)[0]
    assert same(again.state(), by_loop(recipe)[1])


@pytest.mark.parametrize(
    "recipe, make",
    [(s, trainer) for s in SUMS if s not in PHASED] + [(s, sft_trainer) for s in SUMS if s.startswith(BY_TRL)],
)
def test_trainers_do_what_the_loop_does(tmp_path, recipe, make):
    adapter = attached(recipe)
    made = make(adapter, encoded(2 * SIZE * STEPS), tmp_path, max_steps=STEPS)
    made.train()
    assert losses(made) == pytest.approx(by_loop(recipe)[0], abs=2e-5)
    assert same(adapter.state(), by_loop(recipe)[1], atol=1e-3)


def test_two_processes_do_what_one_does():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    kinds = [*(f"sum {recipe}" for recipe in BY_ROWS), "tasks", *(f"alike {recipe}" for recipe in BY_PARTS)]
    done = subprocess.run(
        [*command, PROGRAM, "-", *kinds], capture_output=True, text=True, env=environment(), timeout=300
    )
    found = answer((done.stdout, done.stderr, done.returncode))
    for recipe, kind in zip(BY_ROWS, kinds):
        adapter = attached(recipe)
        one = by_fit(adapter, steps=STEPS, eval_data=None)
        assert found[kind]["losses"] == pytest.approx(one["losses"], rel=1e-4), recipe
        assert torch.allclose(torch.tensor(found[kind]["vector"]), adapter.vector(), atol=1e-3), recipe
    assert {kind: found[kind]["apart"] for kind in kinds if kind.startswith("alike")} == {
        f"alike {recipe}": 0.0 for recipe in BY_PARTS
    }
    adapter = attached(TASKS)
    assert found["tasks"]["losses"] == pytest.approx(by_tasks(adapter)["losses"], rel=1e-4)
    assert torch.allclose(torch.tensor(found["tasks"]["vector"]), adapter.vector(), atol=1e-3)
