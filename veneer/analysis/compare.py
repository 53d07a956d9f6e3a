"""Recipes side by side under one budget: the same batches in the same order, the same search for a learning rate."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from veneer.analysis.budget import Budget, rank_within, steps_for_tokens, takes_rank
from veneer.analysis.trials import Bench, Setting, Trial
from veneer.errors import UserError

RECORD, ABOUT = "trials.jsonl", "comparison.json"
RATES = (1e-5, 1e-2)  # the interval searched, log-uniform
PROBE = 3  # steps by which a recipe's pace is measured under a budget of seconds

Tell = Callable[[str], None]


class Comparison:
    """A comparison in a folder: what has run is kept line by line, so that a killed one goes on where it was.

    Args:
        setting: model, data and what all runs share.
        recipes: recipes by the label they are shown under.
        budget: what each run may spend.
        seeds: of data order, starts and dropout; every recipe gets all of them.
        search: learning rates tried for each recipe, on validation rows, in runs of half the length; 0: the usual rate
            of each recipe, or ``lr``.
        lr: one learning rate for all, in place of a search.
        rank: offered to recipes that leave it open, unless the budget names parameters.
        out: the folder.

    Raises:
        UserError: the folder holds another comparison; a recipe that cannot be; nothing to compare.
    """

    def __init__(
        self,
        setting: Setting,
        recipes: Sequence[str],
        budget: Budget,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        search: int = 4,
        lr: float | None = None,
        rank: int | None = None,
        out: str | Path,
    ) -> None:
        from veneer.core.recipe import parse

        if not recipes:
            raise UserError("there is nothing to compare; name one recipe or more, as in: lora dora lora+pissa")
        if len(set(recipes)) < len(recipes):
            raise UserError(f"a recipe is named twice: {' '.join(recipes)}; name each once")
        if search and lr is not None:
            search = 0
        self.parsed = {recipe: parse(recipe) for recipe in recipes}
        self.setting, self.recipes, self.budget = setting, list(recipes), budget
        self.seeds, self.search, self.lr, self.rank = list(seeds), search, lr, rank
        self.out = Path(out)
        self.found: dict[str, dict[str, Any]] = {}

    def about(self) -> dict[str, Any]:
        """What decides the numbers: a folder that was begun under other values is refused."""
        return {
            "setting": asdict(self.setting),
            "budget": asdict(self.budget),
            "seeds": self.seeds,
            "search": self.search,
            "lr": self.lr,
            "rank": self.rank,
        }

    def run(self, tell: Tell = lambda text: None, runners: Runners | None = None) -> dict[str, Any]:
        """Run what has not run yet, and give the summary (see ``summary``)."""
        from veneer.train.folder import RunFolder

        folder = RunFolder(self.out, resume=True)  # one process writes
        try:
            self._open()
            runners = runners or Here(self.setting)
            ranks = {r: self._rank(r, runners.bench) for r in self.recipes}
            steps = {r: self._steps(r, ranks[r], runners, tell) for r in self.recipes}
            plan = [(r, ranks[r], steps[r]) for r in self.recipes]
            rates = self._search(plan, runners, tell)
            finals = [Trial(r, k, seed, rates[r], n) for seed in self.seeds for r, k, n in plan]
            self._run_all(finals, runners, tell)
            return self._finish(finals, runners.bench)
        finally:
            folder.close()

    def runs(self) -> int:
        """How many runs it takes: searches, final ones, and one a recipe to see its pace for a budget of seconds."""
        return len(self.recipes) * (len(self.seeds) + self.search + (self.budget.seconds is not None))

    def finished(self) -> int:
        """How many of its recipes' runs the folder holds already."""
        return sum(line["recipe"] in self.recipes for line in _lines(self.out / RECORD))

    def finals_of(self, recipe: str) -> list[dict[str, Any]]:
        """The whole runs of a recipe, by seed."""
        mine = [r for r in self.found.values() if r["recipe"] == recipe and r["purpose"] == "final" and "curve" in r]
        return sorted(mine, key=lambda r: r["seed"])

    # -- the folder --------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        from veneer.io.files import read_json, write_json

        about = self.out / ABOUT
        if about.exists():
            before = read_json(about)["about"]
            changed = [k for k, v in json.loads(json.dumps(self.about())).items() if before.get(k) != v]
            if changed:
                raise UserError(
                    f"{self.out} holds a comparison with another {changed[0]} ({before.get(changed[0])}); "
                    "give another --out, or the same options to go on with it"
                )
        write_json(about, {"about": self.about(), "recipes": self.recipes})
        for line in _lines(self.out / RECORD):
            self.found[line["key"]] = line

    def _keep(self, result: dict[str, Any]) -> None:
        self.found[result["key"]] = result
        with open(self.out / RECORD, "a", encoding="utf-8") as log:
            log.write(json.dumps(result) + "\n")

    # -- the budget --------------------------------------------------------------------------------------------------

    def _rank(self, recipe: str, bench: Bench) -> int | None:
        open_rank = takes_rank(self.parsed[recipe])
        if self.budget.parameters is None:
            return self.rank if open_rank else None
        if open_rank:
            return rank_within(lambda rank: bench.parameters(recipe, rank), self.budget.parameters)
        count = bench.parameters(recipe, None)
        if count > self.budget.parameters:
            raise UserError(
                f"{recipe} trains {count:,} numbers, more than the budget's {self.budget.parameters:,}, and has no "
                "rank to lower; leave it out or raise the budget"
            )
        return None

    def _steps(self, recipe: str, rank: int | None, runners: Runners, tell: Tell) -> int:
        if self.budget.steps is not None:
            return self.budget.steps
        if self.budget.tokens is not None:
            return steps_for_tokens(self.budget.tokens, runners.bench.batch_tokens(self.seeds[0]))
        probe = Trial(recipe, rank, self.seeds[0], self.lr, PROBE, "pace")
        (result,) = self._run_all([probe], runners, tell)
        (_, first, _), (_, last, _) = result["curve"][0], result["curve"][-1]
        return max(1, int(self.budget.seconds * (PROBE - 1) / (last - first)))

    # -- runs --------------------------------------------------------------------------------------------------------

    def _search(self, plan: list[tuple], runners: Runners, tell: Tell) -> dict[str, float | None]:
        """The rate of each recipe: the best on validation rows. One rate of every recipe is tried at a time, so that a
        cluster has work for as many processes as there are recipes."""
        if not self.search:
            return dict.fromkeys(self.recipes, self.lr)
        studies = {recipe: _study(self.seeds[0]) for recipe in self.recipes}
        for _ in range(self.search):
            asked = {recipe: study.ask() for recipe, study in studies.items()}
            rates = {r: float(f"{a.suggest_float('lr', *RATES, log=True):.3g}") for r, a in asked.items()}
            trials = [Trial(r, rank, self.seeds[0], rates[r], max(1, n // 2), "search") for r, rank, n in plan]
            for trial, result in zip(trials, self._run_all(trials, runners, tell)):
                loss = result.get("held_out_loss")
                known = loss if loss is not None and math.isfinite(loss) else 1e9
                studies[trial.recipe].tell(asked[trial.recipe], known)
        return {recipe: float(f"{study.best_params['lr']:.3g}") for recipe, study in studies.items()}

    def _run_all(self, trials: Iterable[Trial], runners: Runners, tell: Tell) -> list[dict[str, Any]]:
        trials = list(trials)
        for result in runners.run([t for t in trials if t.key not in self.found]):
            self._keep(result)
            tell(_line(result))
        return [self.found[t.key] for t in trials]

    def _finish(self, finals: list[Trial], bench: Bench) -> dict[str, Any]:
        from veneer.analysis.summary import summary
        from veneer.io.files import write_json

        facts = bench.facts() | bench.stamp
        searched = [r for r in self.found.values() if r["purpose"] == "search"]
        content = summary(self.recipes, [self.found[t.key] for t in finals], searched) | {
            "notes": bench.notes(),
            "about": self.about(),
            "budget": str(self.budget),
            "facts": facts,
            "recipes": self.recipes,
            "ended": time.strftime("%Y-%m-%d %H:%M"),
        }
        write_json(self.out / ABOUT, content)
        return content


class Runners:
    """Where trials run; ``bench`` is a model and data in this process."""

    bench: Bench

    def run(self, trials: Sequence[Trial]) -> Iterator[dict[str, Any]]:
        """Results as they come; a run that fails gives a result with ``failed``, one sentence."""
        raise NotImplementedError


class Here(Runners):
    """One trial after the other, in this process."""

    def __init__(self, setting: Setting) -> None:
        self.bench = Bench(setting)

    def run(self, trials: Sequence[Trial]) -> Iterator[dict[str, Any]]:
        """In the order given."""
        for trial in trials:
            yield attempt(self.bench, trial)


class OnRay(Runners):
    """Trials spread over a Ray cluster, one actor with its own model for each ``cpus`` processors."""

    def __init__(self, setting: Setting, address: str | None = None, cpus: int = 1) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("--ray needs a package: pip install 'veneer[ray]'") from None
        self.bench = Bench(setting)
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        worker = ray.remote(num_cpus=cpus)(_Worker)
        count = max(1, int(ray.cluster_resources().get("CPU", 1) // cpus))
        self.workers = [worker.remote(setting, cpus) for _ in range(count)]

    def run(self, trials: Sequence[Trial]) -> Iterator[dict[str, Any]]:
        """As they finish."""
        from ray.exceptions import RayTaskError
        from ray.util import ActorPool

        found = ActorPool(self.workers).map_unordered(lambda actor, trial: actor.run.remote(trial), list(trials))
        try:
            yield from found
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None


class _Worker:
    """One process of a cluster with the model and the data."""

    def __init__(self, setting: Setting, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.bench = Bench(setting)

    def run(self, trial: Trial) -> dict[str, Any]:
        """The trial's result."""
        return attempt(self.bench, trial)


def attempt(bench: Bench, trial: Trial) -> dict[str, Any]:
    """The trial's result; a loss that is not finite is a result too. Other mistakes end the comparison."""
    from veneer.train.finite import NotFiniteError

    try:
        found = bench.run(trial)
    except NotFiniteError as error:
        found = {**asdict(trial), "key": trial.key, "failed": str(error), "held_out_loss": None}
    return found | bench.stamp


def _study(seed: int) -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("the search for a learning rate needs a package: pip install 'veneer[compare]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=2))
    study.enqueue_trial({"lr": 1e-3})
    study.enqueue_trial({"lr": 3e-4})
    return study


def _line(result: dict[str, Any]) -> str:
    what = f"{result['recipe']}, seed {result['seed']}"
    rate = result.get("lr_used") or result["lr"]
    head = {"final": "run"}.get(result["purpose"], result["purpose"])
    if "failed" in result:
        return f"{head}: {what}, lr {rate:.2g}: {result['failed']}"
    return (
        f"{head}: {what}, lr {rate:.2g}, {result['steps_done']} steps: "
        f"held-out loss {result['held_out_loss']:.4f} in {result['seconds_whole']:.0f} s"
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a record; one that a kill cut short is left out, and cut off."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    found = [json.loads(line) for line in whole]
    if len("".join(whole)) < path.stat().st_size:
        path.write_text("".join(whole), encoding="utf-8")
    return found
