"""Claims: every contestant has the same sweep and batches, validation chooses, rules judge, a kill loses one run."""

import json
import math
import subprocess
import sys

import pytest
import torch

from bench.claims import harness, tasks, verdicts
from bench.claims.harness import Claim, Results, Trial, With, nothing
from bench.claims.tasks import Batches, Digits
from bench.claims.verdicts import above, at_least, at_most, below, every, level
from bench.harness import ROOT
from veneer.errors import UserError


@pytest.fixture(autouse=True)
def own_scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "SCRATCH", tmp_path / "scratch")
    tasks._base.cache_clear()


SMALL = Digits(widths=(64, 16, 10), shots=64, epochs=3)


def claim(**changes):
    given = {
        "number": 1,
        "name": "tried",
        "claim": "More rank is better.",
        "task": SMALL,
        "contestants": {"more": With("lora", rank=4), "less": "lora(rank=1)"},
        "rates": (1e-4, 1e-2),
        "seeds": 2,
        "rule": above("more", "less"),
    }
    return Claim(**given | changes)


def made(scores, measure="test", rate=0.1):
    """Results of one rate whose ``measure`` is as given, by label and seed."""
    runs = [
        {"label": label, "lr": rate, "seed": seed, "measures": {"validation": 0.0, measure: value}}
        for label, values in scores.items()
        for seed, value in enumerate(values)
    ]
    return Results(runs, dict.fromkeys(scores, True))


def test_a_claim_from_end_to_end(tmp_path):
    record = claim().run(tmp_path, tmp_path)
    assert record == json.loads((tmp_path / "001_tried.json").read_text())
    assert record["verdict"] in ("shown", "not shown") and record["sentence"].startswith(record["verdict"].capitalize())
    assert len(record["runs"]) == 2 * 2 * 2
    more, less = record["contestants"]["more"], record["contestants"]["less"]
    assert less["parameters"]["mean"] == (64 + 16) + (16 + 10) and more["parameters"]["mean"] == 4 * 106
    assert more["lr"] == 1e-2 and 0.1 < more["kept"]["mean"] <= 1.0
    own = [a - b for a, b in zip(more["test"]["values"], less["test"]["values"])]
    (found,) = (d for d in record["differences"] if d["measure"] == "test")
    assert found["mean"] == pytest.approx(sum(own) / 2) and found["low"] < found["mean"] < found["high"]


def test_a_killed_claim_goes_on_with_the_run_it_was_at(tmp_path, monkeypatch):
    calls, whole = [], harness._run

    def killed(trial, claim):
        calls.append((trial.label, trial.lr, trial.seed))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(trial, claim)

    monkeypatch.setattr(harness, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        claim().run(tmp_path, tmp_path)
    record = claim().run(tmp_path, tmp_path)
    assert len(calls) == 9 and calls[3] == calls[4] and len(set(calls)) == 8
    assert claim().run(tmp_path, tmp_path)["runs"] == record["runs"] and len(calls) == 9


def test_a_changed_contestant_alone_runs_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        harness,
        "_run",
        lambda trial, claim: calls.append(trial.label) or {"measures": {"validation": 0.0, "test": 0.0}},
    )
    claim().run(tmp_path, tmp_path)
    claim(contestants={"more": With("lora", rank=4), "less": "lora(rank=2)"}).run(tmp_path, tmp_path)
    assert calls[8:] == ["less"] * 4
    claim().run(tmp_path, tmp_path, fresh=True)
    assert len(calls) == 8 + 4 + 8


def test_runs_of_one_seed_start_alike_and_see_the_same_batches():
    first, second = SMALL.data(3), SMALL.data(3)
    first.set_epoch(1), second.set_epoch(1)
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(first, second, strict=True))
    assert torch.equal(SMALL.model(3).layers[0].weight, SMALL.model(3).layers[0].weight)
    assert not torch.equal(SMALL.model(3).layers[0].weight, SMALL.model(4).layers[0].weight)
    order = [row["x"] for row in first]
    first.set_epoch(2)
    assert not torch.equal(order[0], next(iter(first))["x"])


def test_train_validation_and_test_share_no_image():
    parts = [SMALL.rows(part, 0)["x"] for part in ("train", "validation", "test")]
    rows = [{tuple(image.tolist()) for image in part} for part in parts]
    assert [len(part) for part in parts] == [64, 400, 597]
    assert not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])


def test_a_quarter_turn_moves_the_top_right_corner_to_the_top_left():
    upright, turned = (Digits(change=c).rows("test", 0)["x"].reshape(-1, 8, 8) for c in ("none", "rotate"))
    assert torch.equal(turned[:, 0, 0], upright[:, 0, 7]) and not torch.equal(turned, upright)


def test_mixed_changes_take_turns():
    plain, mixed = (Digits(change=c).rows("test", 0)["x"] for c in ("none", "none+invert"))
    assert torch.equal(mixed[::2], plain[::2]) and torch.equal(mixed[1::2], 1 - plain[1::2])


def test_the_rate_is_the_one_that_validation_chooses():
    runs = [
        {"label": "a", "lr": rate, "seed": seed, "measures": {"validation": v, "test": t}}
        for rate, v, t in ((1e-3, 0.5, 0.9), (1e-2, 0.7, 0.1))
        for seed in range(2)
    ]
    assert Results(runs, {"a": True}).chosen == {"a": 1e-2}
    assert Results(runs, {"a": False}).chosen == {"a": 1e-3}
    assert Results(runs, {"a": True}).values("a", rate=1e-3) == [0.9, 0.9]


def test_a_run_that_is_not_finite_is_never_chosen(tmp_path):
    record = claim(task=SMALL, rates=(1e-2, 1e30)).run(tmp_path, tmp_path)
    assert record["contestants"]["more"]["lr"] == 1e-2
    assert sum("failed" in run for run in record["runs"]) == 4


def test_the_sweep_may_be_on_the_first_seed_alone(tmp_path):
    record = claim(sweep_seeds=1, seeds=3).run(tmp_path, tmp_path)
    assert len(record["runs"]) == 2 * 2 + 2 * 2
    assert all(len(c["test"]["values"]) == 3 for c in record["contestants"].values())


def test_seeds_beyond_the_sweep_do_not_change_the_chosen_rate(tmp_path, monkeypatch):
    def run(trial, claim):
        score = -1.0 if trial.seed else trial.lr  # the larger rate wins the sweep, and fails on the other seeds
        return {"measures": {"validation": score, "test": score}}

    monkeypatch.setattr(harness, "_run", run)
    record = claim(sweep_seeds=1, seeds=3).run(tmp_path, tmp_path)
    assert record["contestants"]["more"]["lr"] == 1e-2
    assert record["contestants"]["more"]["test"]["values"] == [1e-2, -1.0, -1.0]


def test_the_interval_is_students():
    from scipy.stats import ttest_rel

    a, b = [0.9, 0.8, 0.86, 0.91], [0.85, 0.81, 0.8, 0.84]
    found, expected = verdicts.difference(a, b), ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert verdicts.difference([1.0], [0.0]).low == -math.inf


def test_a_difference_holds_only_when_its_whole_interval_does():
    clear, noisy = made({"a": [0.9, 0.91, 0.9], "b": [0.8, 0.8, 0.81]}), made({"a": [0.9, 0.7], "b": [0.8, 0.69]})
    assert above("a", "b")(clear).holds and not above("a", "b", by=0.2)(clear).holds
    assert not above("a", "b")(noisy).holds and above("a", "b", by=-1.0)(noisy).holds
    assert below("b", "a", by=0.05)(clear).holds and not below("a", "b")(clear).holds
    assert level("a", "b", 0.2)(clear).holds and not level("a", "b", 0.1)(clear).holds
    assert "0.9033" in above("a", "b")(clear).words and "+0.1" in above("a", "b")(clear).words


def test_bounds_hold_on_every_seed():
    results = made({"a": [3.0, 5.0]}, measure="kept")
    assert at_least("a", 3.0, on="kept")(results).holds and not at_least("a", 4.0, on="kept")(results).holds
    assert at_most("a", 5.0, on="kept")(results).holds and not at_most("a", 4.0, on="kept")(results).holds
    assert not every(at_least("a", 0, on="kept"), at_most("a", 4, on="kept"))(results).holds


def test_a_rule_on_a_measure_that_no_run_has_says_so():
    with pytest.raises(UserError, match=r"speed.*the measures are test, validation"):
        above("a", "b", on="speed")(made({"a": [1.0], "b": [1.0]}))


def test_a_function_trains_by_itself_and_a_measure_looks_at_the_model(tmp_path):
    def head(trial: Trial) -> None:
        trial.fit(trial.attach("full", sites="layers.1"))

    record = claim(
        contestants={"head": head, "base": With(function=nothing, rates=(0,))},
        rule=above("head", "base", on="steps"),
        measures={"steps": lambda trial: len(trial.losses)},
    ).run(tmp_path, tmp_path)
    head, base = record["contestants"]["head"], record["contestants"]["base"]
    assert head["steps"]["values"] == [6, 6] and base["steps"]["values"] == [0, 0]
    assert head["parameters"]["mean"] == 16 * 10 + 10 and "parameters" not in base
    assert base["test"]["values"] == [SMALL.scores(SMALL.model(seed), seed)["test"] for seed in range(2)]


def test_recipes_that_look_at_data_are_given_batches(tmp_path):
    record = claim(contestants={"more": "lora(rank=4)+eva", "less": "lora(rank=1)"}, rates=(1e-2,), seeds=1).run(
        tmp_path, tmp_path
    )
    assert record["contestants"]["more"]["test"]["mean"] > 0


@pytest.mark.parametrize(
    ("recipe", "asks"), [("lora", False), ("lora+eva", True), ("lora+flexora", True), ("lora-xs+lora-sb", True)]
)
def test_a_recipe_asks_for_batches_when_any_method_looks_at_data(recipe, asks):
    assert harness._asks(recipe) is asks


def test_kept_bytes_are_those_of_the_saved_tensors():
    trial = Trial(SMALL, "", With("full"), 0.0, 0, torch.nn.Sequential(torch.nn.Linear(64, 10), torch.nn.Tanh()))
    trial.model.forward = lambda x, labels, own=trial.model.forward: own(x)
    assert harness.kept_bytes(trial) == 32 * (64 + 10) * 4  # the input and tanh's output, fp32


def test_what_cannot_be_tried_is_recorded_with_its_reason(tmp_path):
    record = Claim(number=7, name="large", claim="It scales.", untestable="it needs 7 billion parameters").run(tmp_path)
    assert record["verdict"] == "not testable at this size" and "7 billion" in record["sentence"]
    with pytest.raises(UserError, match="needs a task"):
        Claim(number=7, name="large", claim="It scales.")


@pytest.mark.parametrize("net", ["residual", "conv"])
def test_the_other_nets_learn_too(net):
    task = Digits(net=net, widths=(64, 16, 16, 16, 10))
    assert task.scores(task.model(0), 0)["kept"] > 0.8


def test_batches_give_every_row_once():
    rows = torch.cat([b["x"] for b in Batches({"x": torch.arange(10)}, 4, seed=1)])
    assert sorted(rows.tolist()) == list(range(10)) and len(Batches({"x": torch.arange(10)}, 4)) == 3


def test_a_script_runs_by_its_path_and_by_the_package():
    for command in ([str(ROOT / "bench/claims/001_hydra.py"), "--help"], ["-m", "bench.claims", "--help"]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "--fresh" in done.stdout, done.stderr


def test_claims_share_the_runs_that_they_have_in_common(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        harness,
        "_run",
        lambda trial, claim: calls.append(trial.label) or {"measures": {"validation": 0.0, "test": 0.0}},
    )
    claim().run(tmp_path, tmp_path)
    contestants = {"same": "lora(rank=1)", "own": With(function=nothing)}
    claim(number=2, name="other", contestants=contestants, rule=above("same", "own")).run(tmp_path, tmp_path)
    assert calls[8:] == ["own"] * 4
