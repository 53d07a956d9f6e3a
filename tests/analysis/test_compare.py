"""Comparisons: equal budgets, equal batches, the same numbers under two names, and nothing lost to a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from veneer.analysis.budget import Budget, rank_within, steps_for_tokens
from veneer.analysis.compare import Comparison, Here
from veneer.analysis.paired import adjusted, difference, verdict
from veneer.analysis.trials import Setting
from veneer.cli import main
from veneer.errors import UserError
from veneer.report.comparison_plots import front


@pytest.fixture(scope="module")
def setting(words_model, colours):
    data, general = colours
    return Setting(model=str(words_model), data=str(data), general=str(general), batch_size=4, eval_rows=8)


@pytest.fixture(scope="module")
def here(setting):
    return Here(setting)


def compared(setting, here, out, recipes, budget=None, **options):
    options = {"seeds": (0, 1), "search": 0, "lr": 1e-2, "rank": 2} | options
    made = Comparison(setting, recipes, budget or Budget(steps=4), out=out, **options)
    return made, made.run(runners=here)


def test_one_recipe_under_two_names_gives_the_same_numbers_bit_for_bit(setting, here, tmp_path):
    made, _ = compared(setting, here, tmp_path, ["pissa", "lora+pissa"])
    for one, other in zip(made.finals_of("pissa"), made.finals_of("lora+pissa")):
        for name in ("held_out_loss", "general_loss", "drift", "parameters", "tokens"):
            assert one[name] == other[name]
        assert [loss for *_, loss in one["curve"]] == [loss for *_, loss in other["curve"]]


def test_every_recipe_spends_the_same_steps_and_tokens_and_starts_from_the_base(setting, here, tmp_path):
    made, summary = compared(setting, here, tmp_path, ["lora", "dora", "ia3"])
    runs = [f for r in summary["recipes"] for f in made.finals_of(r)]
    assert {(f["steps_done"], f["seed"]) for f in runs} == {(4, 0), (4, 1)}
    for seed in (0, 1):
        assert len({f["tokens"] for f in runs if f["seed"] == seed}) == 1
    assert len({f["held_out_before"] for f in runs}) == 1
    assert len({f["general_loss_base"] for f in runs}) == 1


def test_the_loop_gets_the_same_batches_for_every_recipe_and_trains_what_is_reported(
    setting, here, tmp_path, monkeypatch
):
    from veneer.train.steps import Training

    seen, micro = [], Training._micro

    def spy(self, taken, share):
        key = (self.settings.seed, str(self.adapter.recipe))
        trained = sum(p.numel() for group in self.adapter.optimizer.param_groups for p in group["params"])
        seen.append((key, taken.batch["input_ids"].tolist(), int(taken.batch["attention_mask"].sum()), trained))
        return micro(self, taken, share)

    monkeypatch.setattr(Training, "_micro", spy)
    made, summary = compared(setting, here, tmp_path, ["lora", "dora", "ia3"])
    finals = [f for recipe in summary["recipes"] for f in made.finals_of(recipe)]
    for seed in (0, 1):
        by_recipe = {}
        for (own, recipe), ids, tokens, trained in seen:
            if own == seed:
                by_recipe.setdefault(recipe, []).append((ids, tokens, trained))
        assert len(by_recipe) == 3
        assert len({str([ids for ids, _, _ in steps]) for steps in by_recipe.values()}) == 1
        for name, steps in by_recipe.items():
            (run,) = [f for f in finals if (f["recipe_full"], f["seed"]) == (name, seed)]
            assert run["steps_done"] == len(steps) == 4
            assert run["tokens"] == sum(tokens for _, tokens, _ in steps)
            assert {run["parameters"]} == {trained for _, _, trained in steps}


def test_a_recipe_that_converts_the_base_leaves_the_others_a_dense_one(setting, here, tmp_path):
    alone, _ = compared(setting, here, tmp_path / "a", ["lora"], seeds=(0,))
    after, _ = compared(setting, here, tmp_path / "b", ["lora+nf4", "lora"], seeds=(0,))
    (one,), (other,), (stored,) = alone.finals_of("lora"), after.finals_of("lora"), after.finals_of("lora+nf4")
    assert one["held_out_loss"] == other["held_out_loss"] != stored["held_out_loss"]


def test_a_process_that_is_killed_loses_at_most_one_run(setting, tmp_path):
    command = [sys.executable, "-m", "veneer.cli", "compare", "lora", "dora", "--model", setting.model]
    command += ["--data", setting.data, "--general", setting.general, "--steps", "12", "--seeds", "4", "--lr", "1e-2"]
    command += ["--rank", "2", "--batch-size", "4", "--eval-rows", "8", "--out", str(tmp_path / "out")]
    record = tmp_path / "out" / "trials.jsonl"
    quiet = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)
    while process.poll() is None and not (record.exists() and record.read_text().endswith("\n")):
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.6))  # anywhere in the next runs
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [line for line in record.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 1 <= len(before) < 8
    assert subprocess.run(command, **quiet).returncode == 0
    after = record.read_text().splitlines(keepends=True)
    assert after[: len(before)] == before and len(after) == 8
    assert len({json.loads(line)["key"] for line in after}) == 8


def test_a_budget_of_parameters_chooses_ranks_and_refuses_what_cannot_shrink(setting, here, tmp_path):
    counts = {r: here.bench.parameters("lora", r) for r in (1, 2, 3, 4)}
    budget = Budget(steps=1, parameters=counts[3] + 1)
    _, summary = compared(setting, here, tmp_path, ["lora", "dora"], budget, seeds=(0,))
    assert [row["rank"] for row in summary["rows"]] == [3, 2]
    assert all(row["parameters"]["mean"] <= counts[3] + 1 for row in summary["rows"])
    with pytest.raises(UserError, match="has no rank to lower"):
        compared(setting, here, tmp_path / "b", ["full"], budget)


def test_tokens_buy_as_many_steps_as_hold_them(setting, here, tmp_path):
    per_batch = here.bench.batch_tokens(0)
    made, _ = compared(setting, here, tmp_path, ["lora"], Budget(tokens=60), seeds=(0,))
    (run,) = made.finals_of("lora")
    assert run["tokens"] >= 60 > run["tokens"] - per_batch(run["steps_done"] - 1)
    assert run["tokens"] == sum(per_batch(k) for k in range(run["steps_done"]))
    assert steps_for_tokens(10, lambda k: 4) == 3


def test_a_killed_comparison_goes_on_and_repeats_no_finished_run(setting, here, tmp_path):
    class Dying(Here):
        def __init__(self, bench, lives):
            self.bench, self.lives, self.ran = bench, lives, []

        def run(self, trials):
            for trial in trials:
                if not self.lives:
                    raise KeyboardInterrupt
                self.lives -= 1
                self.ran.append(trial.key)
                yield from Here.run(self, [trial])

    options = {"seeds": (0, 1), "search": 2, "rank": 2}
    first = Comparison(setting, ["lora", "dora"], Budget(steps=3), out=tmp_path / "broken", **options)
    dying = Dying(here.bench, 5)
    with pytest.raises(KeyboardInterrupt):
        first.run(runners=dying)
    with open(tmp_path / "broken" / "trials.jsonl", "a") as log:
        log.write('{"key": "half a li')
    second = Comparison(setting, ["lora", "dora"], Budget(steps=3), out=tmp_path / "broken", **options)
    living = Dying(here.bench, 99)
    summary = second.run(runners=living)
    assert len(dying.ran) == 5 and len(living.ran) == 8 - 5 and not set(dying.ran) & set(living.ran)
    whole = Comparison(setting, ["lora", "dora"], Budget(steps=3), out=tmp_path / "whole", **options).run(runners=here)
    for a, b in zip(summary["rows"], whole["rows"]):
        assert a["held_out_loss"] == b["held_out_loss"] and a["lr"] == b["lr"]
    with pytest.raises(UserError, match="another budget"):
        Comparison(setting, ["lora"], Budget(steps=2), out=tmp_path / "whole", **options).run(runners=here)


def test_the_command_leaves_table_plots_and_one_page_without_links(setting, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main.run(
            ["compare", "lora", "dora", "--model", setting.model, "--data", setting.data, "--general", setting.general]
            + ["--steps", "3", "--seeds", "2", "--lr", "1e-2", "--rank", "2", "--batch-size", "4", "--answers", "2"]
            + ["--out", str(out)]
        )
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "dora against lora: no difference" in text
    names = {path.name for path in out.iterdir()}
    assert {"report.html", "steps.png", "seconds.png", "scores.png", "pareto.png", "trials.jsonl"} <= names
    page = (out / "report.html").read_text()
    exact = page.count('aria-label="exact answers"')  # drawn where recipes differ in it
    assert page.count('<svg role="img"') == 2 + 3 + 2 + 4 * exact and "<script" not in page
    assert "In short" in page and "no difference can be claimed" in page and "before training" in page
    assert "[4/4, about 0 min left]" in text
    for line in (out / "trials.jsonl").read_text().splitlines():
        kept = json.loads(line)
        assert kept["versions"]["torch"] and kept["hardware"]["cores"] and kept["seed"] in (0, 1)
        assert len(kept["base"]) == 32 and len(kept["train_fingerprint"]) == len(kept["held_out_fingerprint"]) == 64
    assert not [word for word in ('src="http', 'href="http', "@import") if word in page]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["lora", "lora"], "named twice"),
        (["lorra"], "lora"),
        (["lora", "--steps", "3", "--tokens", "5"], "one budget"),
        (["lora", "--general", "nowhere.txt"], "nowhere.txt"),
        (["lora", "--parameters", "3", "--steps", "1"], "rank 1 trains"),
        (["lora(ranck=4)"], 'did you mean "rank"'),
        (["lora+dora"], "at most one delta"),
        (["lora", "--steps", "0"], "--steps"),
        (["lora", "--seconds", "0"], "--seconds"),
        (["lora", "--seeds", "0"], "--seeds"),
        (["lora", "--steps", "many"], "valid integer"),
        (["lora", "--lr", "-1"], "lr"),
        (["lora", "--sites", "nowhere"], "nowhere"),
        (["lora", "--template", "no place"], "no place"),
        (["lora", "--task", "clasification"], "clasification"),
        (["lora", "--task", "classification"], "expected text"),
        (["lora", "--model", "nowhere"], "nowhere"),
        (["lora", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["lora", "--eval-data", "nowhere.jsonl"], "nowhere.jsonl"),
        ([], "recipes"),
    ],
)
def test_mistakes_are_one_sentence(setting, tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        main.run(
            ["compare", "--model", setting.model, "--data", setting.data, "--out", str(tmp_path / "o"), *arguments]
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


def test_paired_statistics_agree_with_scipy():
    from scipy import stats

    first, second = [1.0, 1.2, 0.9, 1.4], [1.1, 1.5, 1.0, 1.5]
    found, expected = difference(first, second), stats.ttest_rel(first, second)
    assert found.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high))
    assert adjusted([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert "can be claimed" in verdict("b", "a", difference([1.0, 2.0], [1.5, 1.6]), 0.9, "loss")
    clear = difference([1.0, 1.2, 0.9, 1.4], [1.2, 1.5, 1.2, 1.7])
    assert "b is better than a in loss" in verdict("b", "a", clear, clear.p, "loss")
    assert "worse" in verdict("b", "a", clear, clear.p, "score", lower_is_better=False)


def run_of(recipe, seed, loss, seconds=1.0):
    """A whole run with just these values."""
    return {"recipe": recipe, "seed": seed, "held_out_loss": loss, "held_out_before": 3.0, "seconds": seconds} | {
        "peak_memory": 2**30, "parameters": 10, "rank": 1, "lr": 1e-3
    }  # fmt: skip


def test_a_summary_says_in_short_what_its_tests_come_to():
    from veneer.analysis.summary import summary

    losses = {"lora": (1.0, 1.1, 0.9), "dora": (0.8, 0.91, 0.69), "ia3": (1.2, 0.9, 1.0), "full": (1.3, 1.41, 1.19)}
    runs = [run_of(r, seed, loss, 9 - len(r)) for r, found in losses.items() for seed, loss in enumerate(found)]
    found = summary(list(losses), runs, [])
    assert found["short"] == [
        "Held-out loss: dora is better and full is worse than lora; no difference can be claimed for the other.",
        "Cheapest: lora, with 5 s a run and 1.00 GiB at its peak.",
    ]
    assert found["before"] == {"held_out_loss": 3.0}
    two = summary(["lora", "ia3"], [r for r in runs if r["recipe"] in ("lora", "ia3")], [])
    assert "no difference from lora can be claimed; the best mean is lora's own, 1, and with 3 seeds" in two["short"][0]
    same = [run_of(r, seed, 1.0 + seed) for r in ("lora", "ia3") for seed in (0, 1)]
    assert summary(["lora", "ia3"], same, [])["short"][0] == "Held-out loss: 1.5 for all."
    one = summary(["lora", "dora"], [r for r in runs if r["seed"] == 0 and r["recipe"] in ("lora", "dora")], [])
    assert "one seed says nothing" in one["short"][0]


def test_costs_are_drawn_with_the_intervals_of_their_means():
    from veneer.analysis.summary import summary
    from veneer.report import comparison_plots

    runs = [run_of(r, seed, 1.0 + seed / 10, 2.0 + seed) for r in ("lora", "dora") for seed in (0, 1, 2)]
    found = summary(["lora", "dora"], runs, []) | {"recipes": ["lora", "dora"]}
    axes = comparison_plots.draw(found, {})["pareto"].axes
    assert [a.get_xlabel() for a in axes] == ["trained parameters", "peak memory, GiB", "seconds of training"]
    value = found["rows"][0]["held_out_loss"]
    bars = [[segment[:, 1].tolist() for segment in c.get_segments()] for c in axes[2].collections]
    assert [pytest.approx([value["low"], value["high"]])] in bars


def test_the_pace_of_a_budget_of_seconds_is_no_search(setting, here, tmp_path):
    made, summary = compared(setting, here, tmp_path, ["lora"], Budget(seconds=0.2), seeds=(0,))
    assert made.runs() == made.finished() == 2
    assert summary["rows"][0]["search"]["runs"] == 0 and summary["rows"][0]["steps"] >= 1


def test_ranks_and_fronts():
    assert rank_within(lambda r: 10 * r + 3, 57) == 5
    with pytest.raises(UserError, match="rank 1"):
        rank_within(lambda r: 100 * r, 50)
    assert front([(3, 1), (1, 5), (2, 5), (2, 2)]) == [(1, 5), (2, 2), (3, 1)]
